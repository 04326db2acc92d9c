//! LLaVA-1.5: CLIP ViT-L/14-336, a two-layer projector, Vicuna (`spec/models.md` §5).

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use image::RgbImage;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::layout::ImageLayout;
use crate::lmm::shared::{Projector, WRONG_FOLDER, stop_ids, supported};
use crate::lmm::{ImageInput, Lmm, LmmSpec, OpenOptions, Turn, config_of_type};
use crate::text::chat;
use crate::text::tokenizer::Tokenizer;
use crate::text::{Decoder, DecoderConfig};
use crate::vision::clip::{ClipConfig, ClipVision};
use crate::vision::preprocess::LlavaProcessor;
use crate::weights::{Params, load_checkpoint};

/// The published model.
pub const LLAVA_1_5_7B: LmmSpec = LmmSpec {
    name: "LLaVA-1.5-7B",
    repo: "llava-hf/llava-1.5-7b-hf",
    model_type: "llava",
    layers: 32,
    heads: 32,
    grid: (24, 24),
    channels: 1024,
    tested: "parity with the reference on small random weights in the published layout, f32 and bf16",
};

/// An opened LLaVA-1.5.
#[derive(Debug)]
pub struct Llava {
    spec: LmmSpec,
    tokenizer: Tokenizer,
    processor: LlavaProcessor,
    vision: ClipVision,
    projector: Projector,
    decoder: Decoder,
    image_token: u32,
    stop_ids: Vec<u32>,
}

/// Whether `dir` holds a LLaVA-1.5.
pub(crate) fn recognises(dir: &Path) -> Result<bool> {
    Ok(config_of_type(dir, LLAVA_1_5_7B.model_type)?.is_some())
}

/// [`Llava::open`] as [`crate::lmm::REGISTRY`] wants it.
pub(crate) fn open(spec: &LmmSpec, dir: &Path, options: &OpenOptions) -> Result<Box<dyn Lmm>> {
    Ok(Box::new(Llava::open(spec, dir, options.dtype, &options.device)?))
}

impl Llava {
    /// Opens a Hugging Face folder; `spec` is its line in the registry. Sizes come from `config.json`.
    pub fn open(spec: &LmmSpec, dir: &Path, dtype: DType, device: &Device) -> Result<Self> {
        let config = Config::read(&dir.join("config.json"))?;
        let text = DecoderConfig::from_config(&config.object("text_config")?)?;
        let layer = config.integer_or("vision_feature_layer", -2)?;
        let clip = ClipConfig::from_config(&config.object("vision_config")?, layer)?;
        supported(&config, "vision_feature_select_strategy", "default")?;
        supported(&config, "projector_hidden_act", "gelu")?;
        let tokenizer = Tokenizer::load(dir)?;
        let image_token = image_token(&config)?;
        let stop_ids = stop_ids(dir, &tokenizer, &chat::VICUNA)?;

        let tensors = load_checkpoint(dir, Some(dtype), device)?;
        let params = Params::new(dir, canonical(tensors));
        let projector = params.pp("multi_modal_projector");
        let bias = config.flag_or("multimodal_projector_bias", true)?;
        let (inputs, outputs) = (clip.hidden_size, text.hidden_size);
        let grid = clip.grid();
        let model = Self {
            spec: LmmSpec {
                layers: text.num_layers,
                heads: text.num_heads,
                grid: (grid, grid),
                channels: text.maps(),
                ..*spec
            },
            processor: LlavaProcessor::from_config(dir)?,
            vision: ClipVision::load(clip, &params.pp("vision_tower.vision_model"))?,
            projector: Projector::load(
                inputs,
                outputs,
                bias,
                ["linear_1", "linear_2"].map(|name| projector.pp(name)),
            )?,
            decoder: Decoder::load(text, &params.pp("language_model"))?,
            tokenizer,
            image_token,
            stop_ids,
        };
        params.finish(WRONG_FOLDER)?;
        Ok(model)
    }
}

impl Lmm for Llava {
    fn spec(&self) -> &LmmSpec {
        &self.spec
    }

    fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    fn image_token(&self) -> u32 {
        self.image_token
    }

    fn stop_ids(&self) -> &[u32] {
        &self.stop_ids
    }

    fn prompt(&self, turns: &[Turn]) -> Result<Vec<u32>> {
        self.tokenizer.encode(&chat::vicuna(turns)?, true)
    }

    fn prepare_image(&self, image: &RgbImage) -> Result<ImageInput> {
        let (pixel_values, geometry) = self.processor.process(image)?;
        let side = self.vision.config().image_size;
        if pixel_values.dims() != [3, side, side] {
            return Err(Error::image(
                format!(
                    "the processor makes pictures of shape {:?}, the vision tower reads {side} × {side}",
                    pixel_values.dims()
                ),
                "preprocessor_config.json and config.json of the model do not belong together",
            ));
        }
        let pixel_values = pixel_values.unsqueeze(0)?;
        let grid = self.vision.config().grid();
        Ok(ImageInput {
            pixel_values,
            pixel_values_aux: None,
            geometry,
            layout: ImageLayout::single(0, grid, grid),
        })
    }

    fn vision_features(&self, image: &ImageInput) -> Result<Tensor> {
        self.vision.forward(&image.pixel_values.to_device(self.decoder.device())?)
    }

    fn project(&self, _image: &ImageInput, features: &Tensor) -> Result<Tensor> {
        self.projector.forward(&features.squeeze(0)?)
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

/// `image_token_index`, called `image_token_id` in newer uploads; 32000 where neither is written.
fn image_token(config: &Config) -> Result<u32> {
    let key = if config.get("image_token_id").is_some() { "image_token_id" } else { "image_token_index" };
    let id = config.integer_or(key, 32_000)?;
    u32::try_from(id).map_err(|_| config.error(key, format!("{id} is not a token id"), "correct the value"))
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
        ] {
            assert_eq!(canonical_name(name), expected);
        }
    }
}
