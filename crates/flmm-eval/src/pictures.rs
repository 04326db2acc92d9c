//! What tasks ask of pictures besides their pixels.

use std::io::Cursor;
use std::path::Path;

use flmm::{Error, Result};
use flmm_data::images::ImageStore;

/// Height and width of the picture `name`, from its header.
pub fn size(pictures: &ImageStore, name: &str) -> Result<[u32; 2]> {
    let bytes = pictures.bytes(name)?;
    let damaged = |error: String| Error::image(format!("`{name}`: {error}"), "download the picture again");
    let reader = image::ImageReader::new(Cursor::new(bytes)).with_guessed_format();
    let reader = reader.map_err(|error| damaged(error.to_string()))?;
    let (width, height) = reader.into_dimensions().map_err(|error| damaged(error.to_string()))?;
    Ok([height, width])
}

/// Whether a file or a folder (or archives that stand for it) is below `root`.
pub fn is_present(root: &Path, path: &str) -> bool {
    if root.join(path).exists() {
        return true;
    }
    let has_ending = Path::new(path).extension().is_some();
    !has_ending && ImageStore::open(root).is_ok_and(|store| store.archives(path).iter().any(Result::is_ok))
}
