//! Pictures to the pixel tensors that vision towers read.
//!
//! LLaVA, HPT and DeepSeek-VL resize the longer side to the tower's input and pad to a square; Mini-Gemini pads
//! at the original size; SAM resizes with another filter and rounding. The 8-bit results equal the published
//! preprocessing bit for bit.

use std::path::Path;

use candle_core::{Device, Tensor};
use image::{Rgb, RgbImage};
use serde_json::Value;

pub use super::resample::{Filter, pillow_resize};
use crate::error::{Error, Result};
use crate::geometry::Geometry;

/// Raised whenever pixels of the same picture change: feature caches of another version are refused.
pub const VERSION: u32 = 1;

/// Per-channel mapping of bytes to the numbers a tower was trained on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normalisation {
    /// Factor on the byte, in f64 (normally 1/255).
    pub rescale: f64,
    /// Subtracted from the rescaled value.
    pub mean: [f32; 3],
    /// Divides what is left.
    pub std: [f32; 3],
}

#[allow(clippy::excessive_precision, reason = "digits as published")]
impl Normalisation {
    /// What CLIP towers expect.
    pub const CLIP: Self = Self {
        rescale: 1.0 / 255.0,
        mean: [0.48145466, 0.4578275, 0.40821073],
        std: [0.26862954, 0.26130258, 0.27577711],
    };
    /// What SigLIP towers expect: −1 to 1.
    pub const HALF: Self = Self { rescale: 1.0 / 255.0, mean: [0.5; 3], std: [0.5; 3] };
    /// What SAM expects: bytes are not rescaled.
    pub const SAM: Self =
        Self { rescale: 1.0, mean: [123.675, 116.28, 103.53], std: [58.395, 57.12, 57.375] };
    /// Bytes to 0..1 and nothing else.
    pub const NONE: Self = Self { rescale: 1.0 / 255.0, mean: [0.0; 3], std: [1.0; 3] };

    /// The picture as `[3, height, width]` f32.
    ///
    /// The product with `rescale` is rounded from f64 to f32, the rest is f32 arithmetic, as in the published
    /// preprocessing.
    pub fn apply(&self, image: &RgbImage) -> Result<Tensor> {
        let (width, height) = (image.width() as usize, image.height() as usize);
        let mut values = Vec::with_capacity(3 * width * height);
        for channel in 0..3 {
            let table = self.table(channel);
            values
                .extend(image.as_raw().iter().skip(channel).step_by(3).map(|&byte| table[usize::from(byte)]));
        }
        Ok(Tensor::from_vec(values, (3, height, width), &Device::Cpu)?)
    }

    /// What `preprocessor_config.json` of the folder `dir` says; missing values are CLIP's.
    ///
    /// # Errors
    /// As [`LlavaProcessor::from_config`].
    pub fn from_config(dir: impl AsRef<Path>) -> Result<Self> {
        Ok(ProcessorConfig::read(dir.as_ref())?.normalisation)
    }

    /// The value of every byte.
    fn table(&self, channel: usize) -> [f32; 256] {
        let (mean, std) = (self.mean[channel], self.std[channel]);
        std::array::from_fn(|byte| ((byte as f64 * self.rescale) as f32 - mean) / std)
    }

    /// The mean as a colour, `int(mean · 255)` per channel: what squares are padded with.
    pub fn background(&self) -> [u8; 3] {
        self.mean.map(|mean| (f64::from(mean) * 255.0) as u8)
    }
}

/// How the longer side is brought to the tower's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SizeRule {
    /// `int(short · side / long)`: LLaVA and HPT.
    MultiplyFirst,
    /// `max(int(length / long · side), least)` for both sides: DeepSeek-VL.
    DivideFirst {
        /// Shortest side allowed.
        least: usize,
    },
}

/// Resizes so that the longer side fits, pads to a square, normalises: LLaVA-1.5, HPT-Air, DeepSeek-VL
/// (`spec/models.md` §5, §7, §9). Not the stock LLaVA processing, which pads first.
#[derive(Debug, Clone, PartialEq)]
pub struct LlavaProcessor {
    side: usize,
    rule: SizeRule,
    background: [u8; 3],
    normalisation: Normalisation,
}

impl LlavaProcessor {
    /// For a tower that reads `side × side`; squares are padded with the mean colour.
    pub fn new(side: usize, rule: SizeRule, normalisation: Normalisation) -> Self {
        Self { side, rule, background: normalisation.background(), normalisation }
    }

    /// The same with another padding colour.
    pub fn with_background(mut self, background: [u8; 3]) -> Self {
        self.background = background;
        self
    }

    /// The same for a tower that reads `side × side`.
    pub fn with_side(mut self, side: usize) -> Self {
        self.side = side;
        self
    }

    /// Reads `preprocessor_config.json` of the folder `dir`: the side from `crop_size`, else `size`; `image_mean`
    /// and `image_std`; missing values are CLIP's.
    ///
    /// # Errors
    /// [`Error::Io`] if the file is missing; [`Error::Config`] if it is no JSON object, has no square size, or a
    /// mean or deviation that is not three usable numbers.
    pub fn from_config(dir: impl AsRef<Path>) -> Result<Self> {
        let config = ProcessorConfig::read(dir.as_ref())?;
        Ok(Self::new(config.side, SizeRule::MultiplyFirst, config.normalisation))
    }

    /// Reads `preprocessor_config.json` of a DeepSeek-VL folder: the side from `image_size`, the shortest side allowed
    /// from `min_size` (14 where it is left out), `image_mean`, `image_std` and `do_normalize`.
    ///
    /// Squares are padded with the mean colour, whether or not pixels are normalised with it.
    ///
    /// # Errors
    /// As [`LlavaProcessor::from_config`].
    pub fn from_vlm_config(dir: impl AsRef<Path>) -> Result<Self> {
        let config = ProcessorConfig::read(dir.as_ref())?;
        let least = match config.json.get("min_size") {
            None | Some(Value::Null) => 14,
            Some(value) => {
                value.as_u64().filter(|least| (1..=config.side as u64).contains(least)).ok_or_else(|| {
                    let what = format!(
                        "`min_size` is {value}, expected a number of pixels from 1 to {}",
                        config.side
                    );
                    Error::config(&config.file, what, "download the file again")
                })? as usize
            }
        };
        let processor = Self::new(config.side, SizeRule::DivideFirst { least }, config.normalisation);
        Ok(processor.with_background(config.background))
    }

    /// Side of the square in pixels.
    pub fn side(&self) -> usize {
        self.side
    }

    /// `[3, side, side]` f32 and where the picture lies in it, in pixels of the square.
    ///
    /// # Errors
    /// [`Error::Image`] if the picture is empty or so elongated that its short side would vanish.
    pub fn process(&self, image: &RgbImage) -> Result<(Tensor, Geometry)> {
        let (square, geometry) = self.square(image)?;
        Ok((self.normalisation.apply(&square)?, geometry))
    }

    /// The 8-bit square before normalisation.
    pub fn square(&self, image: &RgbImage) -> Result<(RgbImage, Geometry)> {
        let original = size(image);
        let geometry = self.geometry(original)?;
        let (height, width) = geometry.image_shape;
        let resized = pillow_resize(image, width as u32, height as u32, Filter::Bicubic);
        Ok((pad(&resized, geometry.before, geometry.padded_shape, self.background), geometry))
    }

    /// Where a picture of `original` (height, width) lies in the square.
    pub fn geometry(&self, original: (usize, usize)) -> Result<Geometry> {
        let (h, w) = original;
        if h == 0 || w == 0 {
            return Err(empty());
        }
        let side = self.side;
        let image_shape = match self.rule {
            SizeRule::MultiplyFirst if h > w => (side, (w as f64 * side as f64 / h as f64) as usize),
            SizeRule::MultiplyFirst => ((h as f64 * side as f64 / w as f64) as usize, side),
            SizeRule::DivideFirst { least } => {
                let long = h.max(w) as f64;
                let along =
                    |length: usize| ((length as f64 / long * side as f64) as usize).max(least).min(side);
                (along(h), along(w))
            }
        };
        if image_shape.0 == 0 || image_shape.1 == 0 {
            return Err(Error::image(
                format!("{w} × {h} pixels is too elongated: at {side} pixels its short side would vanish"),
                "cut a part out of the picture",
            ));
        }
        Ok(centred(original, image_shape, (side, side)))
    }
}

/// Pads a picture to a square at its own size (Mini-Gemini, `spec/models.md` §8); `background` as
/// [`Normalisation::background`].
pub fn pad_to_square(image: &RgbImage, background: [u8; 3]) -> Result<(RgbImage, Geometry)> {
    let original = size(image);
    if original.0 == 0 || original.1 == 0 {
        return Err(empty());
    }
    let side = original.0.max(original.1);
    let geometry = centred(original, original, (side, side));
    Ok((pad(image, geometry.before, geometry.padded_shape, background), geometry))
}

/// Resizes so that the longer side is `long_side`, rounding half up, with the bilinear filter
/// (`spec/pipeline.md` §5.1). Neither side becomes shorter than one pixel.
pub fn sam_resize(image: &RgbImage, long_side: usize) -> RgbImage {
    let (height, width) = sam_size(size(image), long_side);
    pillow_resize(image, width as u32, height as u32, Filter::Bilinear)
}

/// The size `(height, width)` that [`sam_resize`] gives a picture of size `original`.
pub fn sam_size(original: (usize, usize), long_side: usize) -> (usize, usize) {
    let scale = long_side as f64 / original.0.max(original.1).max(1) as f64;
    let along = |length: usize| ((length as f64 * scale + 0.5) as usize).max(1);
    (along(original.0), along(original.1))
}

/// `(height, width)`.
pub(super) fn size(image: &RgbImage) -> (usize, usize) {
    (image.height() as usize, image.width() as usize)
}

pub(super) fn empty() -> Error {
    Error::image("the picture has no pixels", "choose another picture")
}

/// The geometry of a picture in the middle of its padding; of an odd padding the smaller half comes first.
pub(super) fn centred(
    original: (usize, usize),
    image_shape: (usize, usize),
    padded: (usize, usize),
) -> Geometry {
    let before = ((padded.0 - image_shape.0) / 2, (padded.1 - image_shape.1) / 2);
    Geometry { original, image_shape, before, padded_shape: padded, crop: true }
}

/// `image` on a canvas of `shape` at `before`, both `(height, width)`.
pub(super) fn pad(
    image: &RgbImage,
    before: (usize, usize),
    shape: (usize, usize),
    colour: [u8; 3],
) -> RgbImage {
    if size(image) == shape {
        return image.clone();
    }
    let mut canvas = RgbImage::from_pixel(shape.1 as u32, shape.0 as u32, Rgb(colour));
    let (row, stride) = (3 * image.width() as usize, 3 * shape.1);
    for (y, source) in image.as_raw().chunks_exact(row.max(1)).enumerate() {
        let start = (before.0 + y) * stride + 3 * before.1;
        if let Some(target) = canvas.get_mut(start..start + row) {
            target.copy_from_slice(source);
        }
    }
    canvas
}

/// What matters in `preprocessor_config.json`.
#[derive(Debug, Clone)]
pub(super) struct ProcessorConfig {
    pub(super) side: usize,
    pub(super) normalisation: Normalisation,
    /// The mean colour of `image_mean`, even where `do_normalize` is off.
    pub(super) background: [u8; 3],
    pub(super) json: Value,
    pub(super) file: std::path::PathBuf,
}

impl ProcessorConfig {
    pub(super) fn read(dir: &Path) -> Result<Self> {
        let file = dir.join("preprocessor_config.json");
        let text = crate::weights::files::read_text(&file)?;
        let json: Value = serde_json::from_str(&text)
            .map_err(|e| Error::config(&file, format!("not a JSON file: {e}"), "download the file again"))?;
        let side = side(&json).ok_or_else(|| {
            let what =
                "`crop_size`, `size` or `image_size` must give the side of a square of 1 to 16384 pixels";
            Error::config(
                &file,
                what,
                "download the file again, or set `crop_size` to the tower's input size",
            )
        })?;
        let three = |key: &str, default: [f32; 3]| match json.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => serde_json::from_value::<[f32; 3]>(value.clone())
                .ok()
                .filter(|v| v.iter().all(|x| x.is_finite()) && (key == "image_mean" || !v.contains(&0.0)))
                .ok_or_else(|| {
                    let what = format!("`{key}` is {value}, expected three numbers, one per colour");
                    Error::config(&file, what, "download the file again")
                }),
        };
        let flag = |key: &str| json.get(key).and_then(Value::as_bool).unwrap_or(true);
        let mut normalisation = Normalisation {
            rescale: json.get("rescale_factor").and_then(Value::as_f64).unwrap_or(1.0 / 255.0),
            mean: three("image_mean", Normalisation::CLIP.mean)?,
            std: three("image_std", Normalisation::CLIP.std)?,
        };
        let background = normalisation.background();
        if !flag("do_rescale") {
            normalisation.rescale = 1.0;
        }
        if !flag("do_normalize") {
            (normalisation.mean, normalisation.std) = ([0.0; 3], [1.0; 3]);
        }
        Ok(Self { side, normalisation, background, json, file })
    }
}

/// The side of the square that the tower reads: a number, `{height, width}` or `{shortest_edge}`.
fn side(json: &Value) -> Option<usize> {
    ["crop_size", "size", "image_size"].iter().find_map(|key| {
        let value = json.get(key)?;
        let at = |name: &str| value.get(name).and_then(Value::as_u64);
        let side = value.as_u64().or_else(|| at("shortest_edge")).or_else(|| {
            let height = at("height")?;
            (at("width") == Some(height)).then_some(height)
        })?;
        (1..=16_384).contains(&side).then_some(side as usize)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> Result<LlavaProcessor> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("preprocessor_config.json"), json).unwrap();
        LlavaProcessor::from_config(folder.path())
    }

    #[test]
    fn reads_every_way_of_writing_the_size() {
        for json in [
            r#"{"crop_size": 56}"#,
            r#"{"crop_size": {"height": 56, "width": 56}, "size": {"shortest_edge": 70}}"#,
            r#"{"size": {"shortest_edge": 56}}"#,
            r#"{"size": {"height": 56, "width": 56}}"#,
        ] {
            assert_eq!(config(json).unwrap().side(), 56, "{json}");
        }
        for json in
            ["[]", "{}", "{", r#"{"size": 0}"#, r#"{"size": {"height": 5, "width": 6}}"#, r#"{"size": 1e9}"#]
        {
            assert!(matches!(config(json), Err(Error::Config { .. })), "{json}");
        }
        for json in [r#"{"size": 56, "image_std": [1, 0, 1]}"#, r#"{"size": 56, "image_mean": [1, 1]}"#] {
            assert!(config(json).unwrap_err().to_string().contains("image_"), "{json}");
        }
    }

    #[test]
    fn the_padding_is_the_mean_colour_and_normalises_to_about_zero() {
        assert_eq!(Normalisation::CLIP.background(), [122, 116, 104]);
        assert_eq!(Normalisation::HALF.background(), [127, 127, 127]);
        let (pixels, geometry) = LlavaProcessor::new(8, SizeRule::MultiplyFirst, Normalisation::CLIP)
            .process(&RgbImage::new(16, 4))
            .unwrap();
        assert_eq!((geometry.image_shape, geometry.before), ((2, 8), (3, 0)));
        let corner = pixels.get(0).unwrap().get(0).unwrap().to_vec1::<f32>().unwrap();
        assert!(corner.iter().all(|v| v.abs() < 0.02), "{corner:?}");
    }

    #[test]
    fn refuses_empty_and_endless_pictures() {
        let processor = LlavaProcessor::new(56, SizeRule::MultiplyFirst, Normalisation::CLIP);
        assert!(matches!(processor.process(&RgbImage::new(0, 3)), Err(Error::Image { .. })));
        let error = processor.process(&RgbImage::new(1000, 1)).unwrap_err();
        assert!(error.to_string().contains("1000 × 1"), "{error}");
        let deepseek = LlavaProcessor::new(56, SizeRule::DivideFirst { least: 14 }, Normalisation::HALF);
        assert_eq!(deepseek.process(&RgbImage::new(1000, 1)).unwrap().1.image_shape, (14, 56));
        assert_eq!(sam_resize(&RgbImage::new(3000, 1), 64).dimensions(), (64, 1));
    }
}
