//! Where the golden numbers lie.

use std::path::PathBuf;

/// The folder of a golden case: `$FLMM_GOLDENS`, else `../shared/goldens` beside the repository, else `fixtures`.
/// `None` if the case is in none of them.
pub(crate) fn golden_dir(case: &str) -> Option<PathBuf> {
    let repository = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
    let fixtures = repository.join("fixtures").join(case);
    let shared = repository.join("../shared/goldens");
    let chosen = match std::env::var_os("FLMM_GOLDENS") {
        Some(folder) => PathBuf::from(folder).join(case),
        None if shared.is_dir() => shared.join(case),
        None => fixtures.clone(),
    };
    if chosen.is_dir() {
        return Some(chosen);
    }
    assert!(!fixtures.is_dir(), "{} is missing, though fixtures/ has the case", chosen.display());
    None
}
