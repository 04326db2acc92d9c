//! Model files on disk, and those that a program carries inside.
//!
//! [`embed`] gives files in memory a folder name below `embedded:`. Everything in this library that opens a model by
//! path also opens such a path, so that there is one way to load a model and nothing is unpacked to the disk.

use std::borrow::Cow;
use std::io::{Error as IoError, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::RwLock;

use crate::error::{Error, Result};

/// Path below the folder and content.
type Files = &'static [(&'static str, &'static [u8])];

const ROOT: &str = "embedded:";
static FOLDERS: RwLock<Vec<(PathBuf, Files)>> = RwLock::new(Vec::new());

/// Makes `files` (path with `/` below the folder, content) readable as the folder that is returned. The same name
/// given again replaces the files.
pub fn embed(name: &str, files: Files) -> PathBuf {
    let folder = Path::new(ROOT).join(name);
    let mut folders = FOLDERS.write().unwrap_or_else(std::sync::PoisonError::into_inner);
    folders.retain(|(known, _)| *known != folder);
    folders.push((folder.clone(), files));
    folder
}

/// Embedded files at or below `path`: what is left of their path, and content. `None` for a path on disk.
fn embedded(path: &Path) -> Option<Vec<(&'static Path, &'static [u8])>> {
    if !path.starts_with(ROOT) {
        return None;
    }
    let folders = FOLDERS.read().unwrap_or_else(std::sync::PoisonError::into_inner);
    let below = folders.iter().filter_map(|(folder, files)| Some((path.strip_prefix(folder).ok()?, *files)));
    let found = below.flat_map(|(below, files)| {
        files
            .iter()
            .filter_map(move |(name, bytes)| Some((Path::new(*name).strip_prefix(below).ok()?, *bytes)))
    });
    Some(found.collect())
}

/// The content of the embedded file at `path`; `None` for a path on disk.
pub(crate) fn embedded_bytes(path: &Path) -> Option<Result<&'static [u8]>> {
    let found = embedded(path)?.into_iter().find(|(rest, _)| rest.as_os_str().is_empty());
    Some(found.map(|(_, bytes)| bytes).ok_or_else(|| Error::io(path, IoError::from(ErrorKind::NotFound))))
}

/// Whether there is a file at `path`.
pub(crate) fn is_file(path: &Path) -> bool {
    embedded_bytes(path).map_or_else(|| path.is_file(), |bytes| bytes.is_ok())
}

/// Whether there is a folder at `path`.
pub(crate) fn is_dir(path: &Path) -> bool {
    match embedded(path) {
        Some(files) => files.iter().any(|(rest, _)| !rest.as_os_str().is_empty()),
        None => path.is_dir(),
    }
}

/// The whole content of a small file.
pub(crate) fn read(path: &Path) -> Result<Cow<'static, [u8]>> {
    match embedded_bytes(path) {
        Some(bytes) => bytes.map(Cow::Borrowed),
        None => std::fs::read(path).map(Cow::Owned).map_err(|e| Error::io(path, e)),
    }
}

/// The whole content of a small text file.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    String::from_utf8(read(path)?.into_owned())
        .map_err(|_| Error::io(path, IoError::new(ErrorKind::InvalidData, "not UTF-8 text")))
}

/// The files directly in a folder, in no order.
pub(crate) fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    if let Some(files) = embedded(folder) {
        let direct = files.iter().filter(|(rest, _)| rest.components().count() == 1);
        return Ok(direct.map(|(rest, _)| folder.join(rest)).collect());
    }
    let failed = |e| Error::io(folder, e);
    let entries = std::fs::read_dir(folder).map_err(failed)?.map(|entry| Ok(entry.map_err(failed)?.path()));
    Ok(entries.collect::<Result<Vec<_>>>()?.into_iter().filter(|path| path.is_file()).collect())
}

/// The folders directly in a folder, in no order.
pub(crate) fn list_folders(folder: &Path) -> Result<Vec<PathBuf>> {
    if let Some(files) = embedded(folder) {
        let first = |rest: &Path| rest.components().next().map(|name| folder.join(name));
        let below = files.iter().filter(|(rest, _)| rest.components().count() > 1);
        let mut folders: Vec<PathBuf> = below.filter_map(|(rest, _)| first(rest)).collect();
        folders.sort();
        folders.dedup();
        return Ok(folders);
    }
    let failed = |e| Error::io(folder, e);
    let entries = std::fs::read_dir(folder).map_err(failed)?.map(|entry| Ok(entry.map_err(failed)?.path()));
    Ok(entries.collect::<Result<Vec<_>>>()?.into_iter().filter(|path| path.is_dir()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn embedded_files_read_like_a_folder() -> Result<()> {
        let folder = embed("test", &[("lmm/a.json", b"{}"), ("sam/b.bin", b"1")]);
        assert!(is_dir(&folder) && is_dir(&folder.join("lmm")) && !is_dir(&folder.join("lmm/a.json")));
        assert!(is_file(&folder.join("lmm/a.json")) && !is_file(&folder.join("lmm")));
        assert_eq!(read_text(&folder.join("lmm/a.json"))?, "{}");
        assert_eq!(list(&folder.join("sam"))?, [folder.join("sam/b.bin")]);
        assert!(read(&folder.join("lmm/none")).is_err() && !is_file(Path::new("embedded:/other/lmm/a.json")));
        Ok(())
    }

    #[test]
    fn other_paths_are_on_disk() -> Result<()> {
        let folder = tempfile::tempdir().map_err(|e| Error::io("", e))?;
        let file = folder.path().join("a.txt");
        std::fs::write(&file, "text").map_err(|e| Error::io(&file, e))?;
        assert!(is_dir(folder.path()) && is_file(&file));
        assert_eq!(read_text(&file)?, "text");
        assert_eq!(list(folder.path())?, [file]);
        Ok(())
    }
}
