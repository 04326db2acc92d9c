//! LLaVA-1.6 with Vicuna or Mistral: LLaVA-1.5's parts, any-resolution crops of the picture beside a base view, and
//! a learned newline behind every row of the crops' tokens (`spec/models.md` §6).

use std::path::Path;

use candle_core::Tensor;
use image::RgbImage;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::geometry::Geometry;
use crate::layout::ImageLayout;
use crate::lmm::llava::Parts;
use crate::lmm::shared::{TESTED, WRONG_FOLDER, required_token};
use crate::lmm::{Base, ImageInput, Lmm, LmmSpec, OpenOptions, config_of_type};
use crate::text::chat::{ChatFormat, MISTRAL, VICUNA};
use crate::vision::anyres::{AnyResProcessor, unpad};

/// The published model with Vicuna.
pub const LLAVA_NEXT_VICUNA_7B: LmmSpec = LmmSpec {
    name: "LLaVA-1.6-7B",
    repo: "llava-hf/llava-v1.6-vicuna-7b-hf",
    model_type: "llava_next",
    layers: 32,
    heads: 32,
    grid: (48, 48),
    channels: 2048,
    several_images: true,
    tested: TESTED,
};

/// The published model with Mistral.
pub const LLAVA_NEXT_MISTRAL_7B: LmmSpec = LmmSpec {
    name: "LLaVA-1.6-Mistral-7B",
    repo: "llava-hf/llava-v1.6-mistral-7b-hf",
    ..LLAVA_NEXT_VICUNA_7B
};

/// An opened LLaVA-1.6.
#[derive(Debug)]
pub struct LlavaNext {
    parts: Parts,
    processor: AnyResProcessor,
    /// `[hidden]`
    image_newline: Tensor,
}

/// Whether `dir` holds a LLaVA-1.6 with Vicuna.
pub(crate) fn recognises_vicuna(dir: &Path) -> Result<bool> {
    recognises(dir, "llama")
}

/// Whether `dir` holds a LLaVA-1.6 with Mistral.
pub(crate) fn recognises_mistral(dir: &Path) -> Result<bool> {
    recognises(dir, "mistral")
}

/// Whether `dir` holds a LLaVA-1.6 whose language model is of type `wanted`; an unknown type is an error.
fn recognises(dir: &Path, wanted: &str) -> Result<bool> {
    let Some(config) = config_of_type(dir, LLAVA_NEXT_VICUNA_7B.model_type)? else { return Ok(false) };
    let text = config.object("text_config")?;
    match text.text_or("model_type", "llama")? {
        found @ ("llama" | "mistral") => Ok(found == wanted),
        other => Err(text.error(
            "model_type",
            format!("`{other}` is not supported in LLaVA-1.6; known: llama (Vicuna), mistral"),
            "use LLaVA-1.6 with Vicuna or Mistral",
        )),
    }
}

/// [`LlavaNext::open`] with Vicuna's prompt, as [`crate::lmm::REGISTRY`] wants it.
pub(crate) fn open_vicuna(spec: &LmmSpec, dir: &Path, options: &OpenOptions) -> Result<Box<dyn Lmm>> {
    Ok(Box::new(LlavaNext::open(spec, dir, options, &VICUNA)?))
}

/// [`LlavaNext::open`] with Mistral's prompt, as [`crate::lmm::REGISTRY`] wants it.
pub(crate) fn open_mistral(spec: &LmmSpec, dir: &Path, options: &OpenOptions) -> Result<Box<dyn Lmm>> {
    Ok(Box::new(LlavaNext::open(spec, dir, options, &MISTRAL)?))
}

impl LlavaNext {
    /// Opens a Hugging Face folder; `spec` is its line in the registry. Sizes come from `config.json`, the
    /// resolutions of crops from `preprocessor_config.json`.
    ///
    /// # Errors
    /// [`Error::Config`] for settings and tokenizers that do not fit, [`Error::Weights`] with every missing or
    /// misshapen tensor.
    pub fn open(
        spec: &LmmSpec,
        dir: &Path,
        options: &OpenOptions,
        format: &'static ChatFormat,
    ) -> Result<Self> {
        let config = Config::read(&dir.join("config.json"))?;
        let processor = AnyResProcessor::from_config(dir, config.get("image_grid_pinpoints"))?;
        let (mut parts, params) = Parts::load(spec, dir, &config, format, options)?;
        parts.check_processor(&config, processor.side())?;
        // Larger LLaVA-1.6 have decoders of the same type with other prompts; their tokenizers give them away.
        let why = "which the prompts of LLaVA-1.6 with Vicuna and Mistral have between turns";
        required_token(dir, &parts.base.tokenizer, format.between, why)?;
        let image_newline = params.get(&[parts.base.decoder.config().hidden_size], "image_newline")?;
        params.finish(WRONG_FOLDER)?;

        parts.base.spec.channels = 2 * parts.base.decoder.config().maps();
        let mut model = Self { parts, processor, image_newline };
        let side = 4 * model.processor.side();
        let fine = model.fine_grid(&model.processor.geometry((side, side))?);
        model.parts.base.spec.grid = (fine.rows, fine.columns);
        Ok(model)
    }

    /// The crops' tokens that show the picture.
    fn fine_grid(&self, geometry: &Geometry) -> FineGrid {
        let side = self.parts.vision.config().grid();
        let crops = self.processor.crop_grid(geometry);
        let (top, left, rows, columns) = unpad(geometry.original, (side * crops.0, side * crops.1));
        FineGrid { crops, top, left, rows, columns }
    }
}

/// The part of the crops' tokens that shows the picture; the rest shows padding and is cut off.
#[derive(Debug, Clone, Copy)]
struct FineGrid {
    /// Crops per column and per row.
    crops: (usize, usize),
    /// First row of tokens.
    top: usize,
    /// First column of tokens.
    left: usize,
    rows: usize,
    columns: usize,
}

impl Lmm for LlavaNext {
    fn base(&self) -> &Base {
        &self.parts.base
    }

    fn prepare_image(&self, image: &RgbImage) -> Result<ImageInput> {
        let (width, height) = image.dimensions();
        let fine = self.fine_grid(&self.processor.geometry((height as usize, width as usize))?);
        if fine.rows == 0 || fine.columns == 0 {
            return Err(Error::image(
                format!("{width} × {height} pixels is too elongated: no image token would be left"),
                "cut a part out of the picture",
            ));
        }
        let (pixel_values, geometry) = self.processor.process(image)?;
        let side = self.parts.vision.config().grid();
        let layout = ImageLayout::coarse_and_fine(0, side, (fine.rows, fine.columns));
        Ok(ImageInput { pixel_values, pixel_values_aux: None, geometry, layout })
    }

    fn vision_features(&self, image: &ImageInput) -> Result<Tensor> {
        self.parts.vision_features(image)
    }

    /// The base view, then the rows of the crops put together, a newline behind each.
    fn project(&self, image: &ImageInput, features: &Tensor) -> Result<Tensor> {
        let projected = self.parts.projector.forward(features)?;
        let (views, _, hidden) = projected.dims3()?;
        let side = self.parts.vision.config().grid();
        let FineGrid { crops: (down, across), top, left, rows, columns } = self.fine_grid(&image.geometry);
        let fine = projected
            .narrow(0, 1, views - 1)?
            .reshape(&[down, across, side, side, hidden])?
            .transpose(1, 2)?
            .reshape((down * side, across * side, hidden))?
            .narrow(0, top, rows)?
            .narrow(1, left, columns)?;
        let newline = self.image_newline.reshape((1, 1, hidden))?.broadcast_as((rows, 1, hidden))?;
        let fine = Tensor::cat(&[&fine, &newline], 1)?.reshape((rows * (columns + 1), hidden))?;
        Ok(Tensor::cat(&[&projected.get(0)?, &fine], 0)?)
    }
}
