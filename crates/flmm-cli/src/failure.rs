//! Why a command failed, and the exit status that says so.

/// Anything that ends a command early.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The command was not used as it can be: exit status 2.
    Usage {
        /// What is wrong.
        what: String,
        /// What to do.
        hint: String,
    },
    /// The library refused: exit status 1.
    Library(flmm::Error),
    /// Anything else that went wrong: exit status 1.
    Other(String),
    /// Whoever read standard output has closed it: nothing to complain about.
    ReaderGone,
}

pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    pub(crate) fn usage(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Usage { what: what.into(), hint: hint.into() }
    }

    pub(crate) fn other(what: impl Into<String>) -> Self {
        Self::Other(what.into())
    }

    pub(crate) fn exit_status(&self) -> u8 {
        match self {
            Self::Usage { .. } => 2,
            Self::Library(_) | Self::Other(_) => 1,
            Self::ReaderGone => 0,
        }
    }

    pub(crate) fn hint(&self) -> Option<&str> {
        match self {
            Self::Usage { hint, .. } => Some(hint),
            Self::Library(error) => error.hint(),
            Self::Other(_) | Self::ReaderGone => None,
        }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Usage { what, .. } | Self::Other(what) => f.write_str(what),
            Self::Library(error) => write!(f, "{error}"),
            Self::ReaderGone => f.write_str("standard output was closed"),
        }
    }
}

impl From<flmm::Error> for Failure {
    fn from(error: flmm::Error) -> Self {
        Self::Library(error)
    }
}
