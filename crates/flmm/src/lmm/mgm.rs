//! Mini-Gemini: CLIP reads the picture, a ConvNeXt reads it larger, and every token of the first looks up details in
//! its patch of the second (`spec/models.md` §8).

mod mining;
mod towers;

use std::path::Path;

use candle_core::Tensor;
use image::RgbImage;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::layout::ImageLayout;
use crate::lmm::shared::{Projector, TESTED, WRONG_FOLDER, required_token, stop_ids, supported};
use crate::lmm::{Base, ImageInput, Lmm, LmmSpec, OpenOptions, config_of_type};
use crate::text::chat;
use crate::text::tokenizer::Tokenizer;
use crate::text::{Decoder, DecoderConfig};
use crate::vision::clip::ClipVision;
use crate::vision::convnext::{ConvNext, FeatureMap};
use crate::vision::dual::DualProcessor;
use crate::vision::preprocess::Normalisation;
use crate::weights::Params;

use mining::PatchMining;
use towers::Towers;

/// The published model with Gemma-2B.
pub const MGM_2B: LmmSpec = LmmSpec {
    name: "MGM-2B",
    repo: "YanweiLi/MGM-2B",
    model_type: "mgm_gemma",
    layers: 18,
    heads: 8,
    grid: (24, 24),
    channels: 144,
    several_images: false,
    tested: TESTED,
};

/// The published model with Vicuna-7B.
pub const MGM_7B: LmmSpec = LmmSpec {
    name: "MGM-7B",
    repo: "YanweiLi/MGM-7B",
    model_type: "mgm",
    layers: 32,
    heads: 32,
    grid: (24, 24),
    channels: 1024,
    several_images: false,
    tested: TESTED,
};

/// The published model with Vicuna-7B that sees four crops and the whole picture.
pub const MGM_HD_7B: LmmSpec =
    LmmSpec { name: "MGM-HD-7B", repo: "YanweiLi/MGM-7B-HD", grid: (48, 48), channels: 2048, ..MGM_7B };

/// Largest auxiliary input accepted, in pixels per side; the published ones are 768 and 1536.
const MAX_AUX: usize = 4096;

/// An opened Mini-Gemini.
#[derive(Debug)]
pub struct Mgm {
    base: Base,
    processor: DualProcessor,
    /// Crops per side; 1: the whole picture is the only view.
    image_grid: usize,
    vision: ClipVision,
    vision_aux: ConvNext,
    mining: PatchMining,
    projector: Projector,
    tokenizer_model_max_length: Option<usize>,
}

/// Whether `dir` holds a Mini-Gemini with Gemma.
pub(crate) fn recognises_gemma(dir: &Path) -> Result<bool> {
    Ok(config_of_type(dir, MGM_2B.model_type)?.is_some())
}

/// Whether `dir` holds a Mini-Gemini with Vicuna that sees the picture in one view.
pub(crate) fn recognises_vicuna(dir: &Path) -> Result<bool> {
    vicuna_with(dir, |grid| grid == 1)
}

/// Whether `dir` holds a Mini-Gemini with Vicuna that sees crops.
pub(crate) fn recognises_vicuna_hd(dir: &Path) -> Result<bool> {
    vicuna_with(dir, |grid| grid != 1)
}

fn vicuna_with(dir: &Path, wanted: impl Fn(usize) -> bool) -> Result<bool> {
    match config_of_type(dir, MGM_7B.model_type)? {
        Some(config) => Ok(wanted(config.size_or("image_grid", 1)?)),
        None => Ok(false),
    }
}

/// [`Mgm::open`] as [`crate::lmm::REGISTRY`] wants it.
pub(crate) fn open(spec: &LmmSpec, dir: &Path, options: &OpenOptions) -> Result<Box<dyn Lmm>> {
    Ok(Box::new(Mgm::open(spec, dir, options)?))
}

impl Mgm {
    /// Opens a folder as published; `spec` is its line in the registry. The towers lie in folders of their own:
    /// those that `options` name, else folders inside or beside `dir` with the last names of `mm_vision_tower` and
    /// `mm_vision_tower_aux` of `config.json`. Sizes come from the configurations and, for ConvNeXt, the tensors.
    ///
    /// # Errors
    /// [`Error::Weights`] if a tower's folder is not there, or with every missing or misshapen tensor of a part;
    /// [`Error::Config`] for values that are out of range, not supported, or do not fit the towers.
    pub fn open(spec: &LmmSpec, dir: &Path, options: &OpenOptions) -> Result<Self> {
        let config = Config::read(&dir.join("config.json"))?;
        let gemma = config.text("model_type")? == MGM_2B.model_type;
        let text = DecoderConfig::of_type(&config, if gemma { "gemma" } else { "llama" })?;
        let format = if gemma { &chat::GEMMA } else { &chat::VICUNA };
        supported(&config, "mm_projector_type", "mlp2x_gelu")?;
        supported(&config, "mm_vision_select_feature", "patch")?;
        let image_grid = image_grid(&config)?;
        let tokenizer_model_max_length = match config.get("tokenizer_model_max_length") {
            Some(_) => Some(config.size("tokenizer_model_max_length")?),
            None => None,
        };
        let towers = Towers::find(dir, &config, options)?;

        let mut tokenizer = Tokenizer::load(dir)?;
        if let Some(word) = format.stop_word {
            required_token(dir, &tokenizer, word, "which ends a turn")?;
        }
        let stop_ids = stop_ids(dir, &tokenizer, format)?;
        // Behind the vocabulary: the token has no embedding, its place is taken by the image features.
        let image_token = tokenizer.add_special_token(format.image)?;

        let params = Params::new(dir, options.load(dir)?).in_format(options.weights);
        let vision = towers.vision(&config, &params, options)?;
        let vision_aux = towers.vision_aux(&config, options)?;
        let clip = vision.config();
        let side_aux = side_aux(&config, &vision_aux, clip.grid() * image_grid)?;
        let model = params.pp("model");
        model.pp("mm_projector").claim(&[]);
        let projector = [0, 2].map(|index| model.pp("mm_projector").pp(index));
        let layout = layout(clip.grid(), image_grid);
        let opened = Self {
            processor: DualProcessor::new(
                clip.image_size,
                side_aux,
                image_grid,
                Normalisation::from_config(&towers.vision)?,
            ),
            mining: PatchMining::load(clip.hidden_size, vision_aux.channels(), &model)?,
            projector: Projector::load(clip.hidden_size, text.hidden_size, true, projector)?,
            base: Base {
                spec: LmmSpec {
                    layers: text.num_layers,
                    heads: text.num_heads,
                    grid: layout.size(),
                    channels: layout.channels(text.num_layers, text.num_heads),
                    ..*spec
                },
                decoder: Decoder::load(text, &params)?,
                tokenizer,
                format,
                image_token,
                stop_ids,
            },
            vision,
            vision_aux,
            image_grid,
            tokenizer_model_max_length,
        };
        params.finish(WRONG_FOLDER)?;
        Ok(opened)
    }

    /// The auxiliary tower's feature map `[channels, A / 4, A / 4]`.
    fn aux_map(&self, image: &ImageInput) -> Result<FeatureMap> {
        let Some(pixels) = &image.pixel_values_aux else {
            return Err(Error::image(
                "it was prepared for another model: the auxiliary input is missing",
                "prepare the picture with the model that reads it",
            ));
        };
        self.vision_aux.feature_map(&pixels.to_device(self.base.decoder.device())?)
    }
}

/// `image_grid`: 1, or 2 with a global view.
fn image_grid(config: &Config) -> Result<usize> {
    let hint = "use a model with the published settings: 1, or 2 with `image_global`";
    match (config.size_or("image_grid", 1)?, config.flag_or("image_global", false)?) {
        (1, _) => Ok(1),
        (2, true) => Ok(2),
        (2, false) => {
            Err(config.error("image_global", "crops without a global view are not supported", hint))
        }
        (other, _) => Err(config.error("image_grid", format!("{other} is not supported; known: 1, 2"), hint)),
    }
}

/// `image_size_aux`, which must give every one of `across` tokens per side a patch of whole cells.
fn side_aux(config: &Config, tower: &ConvNext, across: usize) -> Result<usize> {
    let side = config.size_or("image_size_aux", 768)?;
    let cells = side / tower.map_stride();
    if side > MAX_AUX || !side.is_multiple_of(tower.stride()) || !cells.is_multiple_of(across) {
        let what = format!(
            "expected at most {MAX_AUX} pixels, a multiple of {} (the auxiliary tower's stride) and of {} (its \
             cells for {across} tokens per side), found {side}",
            tower.stride(),
            tower.map_stride() * across
        );
        return Err(config.error("image_size_aux", what, "correct the value, or use the published towers"));
    }
    Ok(side)
}

/// Tokens of one view, or of the global view and the crops behind it.
fn layout(side: usize, image_grid: usize) -> ImageLayout {
    match image_grid {
        1 => ImageLayout::single(0, side, side),
        grid => ImageLayout::global_and_crops(0, side, grid),
    }
}

impl Lmm for Mgm {
    fn base(&self) -> &Base {
        &self.base
    }

    fn prepare_image(&self, image: &RgbImage) -> Result<ImageInput> {
        let input = self.processor.process(image)?;
        Ok(ImageInput {
            pixel_values: input.main,
            pixel_values_aux: Some(input.aux),
            geometry: input.geometry,
            layout: layout(self.vision.config().grid(), self.image_grid),
        })
    }

    fn vision_features(&self, image: &ImageInput) -> Result<Tensor> {
        self.vision.forward(&image.pixel_values.to_device(self.base.decoder.device())?)
    }

    fn project(&self, image: &ImageInput, features: &Tensor) -> Result<Tensor> {
        self.projector.forward(&self.mining.forward(features, &self.aux_map(image)?)?)
    }

    fn intermediates(&self, image: &ImageInput) -> Result<Vec<(&'static str, Tensor)>> {
        let map = self.aux_map(image)?;
        let mined = self.mining.forward(&self.vision_features(image)?, &map)?.unsqueeze(0)?;
        let seen = |pixels: &Tensor| pixels.to_dtype(self.base.decoder.dtype());
        let mut tensors = vec![("main_image", seen(&image.pixel_values)?)];
        if let Some(aux) = &image.pixel_values_aux {
            tensors.push(("aux_image", seen(aux)?));
        }
        tensors.extend([("aux_map", map.whole()?.unsqueeze(0)?), ("projector_in", mined)]);
        Ok(tensors)
    }

    fn reads_at_most(&self) -> Option<usize> {
        self.tokenizer_model_max_length
    }
}
