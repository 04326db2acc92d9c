//! The cache on disk, exactly as the `huggingface_hub` library lays it out, so that both can use each other's files:
//!
//! ```text
//! models--org--name/refs/main                     the commit that a branch or tag stands for
//! models--org--name/blobs/ETAG                    the files by content
//! models--org--name/blobs/ETAG.incomplete         what has come so far of a file
//! models--org--name/snapshots/COMMIT/config.json  links into blobs/, under the files' names
//! .locks/models--org--name/ETAG.lock              who is downloading
//! ```

use std::fs::File;
use std::path::{Path, PathBuf};

use super::repo::RepoId;
use super::select::Selection;
use crate::error::{Error, Result};
use crate::weights::checkpoint_files;

/// A repository's folder in the cache.
#[derive(Debug, Clone)]
pub(super) struct RepoCache {
    folder: PathBuf,
    locks: PathBuf,
}

/// What a snapshot in the cache holds.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum State {
    /// All that a model needs.
    Complete,
    /// Weights, but perhaps not all that the repository has.
    Doubtful,
    /// Not all weights; what is missing.
    Incomplete(Vec<String>),
}

impl RepoCache {
    pub(super) fn new(cache: &Path, repo: &RepoId) -> Self {
        let name = repo.folder();
        Self { locks: cache.join(".locks").join(&name), folder: cache.join(name) }
    }

    /// The commit that the revision stood for when it was last looked up.
    pub(super) fn commit(&self, repo: &RepoId) -> Option<String> {
        if repo.is_commit() {
            return Some(repo.revision().to_owned());
        }
        let commit = std::fs::read_to_string(self.folder.join("refs").join(repo.revision())).ok()?;
        Some(commit.trim().to_owned()).filter(|commit| super::repo::is_plain(commit))
    }

    /// Notes the commit of a branch or tag.
    pub(super) fn set_commit(&self, repo: &RepoId, commit: &str) -> Result<()> {
        if repo.is_commit() || self.commit(repo).as_deref() == Some(commit) {
            return Ok(());
        }
        let file = self.folder.join("refs").join(repo.revision());
        create_parent(&file)?;
        crate::atomic::write(&file, |out| out.write_all(commit.as_bytes()))
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    pub(super) fn incomplete(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// Waits until no other process downloads the blob; the lock is held until the result is dropped.
    pub(super) fn lock(&self, etag: &str) -> Result<File> {
        let path = self.locks.join(format!("{etag}.lock"));
        create_parent(&path)?;
        let file = File::options().create(true).append(true).open(&path).map_err(|e| Error::io(&path, e))?;
        match file.lock() {
            // Some network disks have no locks; then two downloads of one file at once cost only a failed check.
            Err(error) if error.kind() != std::io::ErrorKind::Unsupported => Err(Error::io(&path, error)),
            _ => Ok(file),
        }
    }

    /// Gives the blob `etag` the name `file` in the snapshot of `commit`.
    pub(super) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<()> {
        let link = self.snapshot(commit).join(file);
        create_parent(&link)?;
        let up = "../".repeat(2 + file.matches('/').count());
        let target = PathBuf::from(format!("{up}blobs/{etag}"));
        if std::fs::read_link(&link).is_ok_and(|old| old == target) {
            return Ok(());
        }
        if let Err(error) = std::fs::remove_file(&link)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            return Err(Error::io(&link, error));
        }
        point(&target, &link, &self.blob(etag)).map_err(|e| Error::io(&link, e))
    }
}

#[cfg(unix)]
fn point(target: &Path, link: &Path, _blob: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

/// Elsewhere links need rights that users rarely have: a second name for the file, else a copy.
#[cfg(not(unix))]
fn point(_target: &Path, link: &Path, blob: &Path) -> std::io::Result<()> {
    std::fs::hard_link(blob, link).or_else(|_| std::fs::copy(blob, link).map(drop))
}

pub(super) fn create_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).map_err(|e| Error::io(parent, e))
}

/// Files in `folder` and in the folders directly in it, as paths with `/`. Links that lead nowhere are left out.
pub(super) fn files(folder: &Path) -> Vec<String> {
    let entries = |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path());
    let name = |path: &Path| path.file_name().and_then(|n| n.to_str()).map(str::to_owned);
    let mut found = Vec::new();
    for path in entries(folder) {
        let Some(outer) = name(&path) else { continue };
        if path.is_file() {
            found.push(outer);
        } else if path.is_dir() {
            let inner = entries(&path).filter(|path| path.is_file());
            found.extend(inner.filter_map(|path| Some(format!("{outer}/{}", name(&path)?))));
        }
    }
    found
}

/// Files in the snapshot `folder` that are `path`, or beside it, or in it, as paths with `/` below the snapshot.
pub(super) fn files_below(folder: &Path, path: &str) -> Vec<String> {
    let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
    let inside = |within: &str| {
        let entries = std::fs::read_dir(folder.join(within)).into_iter().flatten().flatten();
        let files = entries.map(|entry| entry.path()).filter(|path| path.is_file());
        let names = files.filter_map(|path| path.file_name()?.to_str().map(str::to_owned));
        let prefix = if within.is_empty() { String::new() } else { format!("{within}/") };
        names.map(|name| format!("{prefix}{name}")).collect::<Vec<_>>()
    };
    let mut found = inside(parent);
    if path != parent {
        found.extend(inside(path));
    }
    found
}

/// What the snapshot in `folder` holds, judged without the network.
pub(super) fn state(folder: &Path) -> State {
    let files = files(folder);
    state_of(folder, &Selection::of(files.iter().map(String::as_str)))
}

/// How much of the files `chosen` the snapshot in `folder` holds.
pub(super) fn state_of(folder: &Path, chosen: &Selection) -> State {
    if !chosen.has_weights() {
        let what = if chosen.small.is_empty() { "all files" } else { "the weights" };
        return State::Incomplete(vec![what.to_owned()]);
    }
    let mut missing = Vec::new();
    for index in chosen.indexes() {
        match checkpoint_files(folder.join(index)) {
            Ok(shards) => missing.extend(
                shards
                    .iter()
                    .filter(|shard| !shard.is_file())
                    .filter_map(|s| s.strip_prefix(folder).ok()?.to_str().map(str::to_owned)),
            ),
            Err(_) => missing.push(index.to_owned()),
        }
    }
    if !missing.is_empty() {
        return State::Incomplete(missing);
    }
    match chosen.hollow.is_empty() && chosen.has_small("tokenizer.json") {
        true => State::Complete,
        false => State::Doubtful,
    }
}
