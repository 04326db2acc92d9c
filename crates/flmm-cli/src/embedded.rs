//! The default model, inside the program.

use std::path::PathBuf;

/// Name of the embedded model.
pub(crate) const NAME: &str = "flmm-tiny";

/// Files of the embedded model: path below the bundle and content. Empty in a build without `models/flmm-tiny`.
static FILES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/embedded.rs"));

/// The embedded bundle as a folder that the library can open; `None` in a build without it.
pub(crate) fn bundle() -> Option<PathBuf> {
    (!FILES.is_empty()).then(|| flmm::weights::files::embed(NAME, FILES))
}
