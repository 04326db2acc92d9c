//! SAM: the image encoder that sees the picture, and the refiner that sharpens coarse masks with it
//! (`spec/pipeline.md` §5).
//!
//! Tensor names are those of the public checkpoints (`image_encoder.*`, `prompt_encoder.*`, `mask_decoder.*`). All
//! sizes follow [`SamConfig`], so the same code runs the public ViT-B/L/H and the small SAM of the shipped model.
//! Everything is f32, and every tensor can be trained.

mod config;
mod geometry;
mod image_encoder;
mod init;
mod mask_decoder;
mod prompt_encoder;
mod refiner;

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

pub use config::SamConfig;
pub use geometry::SamGeometry;
pub use image_encoder::{ImageEncoder, Neck, pixel_values};
pub use mask_decoder::{MaskDecoder, Transformed};
pub use prompt_encoder::PromptEncoder;
pub use refiner::{PromptOptions, Refiner};

use crate::error::Result;
use crate::weights::Params;

/// A whole SAM: the frozen image encoder and the trained refiner.
#[derive(Debug, Clone)]
pub struct Sam {
    config: SamConfig,
    image_encoder: ImageEncoder,
    refiner: Refiner,
}

impl Sam {
    /// Reads a SAM with public tensor names below `params`.
    pub fn load(config: &SamConfig, params: &Params) -> Result<Self> {
        Ok(Self {
            config: config.clone(),
            image_encoder: ImageEncoder::load(config, &params.pp("image_encoder"))?,
            refiner: Refiner::load(config, params)?,
        })
    }

    /// Fresh tensors of a whole SAM (PyTorch's default initialisations), the same for the same seed.
    pub fn init(config: &SamConfig, seed: u64) -> Result<BTreeMap<String, Tensor>> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut tensors = init::image_encoder(config, &mut rng)?;
        tensors.extend(Refiner::init(config, &mut rng)?);
        Ok(tensors)
    }

    /// The sizes this SAM was built for.
    pub fn config(&self) -> &SamConfig {
        &self.config
    }

    /// The image encoder.
    pub fn image_encoder(&self) -> &ImageEncoder {
        &self.image_encoder
    }

    /// Prompt encoder and mask decoder.
    pub fn refiner(&self) -> &Refiner {
        &self.refiner
    }
}
