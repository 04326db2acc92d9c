//! The user's picture and the files written next to it.

use std::path::{Path, PathBuf};

use image::RgbImage;

use crate::failure::{Failure, Result};

/// Reads the picture.
pub(crate) fn read(path: &Path) -> Result<RgbImage> {
    Ok(flmm::image_input::read_image(path)?)
}

/// Where to write: `given`, or next to `image` with `ending` (`photo.jpg` → `photo.overlay.png`). Checked before
/// anything is computed: the folder must exist, the place must not be a folder or the picture itself.
pub(crate) fn destination(image: &Path, given: Option<&Path>, ending: &str) -> Result<PathBuf> {
    let path = match given {
        Some(path) => path.to_owned(),
        None => {
            let stem = image.file_stem().unwrap_or(image.as_os_str()).to_string_lossy();
            image.with_file_name(format!("{stem}.{ending}"))
        }
    };
    check_place(&path)?;
    if let (Ok(a), Ok(b)) = (path.canonicalize(), image.canonicalize())
        && a == b
    {
        return Err(Failure::usage(
            format!("`{}` is the picture itself", path.display()),
            "write the result to another file",
        ));
    }
    Ok(path)
}

/// Whether a file can be put at `path`.
pub(crate) fn check_place(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Err(Failure::usage(format!("`{}` is a folder", path.display()), "name a file to write"));
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match folder.is_dir() {
        true => Ok(()),
        false => Err(Failure::usage(
            format!("`{}` cannot be written: there is no folder `{}`", path.display(), folder.display()),
            "make the folder first",
        )),
    }
}
