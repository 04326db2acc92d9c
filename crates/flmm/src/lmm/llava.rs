//! LLaVA-1.5: CLIP ViT-L/14-336, a two-layer projector, Vicuna (`spec/models.md` §5).

use std::collections::HashMap;
use std::path::Path;

use candle_core::Tensor;
use image::RgbImage;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::layout::ImageLayout;
use crate::lmm::shared::{Projector, TESTED, WRONG_FOLDER, required_token, stop_ids, supported};
use crate::lmm::{Base, ImageInput, Lmm, LmmSpec, OpenOptions, config_of_type};
use crate::text::chat::{ChatFormat, VICUNA};
use crate::text::tokenizer::Tokenizer;
use crate::text::{Decoder, DecoderConfig};
use crate::vision::clip::{ClipConfig, ClipVision};
use crate::vision::preprocess::LlavaProcessor;
use crate::weights::Params;

/// The published model.
pub const LLAVA_1_5_7B: LmmSpec = LmmSpec {
    name: "LLaVA-1.5-7B",
    repo: "llava-hf/llava-1.5-7b-hf",
    model_type: "llava",
    layers: 32,
    heads: 32,
    grid: (24, 24),
    channels: 1024,
    several_images: true,
    tested: TESTED,
};

/// An opened LLaVA-1.5.
#[derive(Debug)]
pub struct Llava {
    parts: Parts,
    processor: LlavaProcessor,
}

/// Whether `dir` holds a LLaVA-1.5.
pub(crate) fn recognises(dir: &Path) -> Result<bool> {
    Ok(config_of_type(dir, LLAVA_1_5_7B.model_type)?.is_some())
}

/// [`Llava::open`] as [`crate::lmm::REGISTRY`] wants it.
pub(crate) fn open(spec: &LmmSpec, dir: &Path, options: &OpenOptions) -> Result<Box<dyn Lmm>> {
    Ok(Box::new(Llava::open(spec, dir, options)?))
}

impl Llava {
    /// Opens a Hugging Face folder; `spec` is its line in the registry. Sizes come from `config.json`.
    pub fn open(spec: &LmmSpec, dir: &Path, options: &OpenOptions) -> Result<Self> {
        let config = Config::read(&dir.join("config.json"))?;
        let processor = LlavaProcessor::from_config(dir)?;
        let (mut parts, params) = Parts::load(spec, dir, &config, &VICUNA, options)?;
        parts.check_processor(&config, processor.side())?;
        params.finish(WRONG_FOLDER)?;
        let grid = parts.vision.config().grid();
        (parts.base.spec.grid, parts.base.spec.channels) = ((grid, grid), parts.base.decoder.config().maps());
        Ok(Self { parts, processor })
    }
}

impl Lmm for Llava {
    fn base(&self) -> &Base {
        &self.parts.base
    }

    fn prepare_image(&self, image: &RgbImage) -> Result<ImageInput> {
        let (pixel_values, geometry) = self.processor.process(image)?;
        let pixel_values = pixel_values.unsqueeze(0)?;
        let grid = self.parts.vision.config().grid();
        let layout = ImageLayout::single(0, grid, grid);
        Ok(ImageInput { pixel_values, pixel_values_aux: None, geometry, layout })
    }

    fn vision_features(&self, image: &ImageInput) -> Result<Tensor> {
        self.parts.vision_features(image)
    }

    fn project(&self, _image: &ImageInput, features: &Tensor) -> Result<Tensor> {
        self.parts.projector.forward(&features.squeeze(0)?)
    }
}

/// What LLaVA-1.5 and LLaVA-1.6 have in common: everything but the views of a picture and their order.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) base: Base,
    pub(super) vision: ClipVision,
    pub(super) projector: Projector,
}

impl Parts {
    /// Reads the parts from `dir`, whose `config.json` is `config`, and gives the tensors, from which the family
    /// takes what else it has before it calls [`Params::finish`].
    ///
    /// The grid and channels of `spec` are left as published: they are the family's to set.
    pub(super) fn load(
        spec: &LmmSpec,
        dir: &Path,
        config: &Config,
        format: &'static ChatFormat,
        options: &OpenOptions,
    ) -> Result<(Self, Params)> {
        let text = DecoderConfig::from_config(&config.object("text_config")?)?;
        let layer = config.integer_or("vision_feature_layer", -2)?;
        let clip = ClipConfig::from_config(&config.object("vision_config")?, layer)?;
        supported(config, "vision_feature_select_strategy", "default")?;
        supported(config, "projector_hidden_act", "gelu")?;
        let tokenizer = Tokenizer::load(dir)?;
        let image_token = image_token(dir, config, &tokenizer, format.image)?;
        let stop_ids = stop_ids(dir, &tokenizer, format)?;

        let params = Params::new(dir, canonical(options.load(dir)?)).in_format(options.weights);
        let projector = params.pp("multi_modal_projector");
        projector.claim(&[]);
        let layers = ["linear_1", "linear_2"].map(|name| projector.pp(name));
        let bias = config.flag_or("multimodal_projector_bias", true)?;
        let parts = Self {
            projector: Projector::load(clip.hidden_size, text.hidden_size, bias, layers)?,
            vision: ClipVision::load(clip, &params.pp("vision_tower.vision_model"))?,
            base: Base {
                spec: LmmSpec { layers: text.num_layers, heads: text.num_heads, ..*spec },
                decoder: Decoder::load(text, &params.pp("language_model"))?,
                tokenizer,
                format,
                image_token,
                stop_ids,
            },
        };
        Ok((parts, params))
    }

    /// Refuses a processor that makes views of another size than the tower reads.
    pub(super) fn check_processor(&self, config: &Config, side: usize) -> Result<()> {
        match self.vision.config().image_size {
            expected if expected == side => Ok(()),
            expected => Err(Error::config(
                config.file(),
                format!(
                    "`vision_config.image_size`: the vision tower reads {expected} × {expected} pixels, \
                     preprocessor_config.json makes views of {side} × {side}"
                ),
                "preprocessor_config.json and config.json do not belong together; download both again",
            )),
        }
    }

    /// `[views, tokens, width]`
    pub(super) fn vision_features(&self, image: &ImageInput) -> Result<Tensor> {
        self.vision.forward(&image.pixel_values.to_device(self.base.decoder.device())?)
    }
}

/// Names as first published, whatever prefixes the upload uses; tensors of other kinds keep their names.
///
/// Newer uploads say `model.language_model.layers…`, `model.vision_tower.…`, `lm_head.weight`; the oldest ones
/// `language_model.model.layers…`, `language_model.lm_head.weight`.
fn canonical(tensors: HashMap<String, Tensor>) -> HashMap<String, Tensor> {
    tensors.into_iter().map(|(name, tensor)| (canonical_name(&name), tensor)).collect()
}

fn canonical_name(name: &str) -> String {
    let behind = |part: &str| name.find(part).map(|at| &name[at + part.len()..]);
    if let Some(rest) = behind("vision_tower.") {
        return format!("vision_tower.vision_model.{}", rest.strip_prefix("vision_model.").unwrap_or(rest));
    }
    if behind("image_newline") == Some("") {
        return "image_newline".to_owned();
    }
    if let Some(rest) = behind("multi_modal_projector.") {
        return format!("multi_modal_projector.{rest}");
    }
    if let Some(rest) = behind("lm_head.") {
        return format!("language_model.lm_head.{rest}");
    }
    if let Some(rest) = behind("language_model.") {
        return format!("language_model.model.{}", rest.strip_prefix("model.").unwrap_or(rest));
    }
    name.to_owned()
}

/// `image_token_index`, called `image_token_id` in newer uploads; 32000 where neither is written. The tokenizer's
/// `token` must have that id.
fn image_token(dir: &Path, config: &Config, tokenizer: &Tokenizer, token: &str) -> Result<u32> {
    let found = required_token(dir, tokenizer, token, "which stands for the picture")?;
    let key = if config.get("image_token_id").is_some() { "image_token_id" } else { "image_token_index" };
    match config.integer_or(key, 32_000)? {
        id if id == i64::from(found) => Ok(found),
        id => Err(config.error(
            key,
            format!("the image token is said to be {id}, but the tokenizer's `{token}` is {found}"),
            "config.json and tokenizer.json do not belong together; download both again",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::canonical_name;

    #[test]
    fn older_and_newer_names_meet() {
        let q = "language_model.model.layers.3.self_attn.q_proj.weight";
        let head = "language_model.lm_head.weight";
        let class = "vision_tower.vision_model.embeddings.class_embedding";
        for (name, expected) in [
            (q, q),
            ("model.language_model.layers.3.self_attn.q_proj.weight", q),
            ("model.language_model.model.layers.3.self_attn.q_proj.weight", q),
            (head, head),
            ("lm_head.weight", head),
            (class, class),
            ("model.vision_tower.vision_model.embeddings.class_embedding", class),
            ("vision_tower.embeddings.class_embedding", class),
            ("model.multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
            ("image_newline", "image_newline"),
            ("model.image_newline", "image_newline"),
            ("other", "other"),
        ] {
            assert_eq!(canonical_name(name), expected);
        }
    }
}
