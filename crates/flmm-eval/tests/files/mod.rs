//! Reading recorded cases.

use std::path::Path;

/// Any failure of a test: a library error, a file error, or a sentence.
pub(crate) type TestResult<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// A JSON file.
pub(crate) fn json(file: &Path) -> TestResult<serde_json::Value> {
    let text = std::fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?;
    Ok(serde_json::from_str(&text).map_err(|e| format!("{}: {e}", file.display()))?)
}
