//! HPT-Air and HPT-Air-1.5: a tower whose positions are re-gridded to larger pictures, a projector, and Yi or
//! Llama-3 (`spec/models.md` §9). Three folders: `llm/`, `visual_encoder/`, `projector/`.

use std::collections::HashMap;
use std::path::Path;

use candle_core::Tensor;
use image::RgbImage;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::layout::ImageLayout;
use crate::lmm::shared::{Projector, TESTED, WRONG_FOLDER, stop_ids, supported};
use crate::lmm::{Base, ImageInput, Lmm, LmmSpec, OpenOptions};
use crate::text::chat::{CHATML, ChatFormat, LLAMA3};
use crate::text::tokenizer::Tokenizer;
use crate::text::{Decoder, DecoderConfig};
use crate::vision::clip::{ClipConfig, ClipVision};
use crate::vision::preprocess::{LlavaProcessor, Normalisation, SizeRule};
use crate::vision::siglip::{SiglipConfig, SiglipVision};
use crate::weights::{Params, files};

/// The published model with CLIP and Yi.
pub const HPT_AIR_6B: LmmSpec = LmmSpec {
    name: "HPT-Air-6B",
    repo: "HyperGAI/HPT",
    model_type: "hpt",
    layers: 32,
    heads: 32,
    grid: (28, 28),
    channels: 1024,
    several_images: false,
    tested: TESTED,
};

/// The published model with SigLIP and Llama-3.
pub const HPT_AIR_1_5_8B: LmmSpec = LmmSpec {
    name: "HPT-Air-1.5-8B",
    repo: "HyperGAI/HPT1_5-Air-Llama-3-8B-Instruct-multimodal",
    grid: (32, 32),
    ..HPT_AIR_6B
};

const LLM: &str = "llm";
const VISUAL_ENCODER: &str = "visual_encoder";
const PROJECTOR: &str = "projector";
const FOLDERS: [&str; 3] = [LLM, VISUAL_ENCODER, PROJECTOR];

/// Hidden state of the tower that is used.
const FEATURE_LAYER: i64 = -2;

/// What tells the two models apart, beside their files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Variant {
    /// HPT-Air: CLIP, ChatML.
    Air,
    /// HPT-Air-1.5: SigLIP, Llama-3's prompt.
    Air15,
}

impl Variant {
    /// `model_type` of `visual_encoder/config.json`.
    fn tower(self) -> &'static str {
        match self {
            Self::Air => "clip_vision_model",
            Self::Air15 => "siglip_vision_model",
        }
    }

    fn format(self) -> &'static ChatFormat {
        match self {
            Self::Air => &CHATML,
            Self::Air15 => &LLAMA3,
        }
    }

    /// Side of the published model's pictures: no file tells it.
    fn published_size(self) -> usize {
        match self {
            Self::Air => 392,
            Self::Air15 => 448,
        }
    }
}

/// Whether `dir` holds an HPT-Air.
pub(crate) fn recognises_air(dir: &Path) -> Result<bool> {
    Ok(variant(dir)? == Some(Variant::Air))
}

/// Whether `dir` holds an HPT-Air-1.5.
pub(crate) fn recognises_air_1_5(dir: &Path) -> Result<bool> {
    Ok(variant(dir)? == Some(Variant::Air15))
}

/// A folder with configurations of a language model and a tower is an HPT; the tower says which. The projector is
/// not looked for here: without it the folder is an incomplete HPT, and opening it says so.
fn variant(dir: &Path) -> Result<Option<Variant>> {
    let tower = dir.join(VISUAL_ENCODER).join("config.json");
    if !files::is_file(&tower) || !files::is_file(&dir.join(LLM).join("config.json")) {
        return Ok(None);
    }
    let config = Config::read(&tower)?;
    let found = config.text("model_type")?;
    let known = [Variant::Air, Variant::Air15];
    match known.into_iter().find(|variant| variant.tower() == found) {
        Some(variant) => Ok(Some(variant)),
        None => Err(config.error(
            "model_type",
            format!("unknown vision tower `{found}`; known towers: {}", known.map(Variant::tower).join(", ")),
            "use HPT-Air or HPT-Air-1.5 as published",
        )),
    }
}

/// [`Hpt::open`] as [`crate::lmm::REGISTRY`] wants it.
pub(crate) fn open(spec: &LmmSpec, dir: &Path, options: &OpenOptions) -> Result<Box<dyn Lmm>> {
    Ok(Box::new(Hpt::open(spec, dir, options)?))
}

/// An opened HPT-Air or HPT-Air-1.5.
#[derive(Debug)]
pub struct Hpt {
    base: Base,
    processor: LlavaProcessor,
    tower: Tower,
    projector: Projector,
}

impl Hpt {
    /// Opens a folder with the three published folders; `spec` is its line in the registry. Sizes come from their
    /// `config.json`, the side of the picture from `options` or else from the published model.
    ///
    /// # Errors
    /// [`Error::Config`] for missing folders and settings that do not fit, [`Error::Request`] for an unusable
    /// picture size, [`Error::Weights`] with every missing or misshapen tensor of the three folders.
    pub fn open(spec: &LmmSpec, dir: &Path, options: &OpenOptions) -> Result<Self> {
        let Some(variant) = variant(dir)? else {
            return Err(incomplete(dir, "no llm/config.json or no visual_encoder/config.json"));
        };
        let [llm, visual_encoder, projector] = FOLDERS.map(|name| dir.join(name));
        let format = variant.format();
        let text = DecoderConfig::from_config(&Config::read(&llm.join("config.json"))?)?;
        let mut tokenizer = Tokenizer::load(&llm)?;
        let image_token = tokenizer.add_special_token(format.image)?;
        let stop_ids = stop_ids(&llm, &tokenizer, format)?;
        let side = options.image_size.unwrap_or(variant.published_size());
        let processor = match variant {
            Variant::Air => LlavaProcessor::from_config(&visual_encoder)?.with_side(side),
            Variant::Air15 => LlavaProcessor::new(side, SizeRule::MultiplyFirst, Normalisation::HALF),
        };
        let tower = TowerConfig::read(variant, &visual_encoder, side)?;
        let (width, patch) = tower.width_and_patch();
        let grid = grid(side, patch, text.max_positions)?;

        let params = Params::new(dir, load_folders(dir, options)?).in_format(options.weights);
        let model = Self {
            processor,
            tower: tower.load(&params.pp(VISUAL_ENCODER).pp("vision_model"))?,
            projector: load_projector(
                &projector,
                width,
                text.hidden_size,
                &params.pp(PROJECTOR).pp("model"),
            )?,
            base: Base {
                spec: LmmSpec {
                    layers: text.num_layers,
                    heads: text.num_heads,
                    grid: (grid, grid),
                    channels: text.maps(),
                    ..*spec
                },
                decoder: Decoder::load(text, &params.pp(LLM))?,
                tokenizer,
                format,
                image_token,
                stop_ids,
            },
        };
        params.finish(WRONG_FOLDER)?;
        Ok(model)
    }
}

impl Lmm for Hpt {
    fn base(&self) -> &Base {
        &self.base
    }

    fn prepare_image(&self, image: &RgbImage) -> Result<ImageInput> {
        let (pixel_values, geometry) = self.processor.process(image)?;
        let (rows, columns) = self.base.spec.grid;
        let layout = ImageLayout::single(0, rows, columns);
        let pixel_values = pixel_values.unsqueeze(0)?;
        Ok(ImageInput { pixel_values, pixel_values_aux: None, geometry, layout })
    }

    fn vision_features(&self, image: &ImageInput) -> Result<Tensor> {
        let pixel_values = image.pixel_values.to_device(self.base.decoder.device())?;
        match &self.tower {
            Tower::Clip(tower) => tower.forward(&pixel_values),
            Tower::Siglip(tower) => tower.forward(&pixel_values),
        }
    }

    fn project(&self, _image: &ImageInput, features: &Tensor) -> Result<Tensor> {
        self.projector.forward(&features.squeeze(0)?)
    }
}

/// The tower of either model.
#[derive(Debug)]
enum Tower {
    Clip(ClipVision),
    Siglip(SiglipVision),
}

/// What is known of a tower before its tensors are.
#[derive(Debug)]
enum TowerConfig {
    Clip(ClipConfig),
    Siglip(SiglipConfig),
}

impl TowerConfig {
    /// Reads `config.json` of `dir`, for pictures of `side × side`.
    fn read(variant: Variant, dir: &Path, side: usize) -> Result<Self> {
        let config = Config::read(&dir.join("config.json"))?;
        Ok(match variant {
            Variant::Air => Self::Clip(ClipConfig::from_config(&config, FEATURE_LAYER)?.at_size(side)),
            Variant::Air15 => Self::Siglip(SiglipConfig::from_config(&config, FEATURE_LAYER)?.at_size(side)),
        })
    }

    /// Width of the features, side of a patch in pixels.
    fn width_and_patch(&self) -> (usize, usize) {
        match self {
            Self::Clip(config) => (config.hidden_size, config.patch_size),
            Self::Siglip(config) => (config.hidden_size, config.patch_size),
        }
    }

    fn load(self, params: &Params) -> Result<Tower> {
        Ok(match self {
            Self::Clip(config) => Tower::Clip(ClipVision::load(config, params)?),
            Self::Siglip(config) => Tower::Siglip(SiglipVision::load(config, params)?),
        })
    }
}

/// The linear layers `model.0`, `model.2`, …: activations have the numbers between.
fn load_projector(dir: &Path, inputs: usize, outputs: usize, params: &Params) -> Result<Projector> {
    let config = Config::read(&dir.join("config.json"))?;
    supported(&config, "hidden_act", "gelu")?;
    let layers = (0..config.layers_or("depth", 2)?).map(|index| params.pp(2 * index));
    Projector::load(inputs, outputs, config.flag_or("bias", true)?, layers)
}

/// The tensors of the three folders, each below its folder's name.
fn load_folders(dir: &Path, options: &OpenOptions) -> Result<HashMap<String, Tensor>> {
    let mut tensors = HashMap::new();
    for name in FOLDERS {
        if !files::is_file(&dir.join(name).join("config.json")) {
            return Err(incomplete(dir, &format!("no {name}/config.json")));
        }
        let loaded = options.load(&dir.join(name))?;
        tensors.extend(loaded.into_iter().map(|(tensor, value)| (format!("{name}.{tensor}"), value)));
    }
    Ok(tensors)
}

fn incomplete(dir: &Path, what: &str) -> Error {
    let hint = "give the folder that holds llm/, visual_encoder/ and projector/ as published";
    Error::config(dir, format!("the folder of an HPT is incomplete: {what}"), hint)
}

/// Tokens per side of pictures of `side × side`. Refuses sides that patches do not fill, and pictures with more
/// tokens than the language model could read.
fn grid(side: usize, patch: usize, max_positions: usize) -> Result<usize> {
    let hint = "leave the picture size out to get the published one";
    let grid = side / patch;
    if grid == 0 || !side.is_multiple_of(patch) {
        let what = format!("pictures of {side} × {side} cannot be cut into patches of {patch} × {patch}");
        return Err(Error::request(what, hint));
    }
    match grid.checked_mul(grid) {
        Some(tokens) if tokens < max_positions => Ok(grid),
        _ => Err(Error::request(
            format!(
                "pictures of {side} × {side} are {grid} × {grid} tokens, more than the {max_positions} that the \
                 language model reads"
            ),
            hint,
        )),
    }
}
