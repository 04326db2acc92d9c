//! The library's one error type. Every message says what was wrong and where; [`Error::hint`] says what to do.

use std::path::{Path, PathBuf};

/// What went wrong, where, and (through [`Error::hint`]) what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The picture cannot be used (not an image, truncated, empty, too large …).
    #[error("cannot use the picture: {what}")]
    Image {
        /// What is wrong, naming the file when there is one.
        what: String,
        /// What the user can do.
        hint: String,
    },
    /// A checkpoint file or its tensors are missing, misshapen, truncated or unexpected.
    #[error("{}: {what}", file.display())]
    Weights {
        /// The file or folder at fault.
        file: PathBuf,
        /// One line per problem, each with the tensor name and the expected and found shape.
        what: String,
        /// What the user can do.
        hint: String,
    },
    /// A configuration file is missing a key, or a value is out of range.
    #[error("{}: {what}", file.display())]
    Config {
        /// The file at fault.
        file: PathBuf,
        /// The key and what is wrong with it.
        what: String,
        /// What the user can do.
        hint: String,
    },
    /// The request itself cannot be served (empty prompt, prompt longer than the context, unknown phrase …).
    #[error("{what}")]
    Request {
        /// What is wrong with the request.
        what: String,
        /// What the user can do.
        hint: String,
    },
    /// The Hugging Face hub, or the way to it, did not give what was asked for.
    #[error("{what}")]
    Hub {
        /// What is missing or was refused, naming the repository.
        what: String,
        /// What the user can do.
        hint: String,
    },
    /// The operating system refused to read or write a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file at fault.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A tensor operation failed: a bug in flmm, or a device that ran out of memory.
    #[error("tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
}

/// The library's result type.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// One sentence that tells the user what to do, where there is one.
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::Image { hint, .. }
            | Self::Weights { hint, .. }
            | Self::Config { hint, .. }
            | Self::Hub { hint, .. }
            | Self::Request { hint, .. } => Some(hint),
            Self::Io { source, .. } => match source.kind() {
                std::io::ErrorKind::NotFound => Some("check the path"),
                std::io::ErrorKind::PermissionDenied => Some("check who may read and write there"),
                _ => None,
            },
            Self::Tensor(_) => None,
        }
    }

    /// An [`Error::Io`] for `path`.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Io { path: path.as_ref().to_owned(), source }
    }

    /// An [`Error::Image`].
    pub fn image(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Image { what: what.into(), hint: hint.into() }
    }

    /// An [`Error::Weights`] for `file`.
    pub fn weights(file: impl AsRef<Path>, what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Weights { file: file.as_ref().to_owned(), what: what.into(), hint: hint.into() }
    }

    /// An [`Error::Config`] for `file`.
    pub fn config(file: impl AsRef<Path>, what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Config { file: file.as_ref().to_owned(), what: what.into(), hint: hint.into() }
    }

    /// An [`Error::Hub`].
    pub fn hub(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Hub { what: what.into(), hint: hint.into() }
    }

    /// An [`Error::Request`].
    pub fn request(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Request { what: what.into(), hint: hint.into() }
    }
}
