//! SAM: the image encoder that sees the picture, and the refiner that sharpens coarse masks with it
//! (`spec/pipeline.md` §5).
//!
//! Tensor names are those of the public checkpoints (`image_encoder.*`, `prompt_encoder.*`, `mask_decoder.*`). All
//! sizes follow [`SamConfig`], so the same code runs the public ViT-B/L/H and the small SAM of the shipped model.
//! Everything is f32, and every tensor can be trained.

mod attention;
mod config;
mod geometry;
mod image_encoder;
mod init;
mod mask_decoder;
mod names;
mod numbers;
mod prompt_encoder;
mod refiner;
mod work;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

pub(crate) use names::canonical;

pub use config::SamConfig;
pub use geometry::SamGeometry;
pub use image_encoder::{ImageEncoder, Neck, pixel_values};
pub use mask_decoder::{MaskDecoder, Transformed};
pub use numbers::Numbers;
pub use prompt_encoder::PromptEncoder;
pub use refiner::{PromptOptions, Refiner};

use crate::error::{Error, Result};
use crate::vision::preprocess::sam_resize;
use crate::weights::{Params, files, load_checkpoint};

/// Name of the file with the sizes, beside a SAM checkpoint that is not one of the public sizes.
pub const CONFIG_FILE: &str = "sam_config.json";

/// Sizes and f32 tensors of the SAM checkpoint at `path` (a file, or a folder with one).
///
/// Names are the public ones, also of a file in the layout of the `transformers` library (`facebook/sam-vit-large`). The
/// sizes come from the [`CONFIG_FILE`] beside the tensors if there is one, else from the tensors' shapes.
///
/// # Errors
/// [`Error::Io`], [`Error::Weights`] or [`Error::Config`] naming the file at fault.
pub fn read_checkpoint(path: &Path, device: &Device) -> Result<(SamConfig, HashMap<String, Tensor>)> {
    let tensors = names::canonical(load_checkpoint(path, Some(DType::F32), device)?);
    let folder = if files::is_dir(path) { path } else { path.parent().unwrap_or(Path::new(".")) };
    let file = folder.join(CONFIG_FILE);
    let config = match files::is_file(&file) {
        true => SamConfig::from_file(&file)?,
        false => SamConfig::from_tensors(&Params::new(path, tensors.clone()), path)?,
    };
    Ok((config, tensors))
}

/// A whole SAM: the frozen image encoder and the trained refiner.
#[derive(Debug, Clone)]
pub struct Sam {
    config: SamConfig,
    image_encoder: ImageEncoder,
    refiner: Refiner,
    device: Device,
}

impl Sam {
    /// Opens the SAM checkpoint at `path` (a file, or a folder with one); see [`read_checkpoint`].
    pub fn open(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let path = path.as_ref();
        let (config, tensors) = read_checkpoint(path, device)?;
        let params = Params::new(path, tensors);
        let sam = Self::load(&config, &params)?;
        params.finish("expected a SAM checkpoint; if its sizes are not the public ones, put a sam_config.json beside it")?;
        Ok(sam)
    }

    /// Reads a SAM with public tensor names below `params`.
    pub fn load(config: &SamConfig, params: &Params) -> Result<Self> {
        let image_encoder = ImageEncoder::load(config, &params.pp("image_encoder"))?;
        let device = image_encoder.device().clone();
        Ok(Self { config: config.clone(), refiner: Refiner::load(config, params)?, image_encoder, device })
    }

    /// The same SAM with the matrices of its image encoder in `numbers`; see [`ImageEncoder::with_blocks_in`].
    pub fn with_image_encoder_in(mut self, numbers: Numbers) -> Result<Self> {
        self.image_encoder = self.image_encoder.with_blocks_in(numbers)?;
        Ok(self)
    }

    /// Fresh tensors of a whole SAM (PyTorch's default initialisations), the same for the same seed.
    pub fn init(config: &SamConfig, seed: u64) -> Result<BTreeMap<String, Tensor>> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut tensors = init::image_encoder(config, &mut rng)?;
        tensors.extend(Refiner::init(config, &mut rng)?);
        Ok(tensors)
    }

    /// The picture as the image encoder wants it, `[3, S, S]`, and how it was resized.
    pub fn pixel_values(&self, picture: &RgbImage) -> Result<(Tensor, SamGeometry)> {
        let size = self.config.image_size;
        let geometry = SamGeometry::new((picture.height() as usize, picture.width() as usize), size);
        if geometry.original.0 == 0 || geometry.original.1 == 0 {
            return Err(Error::image("it has no pixels", "give a picture of at least one pixel"));
        }
        Ok((pixel_values(&sam_resize(picture, size), size)?, geometry))
    }

    /// The picture's embedding `[1, C, e, e]` and how it was resized. No gradient.
    pub fn encode_image(&self, picture: &RgbImage) -> Result<(Tensor, SamGeometry)> {
        let (pixels, geometry) = self.pixel_values(picture)?;
        let pixels = pixels.unsqueeze(0)?.to_device(&self.device)?;
        Ok((self.image_encoder.forward(&pixels)?.detach(), geometry))
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
