//! The bytes of checkpoint files: read-only memory maps, or embedded.

use std::fs::File;
use std::ops::Deref;
use std::path::Path;

use memmap2::Mmap;

use super::files;
use crate::error::{Error, Result};

/// The content of a checkpoint file.
pub(super) enum Bytes {
    Mapped(Mmap),
    Embedded(&'static [u8]),
}

/// So much is read before its memory is given back.
const RELEASE_EVERY: u64 = 64 << 20;

impl Bytes {
    /// Hands on what it is told was read, and now and then gives the memory of it back to the system.
    ///
    /// Without this a process that copies tensors out of a map would hold every weight twice.
    pub(super) fn releasing<'a>(&'a self, read: &'a mut dyn FnMut(u64)) -> impl FnMut(u64) + 'a {
        let mut held = 0;
        move |count| {
            held += count;
            if held >= RELEASE_EVERY {
                self.release();
                held = 0;
            }
            read(count);
        }
    }

    /// Drops the pages of the map from memory; reading them again reads the file again.
    #[allow(unsafe_code)]
    fn release(&self) {
        #[cfg(unix)]
        if let Self::Mapped(map) = self {
            // SAFETY: the map is read-only and backed by its file, so a dropped page comes back with the same bytes.
            // Advice that the system refuses changes nothing.
            let _ = unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
        }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Embedded(bytes) => bytes,
        }
    }
}

/// Maps `path` for reading, unless it is embedded; an empty file is an error.
#[allow(unsafe_code)]
pub(super) fn map(path: &Path) -> Result<Bytes> {
    if let Some(bytes) = files::embedded_bytes(path) {
        return bytes.map(Bytes::Embedded);
    }
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let length = file.metadata().map_err(|e| Error::io(path, e))?;
    if length.is_dir() {
        return Err(Error::weights(path, "this is a folder, expected a file", "name a file inside it"));
    }
    if length.len() == 0 {
        return Err(Error::weights(path, "the file is empty", "download or copy the file again"));
    }
    // SAFETY: the map is read-only and private to this process. As with every mapped file, another process that
    // shortens the file while it is read would break the contract; checkpoints are written once (flmm itself
    // renames complete files into place and never edits them).
    unsafe { Mmap::map(&file) }.map(Bytes::Mapped).map_err(|e| Error::io(path, e))
}
