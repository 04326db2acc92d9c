//! The pictures of a data root.

use std::path::{Path, PathBuf};

use flmm::Result;
use image::RgbImage;

/// Pictures below a data root, by their path relative to it.
#[derive(Debug, Clone)]
pub struct Pictures {
    root: PathBuf,
}

impl Pictures {
    /// The pictures below `root`.
    pub fn open(root: &Path) -> Result<Self> {
        Ok(Self { root: root.to_owned() })
    }

    /// Reads and decodes `path`, for example `coco/train2014/COCO_train2014_000000000009.jpg`.
    pub fn read(&self, path: &str) -> Result<RgbImage> {
        flmm::image_input::read_image(self.root.join(path))
    }
}

/// Whether a file or folder is below `root`.
pub fn is_present(root: &Path, path: &str) -> bool {
    root.join(path).exists()
}
