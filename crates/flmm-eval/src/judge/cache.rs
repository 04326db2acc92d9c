//! Judges' replies on disk, so that no question is paid for twice.

use std::path::{Path, PathBuf};

use flmm::{Error, Result, atomic};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// A folder with one file per reply, named by the hash of the request.
#[derive(Debug, Clone)]
pub(super) struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// Makes the folder if need be.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(|error| Error::io(folder, error))?;
        Ok(Self { folder: folder.to_owned() })
    }

    fn path(&self, request: &Value) -> PathBuf {
        let hash = Sha256::digest(request.to_string().as_bytes());
        let name = flmm::hex(hash);
        self.folder.join(name + ".json")
    }

    /// The reply to `request`, if it was asked before. A damaged file counts as none and is replaced.
    pub(super) fn get(&self, request: &Value) -> Option<String> {
        let bytes = std::fs::read(self.path(request)).ok()?;
        let entry: Value = serde_json::from_slice(&bytes).ok()?;
        (entry["request"] == *request).then(|| entry["reply"].as_str().map(str::to_owned))?
    }

    pub(super) fn put(&self, request: &Value, reply: &str) -> Result<()> {
        let entry = format!("{:#}\n", json!({ "request": request, "reply": reply }));
        atomic::write(self.path(request), |file| file.write_all(entry.as_bytes()))
    }
}
