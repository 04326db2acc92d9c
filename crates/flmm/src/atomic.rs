//! Files that are either complete or absent, and files that one process writes at a time.

use std::fs::{File, TryLockError};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};

/// Writes `path` through a temporary file in the same folder that is renamed when complete.
///
/// A crash or an error in `fill` leaves an existing `path` as it was and no temporary file behind. The content
/// is flushed to the disk before the rename, so that a power cut cannot leave an empty file under the new name.
pub fn write(path: impl AsRef<Path>, fill: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<()> {
    let path = path.as_ref();
    let temporary = Temporary { path: temporary_name(path)? };
    let file = File::create_new(&temporary.path).map_err(|e| Error::io(path, e))?;
    let mut writer = BufWriter::with_capacity(1 << 20, file);
    let written = fill(&mut writer).and_then(|()| writer.flush()).and_then(|()| writer.get_ref().sync_all());
    written.map_err(|e| Error::io(path, e))?;
    std::fs::rename(&temporary.path, path).map_err(|e| Error::io(path, e))
}

/// Takes the lock of an open file; `false` if another process (or another handle of this one) has it.
///
/// The system gives it back when the file is closed, also when the process is killed. File systems without locks can
/// tell nothing about others: there it counts as taken.
pub fn try_lock(file: &File) -> bool {
    !matches!(file.try_lock(), Err(TryLockError::WouldBlock))
}

/// Removes its file when dropped; after a successful rename there is nothing left to remove.
struct Temporary {
    path: PathBuf,
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A name beside `path` that no other writer of this or another process uses.
fn temporary_name(path: &Path) -> Result<PathBuf> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().ok_or_else(|| {
        let reason = std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a file name");
        Error::io(path, reason)
    })?;
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    let hidden = format!(".{}.{}-{count}.tmp", name.to_string_lossy(), std::process::id());
    Ok(path.with_file_name(hidden))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_has_one_holder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let first = File::create(&path).unwrap();
        let second = File::open(&path).unwrap();
        assert!(try_lock(&first) && !try_lock(&second));
        drop(first);
        assert!(try_lock(&second));
    }

    #[test]
    fn a_failed_write_keeps_the_old_file_and_leaves_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        write(&path, |w| w.write_all(b"old")).unwrap();
        let error = write(&path, |w| {
            w.write_all(b"new")?;
            Err(std::io::Error::other("disk full"))
        });
        assert!(error.unwrap_err().to_string().contains("disk full"));
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
