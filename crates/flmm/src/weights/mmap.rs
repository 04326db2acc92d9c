//! Read-only memory maps of checkpoint files.

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::error::{Error, Result};

/// Maps `path` for reading; an empty file is an error.
#[allow(unsafe_code)]
pub(super) fn map(path: &Path) -> Result<Mmap> {
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
    unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))
}
