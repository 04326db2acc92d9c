//! Where the golden numbers lie.
#![allow(dead_code, unreachable_pub, reason = "every test file uses its own part")]

use std::path::{Path, PathBuf};

/// Any failure of a test: a library error, a file error, or a sentence.
pub type TestResult<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// The folder of a golden case: below `$FLMM_GOLDENS` if set, else below `../shared/goldens` beside the repository if
/// that exists; where the case is not there, below the repository's `fixtures/`.
///
/// `None` (the test is skipped) only if the case is in neither place.
pub fn golden_dir(case: &str) -> Option<PathBuf> {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let shared = repository.join("../shared/goldens");
    let first = match std::env::var_os("FLMM_GOLDENS") {
        Some(folder) => PathBuf::from(folder),
        None if shared.is_dir() => shared,
        None => repository.join("fixtures"),
    };
    [first, repository.join("fixtures")]
        .into_iter()
        .map(|folder| folder.join(case))
        .find(|folder| folder.is_dir())
}

/// A JSON file.
pub fn json(file: &Path) -> TestResult<serde_json::Value> {
    let text = std::fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?;
    Ok(serde_json::from_str(&text).map_err(|e| format!("{}: {e}", file.display()))?)
}
