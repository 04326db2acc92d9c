//! One file or folder of a repository: a SAM checkpoint, a grounding head.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::cache::{self, RepoCache, State};
use super::repo::{RepoId, is_plain};
use super::select::Selection;
use super::{Hub, Plan};
use crate::error::{Error, Result};
use crate::weights::is_weight_file;

/// Part of a repository: `org/name`, `org/name@revision`, and with `:path` a file or folder in it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PartId {
    repo: RepoId,
    /// Below the repository, with `/`; empty: the repository itself.
    path: String,
}

impl PartId {
    /// The repository.
    pub fn repo(&self) -> &RepoId {
        &self.repo
    }

    /// File or folder below the repository; empty for the repository itself.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The files among `listed`, the paths of all files of the repository, that the part needs: a file with the
    /// configuration beside it, or the weights and configurations of a folder.
    fn selection<'a>(&self, listed: impl Iterator<Item = &'a str> + Clone) -> Selection {
        let is_file = listed.clone().any(|file| file == self.path);
        let folder = match self.path.rsplit_once('/') {
            _ if !is_file => self.path.as_str(),
            Some((folder, _)) => folder,
            None => "",
        };
        let prefix = if folder.is_empty() { String::new() } else { format!("{folder}/") };
        let inside = listed.filter_map(|file| file.strip_prefix(&prefix)).filter(|name| !name.contains('/'));
        let chosen = match is_file {
            true => Selection::of_file(&self.path[prefix.len()..], inside),
            false => Selection::of(inside),
        };
        chosen.below(&prefix)
    }

    /// Where the part lies in the snapshot `folder`.
    fn place(&self, folder: &Path) -> PathBuf {
        if self.path.is_empty() { folder.to_owned() } else { folder.join(&self.path) }
    }
}

impl FromStr for PartId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let (repo, path) = text.split_once(':').unwrap_or((text, ""));
        let path = path.strip_suffix('/').unwrap_or(path);
        // More likely a mistyped path than a repository that is called as a file is.
        if path.is_empty() && is_weight_file(Path::new(repo)) {
            return Err(Error::request(
                format!("`{repo}` is a file, not a repository"),
                "check the path, or write org/name:file",
            ));
        }
        if !path.is_empty() && !path.split('/').all(is_plain) {
            return Err(Error::request(
                format!("`{path}` is not a path in a repository"),
                "write org/name:folder/file, without `..` and special characters",
            ));
        }
        Ok(Self { repo: repo.parse()?, path: path.to_owned() })
    }
}

impl fmt::Display for PartId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.path.as_str() {
            "" => self.repo.fmt(f),
            path => write!(f, "{}:{path}", self.repo),
        }
    }
}

impl Hub {
    /// As [`Hub::plan`], for a part of a repository. [`Hub::download`] brings it, and [`Plan::place`] tells where it is.
    ///
    /// A file that is in the cache is used without asking the hub. What belongs to a folder, or which file of a repository is
    /// meant, is for the hub to say; where it cannot be asked, what is in the cache is taken.
    ///
    /// # Errors
    /// As [`Hub::plan`], and [`Error::Hub`] if the repository has no such file or folder or no weights there, naming
    /// those that it has.
    pub fn plan_part(&self, part: &PartId) -> Result<Plan> {
        let cache = RepoCache::new(&self.settings.cache, &part.repo);
        if let Some(commit) = cache.commit(&part.repo) {
            let folder = cache.snapshot(&commit);
            let files = cache::files_below(&folder, part.path());
            let chosen = part.selection(files.iter().map(String::as_str));
            let state = cache::state_of(&folder, &chosen);
            if !matches!(state, State::Incomplete(_)) {
                let named = files.iter().any(|file| file == part.path());
                let (repo, own) = (part.repo.clone(), Some(part.clone()));
                let here = Plan { repo, commit, folder, listing: None, part: own };
                return match named || matches!(state, State::Complete) || self.settings.offline {
                    true => Ok(here),
                    // Some weights are here, maybe of another command: what is meant is for the hub to say, if it can.
                    false => Ok(self
                        .list(&part.repo, &[])
                        .map_or(here, |plan| Plan { part: Some(part.clone()), ..plan })),
                };
            }
        }
        let missing = match part.path.is_empty() {
            true => ["the weights".to_owned()],
            false => [part.path.clone()],
        };
        if self.settings.offline {
            return Err(self.absent(&part.repo, &missing, "the hub may not be asked (HF_HUB_OFFLINE)"));
        }
        let plan = self.list(&part.repo, &missing)?;
        Ok(Plan { part: Some(part.clone()), ..plan })
    }
}

impl Plan {
    /// The file or folder asked for: of a part its place in the repository's folder, else that folder.
    pub fn place(&self) -> PathBuf {
        self.part.as_ref().map_or_else(|| self.folder.clone(), |part| part.place(&self.folder))
    }

    /// The files among `listing` that are wanted; fails if there are no weights among them.
    pub(super) fn selection(&self, listing: &BTreeMap<String, Option<u64>>) -> Result<Selection> {
        let files = listing.keys().map(String::as_str);
        let Some(part) = &self.part else {
            let chosen = Selection::of(files);
            return match chosen.has_weights() {
                true => Ok(chosen),
                false => Err(Error::hub(
                    format!("{}: no weights in this repository that flmm can read", self.repo),
                    "choose a repository with .safetensors or PyTorch .bin files; GGUF and others are not supported",
                )),
            };
        };
        let chosen = part.selection(files.clone());
        if chosen.has_weights() {
            return Ok(chosen);
        }
        let is_folder = files.clone().any(|file| file.starts_with(&format!("{}/", part.path)));
        let what = match part.path.as_str() {
            "" => format!("{}: not one file with weights, but none or several", self.repo),
            path if is_folder => format!("{}: not one file with weights in `{path}`", self.repo),
            path => format!("{}: there is no `{path}` in this repository", self.repo),
        };
        let known: Vec<String> = files
            .filter(|file| is_weight_file(Path::new(file)))
            .take(8)
            .map(|file| format!("{}:{file}", self.repo))
            .collect();
        let hint = match known.is_empty() {
            true => "the repository has no .safetensors or PyTorch files".to_owned(),
            false => format!("name one: {}", known.join(", ")),
        };
        Err(Error::hub(what, hint))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        for (text, repo, path) in [
            ("a/b", "a/b", ""),
            ("a/b@v1", "a/b@v1", ""),
            ("a/b:x/y.pth", "a/b", "x/y.pth"),
            ("a/b@refs/pr/1:head", "a/b@refs/pr/1", "head"),
        ] {
            let part: PartId = text.parse().unwrap();
            assert_eq!((part.repo().to_string().as_str(), part.path()), (repo, path));
            assert_eq!(part.to_string(), text);
        }
        assert_eq!("a/b:head/".parse::<PartId>().unwrap().path(), "head");
        for text in ["a", "a/b:../c", "a/b:/c", "a/b:x//y", "C:\\a/b", "a/b:x:y", "./a.pth", "sam/a.pth"] {
            assert!(text.parse::<PartId>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_part_needs_its_own_files_only() {
        let files = [
            "README.md",
            "checkpoints/sam_config.json",
            "checkpoints/sam_vit_b.pth",
            "checkpoints/sam_vit_l.pth",
            "head/head.json",
            "head/head.safetensors",
            "head/old/head.safetensors",
        ];
        let of = |text: &str| text.parse::<PartId>().unwrap().selection(files.into_iter());
        let chosen = of("a/b:checkpoints/sam_vit_l.pth");
        assert_eq!(chosen.weights, ["checkpoints/sam_vit_l.pth"]);
        assert_eq!(chosen.small, ["checkpoints/sam_config.json"]);
        let chosen = of("a/b:head");
        assert_eq!(
            (chosen.weights, chosen.small),
            (vec!["head/head.safetensors".into()], vec!["head/head.json".into()])
        );
        for text in ["a/b", "a/b:checkpoints", "a/b:none", "a/b:README.md"] {
            assert!(!of(text).has_weights(), "{text}");
        }
    }
}
