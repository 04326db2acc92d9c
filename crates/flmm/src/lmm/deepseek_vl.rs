//! DeepSeek-VL 1.3B and 7B: SigLIP, or SAM's encoder beside SigLIP, a projector, a Llama-shaped decoder
//! (`spec/models.md` §7).

mod towers;

use std::borrow::Cow;
use std::path::Path;

use candle_core::Tensor;
use image::RgbImage;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::layout::ImageLayout;
use crate::lmm::shared::{Projector, TESTED, WRONG_FOLDER, required_token, stop_ids};
use crate::lmm::{
    Base, GROUNDING_INSTRUCTION, ImageInput, Lmm, LmmSpec, OpenOptions, Role, Turn, config_of_type,
};
use crate::nn::{Linear, gelu};
use crate::text::chat::DEEPSEEK;
use crate::text::tokenizer::Tokenizer;
use crate::text::{Decoder, DecoderConfig};
use crate::vision::preprocess::LlavaProcessor;
use crate::weights::Params;

use towers::{HYBRID, Tower};

/// The published model with one tower.
pub const DEEPSEEK_VL_1_3B: LmmSpec = LmmSpec {
    name: "DeepSeekVL-1.3B",
    repo: "deepseek-ai/deepseek-vl-1.3b-chat",
    model_type: "multi_modality",
    layers: 24,
    heads: 16,
    grid: (24, 24),
    channels: 384,
    several_images: true,
    tested: TESTED,
};

/// The published model with two towers.
pub const DEEPSEEK_VL_7B: LmmSpec = LmmSpec {
    name: "DeepSeekVL-7B",
    repo: "deepseek-ai/deepseek-vl-7b-chat",
    layers: 30,
    heads: 32,
    channels: 960,
    ..DEEPSEEK_VL_1_3B
};

/// What the model is told before a conversation, unless the conversation brings instructions of its own.
pub const SYSTEM: &str = "You are a helpful language and vision assistant. You are able to understand the visual \
                          content that the user provides, and assist the user with a variety of tasks using natural \
                          language.";

/// An opened DeepSeek-VL.
#[derive(Debug)]
pub struct DeepSeekVl {
    base: Base,
    processor: LlavaProcessor,
    tower: Tower,
    aligner: Aligner,
}

/// Whether `dir` holds a DeepSeek-VL with one tower. A tower of unknown kind is explained when it is opened.
pub(crate) fn recognises_siglip(dir: &Path) -> Result<bool> {
    Ok(tower_class(dir)?.is_some_and(|class| class != HYBRID))
}

/// Whether `dir` holds a DeepSeek-VL with two towers.
pub(crate) fn recognises_hybrid(dir: &Path) -> Result<bool> {
    Ok(tower_class(dir)?.is_some_and(|class| class == HYBRID))
}

fn tower_class(dir: &Path) -> Result<Option<String>> {
    let Some(config) = config_of_type(dir, DEEPSEEK_VL_1_3B.model_type)? else { return Ok(None) };
    Ok(Some(config.object("vision_config")?.text("cls")?.to_owned()))
}

/// [`DeepSeekVl::open`] as [`crate::lmm::REGISTRY`] wants it.
pub(crate) fn open(spec: &LmmSpec, dir: &Path, options: &OpenOptions) -> Result<Box<dyn Lmm>> {
    Ok(Box::new(DeepSeekVl::open(spec, dir, options)?))
}

impl DeepSeekVl {
    /// Opens a folder as published; `spec` is its line in the registry. Sizes of the decoder come from
    /// `config.json`, those of the towers from their names.
    pub fn open(spec: &LmmSpec, dir: &Path, options: &OpenOptions) -> Result<Self> {
        let config = Config::read(&dir.join("config.json"))?;
        let text = DecoderConfig::from_config(&config.object("language_config")?)?;
        let processor = LlavaProcessor::from_vlm_config(dir)?;
        let tokenizer = Tokenizer::load(dir)?;
        let image_token = required_token(dir, &tokenizer, DEEPSEEK.image, "which stands for the picture")?;
        let stop_ids = stop_ids(dir, &tokenizer, &DEEPSEEK)?;

        let (dtype, device) = (options.dtype, &options.device);
        let params = Params::new(dir, options.load(dir)?).in_format(options.weights);
        let tower = Tower::load(&config, dtype, device, &params.pp("vision_model"))?;
        let (side, read) = (tower.image_size(), processor.side());
        if side != read {
            return Err(Error::config(
                dir.join("preprocessor_config.json"),
                format!("makes pictures of {read} × {read} pixels, the vision tower reads {side} × {side}"),
                "preprocessor_config.json and config.json do not belong together; download both again",
            ));
        }
        let grid = tower.grid();
        let model = Self {
            aligner: Aligner::load(&config, &tower, text.hidden_size, &params.pp("aligner"))?,
            base: Base {
                spec: LmmSpec {
                    layers: text.num_layers,
                    heads: text.num_heads,
                    grid: (grid, grid),
                    channels: text.maps(),
                    ..*spec
                },
                decoder: Decoder::load(text, &params.pp("language_model"))?,
                tokenizer,
                format: &DEEPSEEK,
                image_token,
                stop_ids,
            },
            processor,
            tower,
        };
        params.finish(WRONG_FOLDER)?;
        Ok(model)
    }

    /// What the towers are given, in the model's type.
    fn pixels(&self, image: &ImageInput) -> Result<Tensor> {
        Ok(image.pixel_values.to_device(self.base.decoder.device())?.to_dtype(self.base.decoder.dtype())?)
    }
}

impl Lmm for DeepSeekVl {
    fn base(&self) -> &Base {
        &self.base
    }

    /// The text of a conversation begins with [`SYSTEM`] unless it has instructions of its own; the instruction that
    /// texts are grounded behind has none, as in training. White space around questions is left out.
    fn conversation<'a>(&self, turns: &'a [Turn]) -> Cow<'a, [Turn]> {
        Cow::Owned(conversation(turns))
    }

    fn prepare_image(&self, image: &RgbImage) -> Result<ImageInput> {
        let (pixel_values, geometry) = self.processor.process(image)?;
        let (rows, columns) = self.base.spec.grid;
        let layout = ImageLayout::single(0, rows, columns);
        let pixel_values = pixel_values.unsqueeze(0)?;
        Ok(ImageInput { pixel_values, pixel_values_aux: None, geometry, layout })
    }

    /// Of two towers, both outputs side by side: high, then low.
    fn vision_features(&self, image: &ImageInput) -> Result<Tensor> {
        let pixels = self.pixels(image)?;
        match &self.tower {
            Tower::Siglip(tower, None) => tower.forward(&pixels),
            Tower::Siglip(tower, Some(norm)) => tower.forward(&norm.forward(&pixels)?),
            Tower::Hybrid(towers) => {
                let (high, low) = towers.forward(&pixels)?;
                Ok(Tensor::cat(&[&high, &low], 2)?)
            }
        }
    }

    fn project(&self, _image: &ImageInput, features: &Tensor) -> Result<Tensor> {
        self.aligner.forward(&features.squeeze(0)?)
    }

    fn intermediates(&self, image: &ImageInput) -> Result<Vec<(&'static str, Tensor)>> {
        let Tower::Hybrid(towers) = &self.tower else { return Ok(Vec::new()) };
        let pixels = self.pixels(image)?;
        let (high, low) = towers.forward(&pixels)?;
        Ok(vec![("low_resized", towers.small(&pixels)?), ("high_out", high), ("low_out", low)])
    }
}

/// `turns` as the model's own chat writes them.
fn conversation(turns: &[Turn]) -> Vec<Turn> {
    let trimmed = |turn: &Turn| match turn.role {
        // The model may be asked to continue its answer from the last space on.
        Role::Assistant | Role::Opening => turn.clone(),
        Role::User | Role::System => turn.trimmed(),
    };
    // The published wrapper has no system text: what is grounded or begun for the model is written with it alone.
    let begun = turns.last().is_some_and(|last| last.role == Role::Opening);
    let bare = match turns.first() {
        Some(first) => first.role != Role::User || first.text == GROUNDING_INSTRUCTION,
        None => true,
    };
    let system = (!bare && !begun).then(|| Turn::system(SYSTEM));
    system.into_iter().chain(turns.iter().map(trimmed)).collect()
}

/// From the towers' widths to the decoder's.
#[derive(Debug)]
enum Aligner {
    /// Linear layers with GELU between them.
    Mlp(Projector),
    /// The first layer is one for each tower; their outputs lie side by side.
    Split { high_width: usize, high_up_proj: Linear, low_up_proj: Linear, linear: Linear },
}

impl Aligner {
    fn load(config: &Config, tower: &Tower, hidden: usize, params: &Params) -> Result<Self> {
        let settings = config.object("aligner_config")?.object("params")?;
        let depth = settings.size_or("depth", 1)?;
        if depth != 2 {
            let what = format!("{depth} layers are not supported; known: 2");
            return Err(settings.error("depth", what, "use a model with the published setting"));
        }
        params.claim(&[]);
        let layers = params.pp("layers");
        let kind = settings.text("projector_type")?;
        match (tower, kind) {
            // The other entry of `layers` is the activation.
            (Tower::Siglip(tower, _), "mlp_gelu") => {
                let layers = [0, 2].map(|index| layers.pp(index));
                Ok(Self::Mlp(Projector::load(tower.config().hidden_size, hidden, true, layers)?))
            }
            (Tower::Hybrid(towers), "low_high_hybrid_split_mlp_gelu") => {
                let (high_width, low_width) = towers.widths();
                let half = hidden / 2;
                Ok(Self::Split {
                    high_width,
                    high_up_proj: Linear::load(high_width, half, true, &params.pp("high_up_proj"))?,
                    low_up_proj: Linear::load(low_width, hidden - half, true, &params.pp("low_up_proj"))?,
                    linear: Linear::load(hidden, hidden, true, &layers.pp(1))?,
                })
            }
            (tower, kind) => {
                let only = match tower {
                    Tower::Siglip(..) => "mlp_gelu",
                    Tower::Hybrid(_) => "low_high_hybrid_split_mlp_gelu",
                };
                Err(settings.error(
                    "projector_type",
                    format!("`{kind}` is not supported with this vision tower; known: {only}"),
                    "use a model with the published setting",
                ))
            }
        }
    }

    /// `[tokens, width]` → `[tokens, hidden]`.
    fn forward(&self, features: &Tensor) -> Result<Tensor> {
        match self {
            Self::Mlp(layers) => layers.forward(features),
            Self::Split { high_width, high_up_proj, low_up_proj, linear } => {
                let low_width = features.dim(1)? - high_width;
                let high = high_up_proj.forward(&features.narrow(1, 0, *high_width)?.contiguous()?)?;
                let low = low_up_proj.forward(&features.narrow(1, *high_width, low_width)?.contiguous()?)?;
                linear.forward(&gelu(&Tensor::cat(&[&high, &low], 1)?)?)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversations_have_a_system_text_and_grounding_has_none() {
        let text = |turns: &[Turn]| DEEPSEEK.render(&conversation(turns), 1).unwrap();
        assert_eq!(
            text(&[Turn::user(GROUNDING_INSTRUCTION)]),
            format!("User: <image_placeholder>{GROUNDING_INSTRUCTION}\n\nAssistant:")
        );
        assert_eq!(
            text(&[Turn::user(" What?\n")]),
            format!("{SYSTEM}\n\nUser: <image_placeholder>What?\n\nAssistant:")
        );
        assert_eq!(
            text(&[Turn::system("S"), Turn::user("Q"), Turn::assistant("A ")]),
            "S\n\nUser: <image_placeholder>Q\n\nAssistant: A "
        );
        assert_eq!(text(&[Turn::system(""), Turn::user("Q")]), "User: <image_placeholder>Q\n\nAssistant:");
        assert!(DEEPSEEK.render(&conversation(&[]), 1).is_err());
    }
}
