//! LLaVA-NeXT's any-resolution crops (`spec/models.md` §6).

use std::path::Path;

use candle_core::Tensor;
use image::RgbImage;
use image::imageops::crop_imm;
use serde_json::Value;

use super::preprocess::{Normalisation, ProcessorConfig, centred, empty, pad, size};
use super::resample::{Filter, pillow_resize};
use crate::error::{Error, Result};
use crate::geometry::Geometry;

/// Resolutions (height, width) of the published models, in their order.
pub const PINPOINTS: [(usize, usize); 5] = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)];

/// Side of the tower that [`PINPOINTS`] belong to.
const PUBLISHED_SIDE: usize = 336;

/// The longest side of a resolution, so that a damaged file cannot ask for endless memory.
const MAX_LENGTH: usize = 16_384;

/// A base view of the whole picture and crops of it at a resolution that fits.
#[derive(Debug, Clone, PartialEq)]
pub struct AnyResProcessor {
    side: usize,
    pinpoints: Vec<(usize, usize)>,
    normalisation: Normalisation,
}

impl AnyResProcessor {
    /// For a tower that reads `side × side`; pinpoints are multiples of `side` and hold more than one crop.
    ///
    /// # Errors
    /// [`Error::Request`] if there is no pinpoint, or one that is no such multiple or larger than 16384 pixels.
    pub fn new(side: usize, pinpoints: Vec<(usize, usize)>, normalisation: Normalisation) -> Result<Self> {
        let length = |length: usize| (1..=MAX_LENGTH).contains(&length) && length.is_multiple_of(side);
        let fits = |&(h, w): &(usize, usize)| length(h) && length(w) && (h, w) != (side, side);
        if side == 0 || pinpoints.is_empty() || !pinpoints.iter().all(fits) {
            let what = format!(
                "the grid pinpoints {pinpoints:?} are not multiples of {side} with more than one crop, \
                 up to {MAX_LENGTH} pixels"
            );
            return Err(Error::request(what, "use the pinpoints of the model's preprocessor_config.json"));
        }
        Ok(Self { side, pinpoints, normalisation })
    }

    /// Reads `preprocessor_config.json` of the folder `dir`: size and statistics as for LLaVA-1.5, and
    /// `image_grid_pinpoints`. Where they are left out, `fallback` counts, the value of the same key in the
    /// model's `config.json`; where that is missing too, [`PINPOINTS`], but only for the size they belong to.
    ///
    /// # Errors
    /// As [`LlavaProcessor::from_config`](super::preprocess::LlavaProcessor::from_config), and [`Error::Config`]
    /// if there are no usable pinpoints, or if the two files disagree.
    pub fn from_config(dir: impl AsRef<Path>, fallback: Option<&Value>) -> Result<Self> {
        let config = ProcessorConfig::read(dir.as_ref())?;
        let wrong = |what: String, hint: &str| Error::config(&config.file, what, hint);
        let own = config.json.get("image_grid_pinpoints").filter(|value| !value.is_null());
        if let (Some(own), Some(other)) = (own, fallback)
            && own != other
        {
            let what = format!("`image_grid_pinpoints` is {own}, but {other} in config.json");
            return Err(wrong(what, "the two files do not belong together; download both again"));
        }
        let pinpoints = match own.or(fallback) {
            Some(value) => serde_json::from_value(value.clone()).map_err(|e| {
                wrong(
                    format!("`image_grid_pinpoints` is not a list of pairs: {e}"),
                    "download the file again",
                )
            })?,
            None if config.side == PUBLISHED_SIDE => PINPOINTS.to_vec(),
            None => {
                let what = format!(
                    "required key `image_grid_pinpoints` is missing: a tower of {} pixels has no usual ones",
                    config.side
                );
                return Err(wrong(
                    what,
                    "download the file again, or add the resolutions the model was trained on",
                ));
            }
        };
        Self::new(config.side, pinpoints, config.normalisation)
            .map_err(|e| wrong(format!("`image_grid_pinpoints`: {e}"), "download the file again"))
    }

    /// Side of a view in pixels.
    pub fn side(&self) -> usize {
        self.side
    }

    /// `[1 + crops, 3, side, side]` f32: the base view, then the crops row by row; and where the picture lies in
    /// the resolution chosen. The geometry says `crop: false`: logits cover the whole picture already.
    pub fn process(&self, image: &RgbImage) -> Result<(Tensor, Geometry)> {
        let (views, geometry) = self.views(image)?;
        let tensors = views.iter().map(|view| self.normalisation.apply(view)).collect::<Result<Vec<_>>>()?;
        Ok((Tensor::stack(&tensors, 0)?, geometry))
    }

    /// The 8-bit views before normalisation.
    pub fn views(&self, image: &RgbImage) -> Result<(Vec<RgbImage>, Geometry)> {
        let geometry = self.geometry(size(image))?;
        let side = self.side as u32;
        let (height, width) = geometry.image_shape;
        let resized = pillow_resize(image, width as u32, height as u32, Filter::Bicubic);
        let padded = pad(&resized, geometry.before, geometry.padded_shape, [0; 3]);
        let mut views = vec![pillow_resize(image, side, side, Filter::Bicubic)];
        for y in (0..padded.height()).step_by(self.side) {
            for x in (0..padded.width()).step_by(self.side) {
                views.push(crop_imm(&padded, x, y, side, side).to_image());
            }
        }
        Ok((views, geometry))
    }

    /// Where a picture of `original` (height, width) lies in the resolution chosen for it.
    pub fn geometry(&self, original: (usize, usize)) -> Result<Geometry> {
        if original.0 == 0 || original.1 == 0 {
            return Err(empty());
        }
        let target = self.best_resolution(original);
        let (h, w) = (original.0 as f64, original.1 as f64);
        let (scale_h, scale_w) = (target.0 as f64 / h, target.1 as f64 / w);
        let image_shape = if scale_w < scale_h {
            (((h * scale_w).ceil() as usize).min(target.0), target.1)
        } else {
            (target.0, ((w * scale_h).ceil() as usize).min(target.1))
        };
        Ok(Geometry { crop: false, ..centred(original, image_shape, target) })
    }

    /// The pinpoint that keeps most of the picture's pixels, then wastes fewest, then comes first.
    fn best_resolution(&self, original: (usize, usize)) -> (usize, usize) {
        let (h, w) = (original.0 as f64, original.1 as f64);
        let key = |&(ph, pw): &(usize, usize)| {
            let scale = (pw as f64 / w).min(ph as f64 / h);
            let resized = (w * scale) as usize * (h * scale) as usize;
            let effective = resized.min(original.0 * original.1);
            (effective, std::cmp::Reverse(ph * pw - effective))
        };
        let mut best = self.pinpoints[0];
        for candidate in &self.pinpoints[1..] {
            if key(candidate) > key(&best) {
                best = *candidate;
            }
        }
        best
    }

    /// Crops per column and per row of the resolution of `geometry`.
    pub fn crop_grid(&self, geometry: &Geometry) -> (usize, usize) {
        (geometry.padded_shape.0 / self.side, geometry.padded_shape.1 / self.side)
    }
}

/// The part of a feature grid of `current` (rows, columns) that shows a picture of `original` (height, width):
/// `(first row, first column, rows, columns)`.
///
/// The published model computes this in f32, with the division as a product with a rounded reciprocal; some
/// sizes differ from an f64 evaluation.
pub fn unpad(original: (usize, usize), current: (usize, usize)) -> (usize, usize, usize, usize) {
    let (h, w) = (original.0 as f32, original.1 as f32);
    let (rows, columns) = (current.0 as f32, current.1 as f32);
    let kept = |scale: f32, length: f32, limit: usize| {
        let n = ((length * scale) as usize).min(limit);
        let before = (limit - n) / 2;
        (before, limit - 2 * before)
    };
    if w / h > columns / rows {
        let (y, height) = kept(1.0 / w * columns, h, current.0);
        (y, 0, height, current.1)
    } else {
        let (x, width) = kept(1.0 / h * rows, w, current.1);
        (0, x, current.0, width)
    }
}
