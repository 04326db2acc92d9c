//! Grounded conversation generation: captions with one mask per phrase, GranD-f's files (`evaluation.md` §4).

use crate::coco::{Segmentation, in_file, malformed, read_json};
use crate::mask::Mask;
use flmm::Result;
use hotcoco::types::Rle;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// A caption file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct CaptionFile {
    #[serde(default)]
    pub info: serde_json::Map<String, serde_json::Value>,
    pub images: Vec<GcgImage>,
    pub annotations: Vec<Caption>,
}

/// A picture; its file is `<id>.jpg`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct GcgImage {
    pub id: u64,
    pub height: u32,
    pub width: u32,
}

/// The caption of a picture.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Caption {
    /// Its id.
    pub id: u64,
    /// Which picture.
    pub image_id: u64,
    /// The text.
    pub caption: String,
    /// Its phrases, in the order of the masks.
    pub labels: Vec<String>,
}

/// A mask file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct MaskFile {
    #[serde(default)]
    pub info: serde_json::Map<String, serde_json::Value>,
    pub images: Vec<GcgImage>,
    pub annotations: Vec<PhraseMask>,
}

/// The mask of one phrase.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct PhraseMask {
    pub id: u64,
    pub image_id: u64,
    /// Always 1.
    pub category_id: u64,
    pub segmentation: Segmentation,
    pub area: f64,
    /// x, y, width, height.
    pub bbox: [f64; 4],
    pub iscrowd: u8,
}

/// A split with captions and masks joined.
pub struct Gcg {
    /// In the order of the caption file.
    pub samples: Vec<GcgSample>,
    mask_file: PathBuf,
}

/// One captioned picture.
#[derive(Debug, Clone)]
pub struct GcgSample {
    /// Its picture is `<image_id>.jpg`.
    pub image_id: u64,
    /// Height and width.
    pub size: [u32; 2],
    /// The text.
    pub caption: String,
    /// Its phrases.
    pub phrases: Vec<String>,
    masks: Vec<Segmentation>,
}

impl Gcg {
    /// Opens a split. An error if a picture is unknown or has not as many masks as phrases.
    pub fn open(captions: &Path, masks: &Path) -> Result<Self> {
        let hint = "the caption file and the mask file must belong together";
        let file: CaptionFile = read_json(captions)?;
        let sizes: HashMap<u64, [u32; 2]> = file.images.iter().map(|i| (i.id, [i.height, i.width])).collect();
        let mut by_image: HashMap<u64, Vec<Segmentation>> = HashMap::new();
        for annotation in read_json::<MaskFile>(masks)?.annotations {
            by_image.entry(annotation.image_id).or_default().push(annotation.segmentation);
        }
        let mut samples = Vec::with_capacity(file.annotations.len());
        for caption in file.annotations {
            let id = caption.image_id;
            let unknown =
                || malformed(captions, format!("caption {}: unknown picture {id}", caption.id), hint);
            let size = *sizes.get(&id).ok_or_else(unknown)?;
            let found = by_image.get(&id).cloned().unwrap_or_default();
            if found.len() != caption.labels.len() {
                let what =
                    format!("picture {id} has {} masks for {} phrases", found.len(), caption.labels.len());
                return Err(malformed(masks, what, hint));
            }
            let (caption, phrases) = (caption.caption, caption.labels);
            samples.push(GcgSample { image_id: id, size, caption, phrases, masks: found });
        }
        Ok(Self { samples, mask_file: masks.to_owned() })
    }

    /// Opens `val` or `test` below a data root in the reference's layout.
    pub fn open_split(root: &Path, split: &str) -> Result<Self> {
        let folder = root.join("GranDf").join("val_test");
        let file = |kind: &str| folder.join(format!("{split}_gcg_coco_{kind}_gt.json"));
        Self::open(&file("caption"), &file("mask"))
    }

    /// The masks of a sample's phrases as run lengths.
    pub fn runs(&self, sample: &GcgSample) -> Result<Vec<Rle>> {
        let [height, width] = sample.size;
        let runs: Result<Vec<Rle>> = sample.masks.iter().map(|mask| mask.to_rle(height, width)).collect();
        runs.map_err(|error| in_file(&self.mask_file, format!("picture {}", sample.image_id), error))
    }

    /// The masks of a sample's phrases.
    pub fn masks(&self, sample: &GcgSample) -> Result<Vec<Mask>> {
        let decode = |mask: &Segmentation| mask.to_mask(sample.size[0], sample.size[1]);
        let masks: Result<Vec<Mask>> = sample.masks.iter().map(decode).collect();
        masks.map_err(|error| in_file(&self.mask_file, format!("picture {}", sample.image_id), error))
    }
}
