//! Masks without a trained head, beyond the paper: attention of a few telling heads → box → SAM.
//!
//! For an LMM that nobody has trained a head for yet. Heads are chosen for every phrase by how much of their attention
//! goes to the picture and how concentrated it is there; their attention is taken relative to what all phrases of the
//! text look at, so that what is looked at anyway (borders, attention sinks) drops out. The places above a threshold
//! are the coarse mask; the box around them and the coarse mask itself prompt SAM.

use candle_core::{Device, Tensor};

use crate::error::{Error, Result};
use crate::grounder::Observation;
use crate::layout::maps_in_picture;
use crate::nn::bilinear;
use crate::sam::{PromptOptions, Refiner};

/// Side of the coarse logits, that of a trained head's.
const SIDE: usize = 64;
/// Coarse logits reach from −SCALE to SCALE.
const SCALE: f32 = 8.0;

/// Attention heads that are combined for a phrase.
const HEADS: usize = 10;

/// Masks from attention and an untrained SAM.
#[derive(Debug, Clone)]
pub struct TrainingFree {
    refiner: Refiner,
}

impl TrainingFree {
    /// With the public SAM's own prompt encoder and mask decoder.
    pub fn new(refiner: Refiner) -> Self {
        Self { refiner }
    }

    /// Refined logits `[N, H, W]` at the picture's own size, from coarse logits `[N, mh, mw]`.
    pub fn refine(&self, observation: &Observation, coarse: &Tensor) -> Result<Tensor> {
        let options = PromptOptions { text_prompt: false, ..PromptOptions::default() };
        // No words prompt SAM, but their number tells it the number of phrases.
        let none =
            Tensor::zeros((1, self.refiner.config().prompt_embed_dim), coarse.dtype(), coarse.device())?;
        let words = vec![none; coarse.dim(0)?];
        let (embedding, geometry) = (&observation.sam_embedding, &observation.sam_geometry);
        self.refiner.refine(embedding, coarse, &words, geometry, &options)
    }

    /// Logits `[N, mh, mw]` of every phrase from attention alone, the LMM's padding cut off.
    ///
    /// # Errors
    /// [`Error::Request`] if the maps are empty.
    pub fn coarse(&self, observation: &Observation) -> Result<Tensor> {
        let (n, channels, grid_h, grid_w) = observation.maps.dims4()?;
        if channels == 0 || grid_h * grid_w == 0 {
            return Err(Error::request(
                format!("attention maps have shape {:?}", observation.maps.dims()),
                "give maps of an LMM with image tokens",
            ));
        }
        let maps = maps_in_picture(&observation.maps, &observation.geometry, grid_h, grid_w)?;
        let (_, _, height, width) = maps.dims4()?;
        let cells = height * width;
        let maps = maps.to_device(&Device::Cpu)?.reshape((n, channels, cells))?.to_vec3::<f32>()?;
        let mut together = vec![vec![0f32; cells]; channels];
        for maps in &maps {
            for (sum, map) in together.iter_mut().zip(maps) {
                let total = map.iter().sum::<f32>().max(f32::MIN_POSITIVE);
                sum.iter_mut().zip(map).for_each(|(sum, value)| *sum += value / total / n as f32);
            }
        }
        let mut logits = Vec::with_capacity(n * cells);
        for maps in &maps {
            let mut combined = vec![0f32; cells];
            for head in telling_heads(maps) {
                let total = maps[head].iter().sum::<f32>().max(f32::MIN_POSITIVE);
                for ((sum, value), usual) in combined.iter_mut().zip(&maps[head]).zip(&together[head]) {
                    let share = value / total;
                    // With one phrase there is nothing to compare with.
                    let usual = if n > 1 { usual * cells as f32 } else { 1.0 };
                    *sum += share / (usual + 0.1);
                }
            }
            logits.extend(thresholded(&combined));
        }
        let logits = Tensor::from_vec(logits, (n, 1, height, width), &Device::Cpu)?;
        let factor = SIDE as f64 / grid_h.max(grid_w) as f64;
        let size = |cells: usize| ((cells as f64 * factor).round() as usize).max(1);
        let logits = bilinear(&logits, size(height), size(width))?.squeeze(1)?;
        Ok(logits.to_device(observation.maps.device())?)
    }
}

/// Of the heads that pay the picture at least the average attention, the [`HEADS`] whose attention is least spread out.
fn telling_heads(maps: &[Vec<f32>]) -> Vec<usize> {
    let masses: Vec<f32> = maps.iter().map(|map| map.iter().sum()).collect();
    let average = masses.iter().sum::<f32>() / masses.len() as f32;
    let mut heads: Vec<(f64, usize)> = (0..maps.len())
        .filter(|&head| masses[head] >= average && masses[head] > 0.0)
        .map(|head| (entropy(&maps[head], masses[head]), head))
        .collect();
    heads.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    heads.into_iter().take(HEADS).map(|(_, head)| head).collect()
}

/// `−Σ p log p` of a map's shares.
fn entropy(map: &[f32], mass: f32) -> f64 {
    let shares = map.iter().map(|&value| f64::from(value / mass)).filter(|&share| share > 0.0);
    -shares.map(|share| share * share.ln()).sum::<f64>()
}

/// Logits that are above 0 where `values` are above the threshold that parts them best (Otsu's).
fn thresholded(values: &[f32]) -> Vec<f32> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f32::total_cmp);
    let (low, high) = (sorted[0], sorted[sorted.len() - 1]);
    let total: f64 = sorted.iter().map(|&v| f64::from(v)).sum();
    let (mut below, mut best, mut threshold) = (0f64, -1f64, low);
    for (i, pair) in sorted.windows(2).enumerate() {
        below += f64::from(pair[0]);
        let (left, right) = ((i + 1) as f64, (sorted.len() - i - 1) as f64);
        let between = left * right * (below / left - (total - below) / right).powi(2);
        if between > best && pair[1] > pair[0] {
            (best, threshold) = (between, 0.5 * (pair[0] + pair[1]));
        }
    }
    let spread = (high - threshold).max(threshold - low).max(f32::MIN_POSITIVE);
    values.iter().map(|value| SCALE * (value - threshold) / spread).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::geometry::Geometry;
    use crate::sam::{SamConfig, SamGeometry};
    use crate::weights::Params;

    /// Two phrases: in head 1 each looks at a corner of its own; head 0 looks everywhere, head 2 at one cell always, as
    /// attention sinks do, head 3 hardly at the picture.
    fn observation() -> Observation {
        let mut maps = vec![0f32; 2 * 4 * 64];
        for phrase in 0..2 {
            let mut set = |head: usize, y: usize, x: usize, value: f32| {
                maps[((phrase * 4 + head) * 8 + y) * 8 + x] = value;
            };
            for y in 0..8 {
                for x in 0..8 {
                    let inside = if phrase == 0 { y < 3 && x < 3 } else { y >= 5 && x >= 5 };
                    set(0, y, x, 0.006);
                    set(1, y, x, if inside { 0.05 } else { 0.0005 });
                    set(2, y, x, if (y, x) == (3, 4) { 0.4 } else { 0.001 });
                    set(3, y, x, 1e-6);
                }
            }
        }
        Observation {
            maps: Tensor::from_vec(maps, (2, 4, 8, 8), &Device::Cpu).unwrap(),
            hidden: Tensor::zeros((1, 2, 4), candle_core::DType::F32, &Device::Cpu).unwrap(),
            phrases: vec![vec![0], vec![1]],
            geometry: Geometry {
                original: (32, 32),
                image_shape: (8, 8),
                before: (0, 0),
                padded_shape: (8, 8),
                crop: true,
            },
            sam_embedding: Tensor::ones((1, 16, 4, 4), candle_core::DType::F32, &Device::Cpu).unwrap(),
            sam_geometry: SamGeometry::new((32, 32), 32),
        }
    }

    fn refiner() -> Refiner {
        let config = SamConfig {
            image_size: 32,
            patch_size: 8,
            decoder_num_heads: 2,
            prompt_embed_dim: 16,
            mlp_dim: 16,
            iou_head_hidden_dim: None,
            ..SamConfig::vit_b()
        };
        let tensors = Refiner::init(&config, &mut ChaCha8Rng::seed_from_u64(1)).unwrap();
        let params = Params::new("test", tensors.into_iter().collect::<HashMap<_, _>>());
        Refiner::load(&config, &params).unwrap()
    }

    #[test]
    fn each_phrase_gets_its_corner() {
        let (free, observation) = (TrainingFree::new(refiner()), observation());
        let coarse = free.coarse(&observation).unwrap();
        assert_eq!(coarse.dims(), [2, 64, 64]);
        assert_eq!(free.refine(&observation, &coarse).unwrap().dims(), [2, 32, 32]);
        for (phrase, rows) in coarse.to_vec3::<f32>().unwrap().iter().enumerate() {
            let at = |y: usize, x: usize| rows[y][x] > 0.0;
            assert_eq!((at(6, 6), at(58, 58)), (phrase == 0, phrase == 1), "phrase {phrase}");
            assert!(!at(28, 36), "what all look at drops out");
        }
    }

    #[test]
    fn flat_and_empty_maps_are_no_trouble() {
        let free = TrainingFree::new(refiner());
        let mut flat = observation();
        flat.maps = flat.maps.zeros_like().unwrap();
        let coarse = free.coarse(&flat).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(coarse.iter().all(|value| value.is_finite()));
        flat.maps = flat.maps.narrow(1, 0, 0).unwrap();
        assert!(free.coarse(&flat).is_err());
    }
}
