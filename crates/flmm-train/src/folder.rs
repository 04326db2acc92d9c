//! A run's folder belongs to one process at a time.

use std::fs::File;
use std::path::{Path, PathBuf};

use flmm::{Error, Result, atomic};

const LOCK: &str = ".lock";

/// The right to write in a run's folder; given back when dropped, and by the system when the process ends.
pub(crate) struct RunFolder {
    _lock: File,
    /// Where checkpoints lie.
    pub(crate) checkpoints: PathBuf,
}

impl RunFolder {
    /// Takes the folder, creating it where needed, and removes what a killed process left unfinished.
    ///
    /// # Errors
    /// [`Error::Request`] if another process trains there, [`Error::Io`].
    pub(crate) fn take(dir: &Path) -> Result<Self> {
        let checkpoints = dir.join("checkpoints");
        std::fs::create_dir_all(&checkpoints).map_err(|e| Error::io(&checkpoints, e))?;
        let path = dir.join(LOCK);
        let lock = File::options().create(true).truncate(false).write(true).open(&path);
        let lock = lock.map_err(|e| Error::io(&path, e))?;
        if !atomic::try_lock(&lock) {
            let what = format!("another process trains in {}", dir.display());
            return Err(Error::request(what, "wait for it, stop it, or name another folder"));
        }
        for folder in [dir, &checkpoints] {
            remove_unfinished(folder)?;
        }
        Ok(Self { _lock: lock, checkpoints })
    }
}

/// Removes `.NAME.tmp`, under which files and folders lie until they are complete.
fn remove_unfinished(folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
        let path = entry.map_err(|e| Error::io(folder, e))?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if name.starts_with('.') && name.ends_with(".tmp") {
            let removed =
                if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
            removed.map_err(|e| Error::io(&path, e))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_trainer_and_no_leftovers() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("checkpoints/.step-0000003.77.tmp")).unwrap();
        std::fs::write(dir.path().join("checkpoints/.step-0000003.77.tmp/a"), b"x").unwrap();
        std::fs::write(dir.path().join(".metrics.jsonl.77-0.tmp"), b"x").unwrap();
        std::fs::write(dir.path().join(".mine"), b"x").unwrap();
        let first = RunFolder::take(dir.path()).unwrap();
        assert_eq!(std::fs::read_dir(&first.checkpoints).unwrap().count(), 0);
        assert!(dir.path().join(".mine").exists() && !dir.path().join(".metrics.jsonl.77-0.tmp").exists());
        let second = RunFolder::take(dir.path()).err().unwrap().to_string();
        assert!(second.contains("another process trains"), "{second}");
        drop(first);
        RunFolder::take(dir.path()).unwrap();
    }
}
