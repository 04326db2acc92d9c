//! What a model is called on the hub.

use std::fmt;
use std::str::FromStr;

use crate::error::Error;

/// A model repository and one of its revisions: `org/name` or `org/name@revision`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RepoId {
    org: String,
    name: String,
    revision: String,
}

impl RepoId {
    /// The branch that is meant where no revision is named.
    pub const MAIN: &'static str = "main";

    /// `org/name`, without the revision.
    pub fn id(&self) -> String {
        format!("{}/{}", self.org, self.name)
    }

    /// A branch, a tag or a commit.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// Name of the repository's folder in the cache: `models--org--name`.
    pub(super) fn folder(&self) -> String {
        format!("models--{}--{}", self.org, self.name)
    }

    /// Whether the revision is a whole commit id, which never changes its content.
    pub(super) fn is_commit(&self) -> bool {
        is_hex(&self.revision, 40)
    }
}

/// Whether `text` is `length` lower-case hexadecimal digits.
pub(super) fn is_hex(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Whether `part` can be one name in a path and nothing more: no separator, no `..`, nothing hidden.
pub(super) fn is_plain(part: &str) -> bool {
    let known = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'+');
    !part.is_empty() && part.len() <= 200 && !part.starts_with('.') && part.bytes().all(known)
}

impl FromStr for RepoId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let (id, revision) = text.split_once('@').unwrap_or((text, Self::MAIN));
        // A revision may be several names deep (`refs/pr/1`); it becomes a path below `refs/` in the cache.
        let repo = id.split_once('/').filter(|(org, name)| {
            is_plain(org) && is_plain(name) && !id.contains("--") && revision.split('/').all(is_plain)
        });
        let (org, name) = repo.ok_or_else(|| {
            Error::request(
                format!("`{text}` is not the name of a repository"),
                "write org/name or org/name@revision, for example llava-hf/llava-1.5-7b-hf",
            )
        })?;
        Ok(Self { org: org.to_owned(), name: name.to_owned(), revision: revision.to_owned() })
    }
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.revision.as_str() {
            Self::MAIN => write!(f, "{}/{}", self.org, self.name),
            revision => write!(f, "{}/{}@{revision}", self.org, self.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        let repo: RepoId = "llava-hf/llava-1.5-7b-hf".parse().unwrap();
        assert_eq!((repo.id().as_str(), repo.revision()), ("llava-hf/llava-1.5-7b-hf", "main"));
        assert_eq!(repo.folder(), "models--llava-hf--llava-1.5-7b-hf");
        assert_eq!(repo.to_string(), "llava-hf/llava-1.5-7b-hf");
        let pinned: RepoId = "a/b@refs/pr/1".parse().unwrap();
        assert_eq!((pinned.to_string().as_str(), pinned.is_commit()), ("a/b@refs/pr/1", false));
        assert!(
            format!("a/b@{}", "0123456789abcdef0123456789abcdef01234567")
                .parse::<RepoId>()
                .unwrap()
                .is_commit()
        );
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for text in [
            "model",
            "a/b/c",
            "./model",
            "../model",
            "/model",
            "a/",
            "a/..",
            "a/b@",
            "a/b@../../c",
            "a/b@x//y",
            "a b/c",
            "a/b--c",
            "C:\\model",
            "a/b?x",
            "",
        ] {
            assert!(text.parse::<RepoId>().is_err(), "{text}");
        }
    }
}
