//! Released checkpoints as the folders this program works with, checked against what they are for.

mod head;
mod lmm;
mod sam;

use std::path::{Path, PathBuf};

pub use head::{HeadSizesFound, HeadTarget, convert_head, examine_head, head_target};
pub use lmm::{ConvertedLmm, convert_lmm};
pub use sam::convert_sam;

use crate::error::{Error, Result};

/// What a conversion did.
#[derive(Debug, Clone)]
pub struct Converted {
    /// The weight file that was written.
    pub file: PathBuf,
    /// Tensors written.
    pub tensors: usize,
    /// Values in them, buffers left out.
    pub parameters: usize,
    /// Frozen tensors that were left out.
    pub left_out: usize,
    /// Tensors the file lacks, which the program takes from the SAM file.
    pub from_sam: Vec<String>,
}

/// Most problems that one error lists.
const MAX_LINES: usize = 20;

/// `lines` as the text of one error, shortened.
fn listed(mut lines: Vec<String>) -> String {
    let more = lines.len().saturating_sub(MAX_LINES);
    if more > 0 {
        lines.truncate(MAX_LINES);
        lines.push(format!("and {more} more"));
    }
    lines.join("\n")
}

/// A folder that is filled beside its place and moved there at the end, so that it is complete or absent.
struct Staging {
    folder: PathBuf,
}

impl Staging {
    /// Refuses a place that holds something, unless `force`.
    fn new(out: &Path, force: bool) -> Result<Self> {
        if out.is_file() {
            return Err(Error::request(
                format!("`{}` is a file, expected a folder", out.display()),
                "choose another place",
            ));
        }
        let full = out.is_dir() && std::fs::read_dir(out).map_err(|e| Error::io(out, e))?.next().is_some();
        if full && !force {
            return Err(Error::request(
                format!("the folder `{}` is not empty", out.display()),
                "choose another one, or give --force to replace the converted files in it",
            ));
        }
        let whole = std::path::absolute(out).map_err(|e| Error::io(out, e))?;
        let name = whole.file_name().ok_or_else(|| {
            Error::request(format!("`{}` cannot be written", out.display()), "name a folder inside it")
        })?;
        let folder = whole.with_file_name(format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id()));
        std::fs::create_dir_all(&folder).map_err(|e| Error::io(&folder, e))?;
        Ok(Self { folder })
    }

    /// Moves everything to `out`. A folder that is new or empty appears as a whole; into one that is not, the files are
    /// moved one by one and only files of the same names are replaced.
    fn finish(self, out: &Path) -> Result<()> {
        let empty = match std::fs::read_dir(out) {
            Ok(mut entries) => entries.next().is_none(),
            Err(_) => true,
        };
        if empty {
            // Where an empty folder cannot be replaced, it has to go first.
            let _ = std::fs::remove_dir(out);
            return std::fs::rename(&self.folder, out).map_err(|e| Error::io(out, e));
        }
        let failed = |e| Error::io(out, e);
        for entry in std::fs::read_dir(&self.folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            std::fs::rename(entry.path(), out.join(entry.file_name())).map_err(failed)?;
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
