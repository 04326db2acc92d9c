//! Large multimodal models: one file per family, one registry.

pub mod deepseek_vl;
pub mod hpt;
pub mod llava;
pub mod llava_next;
pub mod mgm;
pub(crate) mod shared;

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use image::RgbImage;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::geometry::Geometry;
use crate::layout::ImageLayout;
use crate::sam;
use crate::text::Decoder;
use crate::text::chat::ChatFormat;
use crate::text::tokenizer::Tokenizer;
use crate::weights::{
    Packing, WeightFormat, checkpoint_bytes, files, is_rehearsed, load_checkpoint_packed,
    load_checkpoint_with, stored_format,
};

pub use crate::text::chat::{Role, Shown, Turn, order_shown};

/// What the user is taken to have asked when a given text is grounded (`spec/models.md` §2).
pub const GROUNDING_INSTRUCTION: &str = "Please give me a description of the image.";

/// What is worth knowing about a model without opening it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LmmSpec {
    /// Name, as in the paper's tables.
    pub name: &'static str,
    /// Repository of the published weights.
    pub repo: &'static str,
    /// `model_type` of its `config.json`; `hpt` for HPT, whose three folders have one each.
    pub model_type: &'static str,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads per layer.
    pub heads: usize,
    /// Rows and columns of the maps given to the mask head; of a square picture, where they follow its shape.
    pub grid: (usize, usize),
    /// Attention maps given to the mask head.
    pub channels: usize,
    /// Whether a conversation may be about more than one picture.
    pub several_images: bool,
    /// How far the family is proven against the reference.
    pub tested: &'static str,
}

/// What opening a model needs beside its folder.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Type the model computes in.
    pub dtype: DType,
    /// How the matrices of its linear layers are kept.
    pub weights: WeightFormat,
    /// Numbers of the matrices of SAM's image encoder; what is added up in it, and the rest of SAM, stay f32.
    pub sam_dtype: sam::Numbers,
    /// Where it computes.
    pub device: Device,
    /// Folder of the vision tower, for families that keep it in a repository of its own (MGM).
    pub vision_tower: Option<PathBuf>,
    /// Folder of the second vision tower (MGM).
    pub vision_tower_aux: Option<PathBuf>,
    /// Side of the square picture the model sees, in pixels, for families whose files do not tell (HPT); the
    /// published size unless given.
    pub image_size: Option<usize>,
    /// Told how far the weights are read.
    pub progress: Option<LoadProgress>,
    /// Set by [`open_with`], so that a model is never in memory as it is stored and packed at the same time.
    pub packing: Packing,
}

/// Receives bytes read and bytes in all while weights are read; called from the thread that opens the model.
#[derive(Clone)]
pub struct LoadProgress(pub Arc<dyn Fn(u64, u64) + Send + Sync>);

impl std::fmt::Debug for LoadProgress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LoadProgress")
    }
}

impl OpenOptions {
    /// Nothing but type and device; SAM in f32.
    pub fn new(dtype: DType, device: &Device) -> Self {
        Self {
            dtype,
            weights: WeightFormat::AsLoaded,
            sam_dtype: sam::Numbers::F32,
            device: device.clone(),
            vision_tower: None,
            vision_tower_aux: None,
            image_size: None,
            progress: None,
            packing: Packing::default(),
        }
    }

    /// The numbers that the LMM is kept in: `f32`, `bf16`, `int8`, `int4`.
    pub fn numbers(&self) -> &'static str {
        self.weights.name().unwrap_or(self.dtype.as_str())
    }

    /// Refuses the model in `dir` if it was converted to other numbers than these.
    ///
    /// # Errors
    /// [`Error::Weights`] that says what was converted, and to what; as [`stored_format`].
    pub fn check_folder(&self, dir: &Path) -> Result<()> {
        self.check(dir, converted_to(dir)?)
    }

    /// Refuses what lies at `path` if it was converted and these options are not for what it was `converted` to.
    fn check(&self, path: &Path, converted: Option<WeightFormat>) -> Result<()> {
        match converted {
            Some(format) if format != self.weights || self.dtype != DType::BF16 => {
                let name = format.name().unwrap_or_default();
                Err(Error::weights(
                    path,
                    format!("these weights were converted to {name}, and {} is asked for", self.numbers()),
                    format!("choose --dtype {name}, or the folder that this one was converted from"),
                ))
            }
            _ => Ok(()),
        }
    }

    /// The tensors of the checkpoint at `path` in the model's type and on its device.
    pub(crate) fn load(&self, path: &Path) -> Result<HashMap<String, Tensor>> {
        if !is_rehearsed() {
            self.check(path, stored_format(path)?)?;
        }
        let (total, mut done) = (checkpoint_bytes(path), 0);
        let read = &mut |bytes| {
            done += bytes;
            if let Some(progress) = &self.progress {
                (progress.0)(done, total.max(done));
            }
        };
        match self.packing.at(path).filter(|_| self.dtype == DType::BF16) {
            Some(matrices) => load_checkpoint_packed(path, matrices, read),
            None => load_checkpoint_with(path, Some(self.dtype), &self.device, read),
        }
    }
}

/// Opens a folder as the model that a registry line describes.
pub type Open = fn(&LmmSpec, &Path, &OpenOptions) -> Result<Box<dyn Lmm>>;

/// One line of [`REGISTRY`].
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// The published model.
    pub spec: LmmSpec,
    /// Whether a folder, by its configuration files, holds this model and no other of the registry.
    pub recognises: fn(&Path) -> Result<bool>,
    /// Opens a folder that was recognised.
    pub open: Open,
}

/// Every model this build can open.
pub const REGISTRY: &[Entry] = &[
    Entry { spec: llava::LLAVA_1_5_7B, recognises: llava::recognises, open: llava::open },
    Entry {
        spec: llava_next::LLAVA_NEXT_VICUNA_7B,
        recognises: llava_next::recognises_vicuna,
        open: llava_next::open_vicuna,
    },
    Entry {
        spec: llava_next::LLAVA_NEXT_MISTRAL_7B,
        recognises: llava_next::recognises_mistral,
        open: llava_next::open_mistral,
    },
    Entry {
        spec: deepseek_vl::DEEPSEEK_VL_1_3B,
        recognises: deepseek_vl::recognises_siglip,
        open: deepseek_vl::open,
    },
    Entry {
        spec: deepseek_vl::DEEPSEEK_VL_7B,
        recognises: deepseek_vl::recognises_hybrid,
        open: deepseek_vl::open,
    },
    Entry { spec: hpt::HPT_AIR_6B, recognises: hpt::recognises_air, open: hpt::open },
    Entry { spec: hpt::HPT_AIR_1_5_8B, recognises: hpt::recognises_air_1_5, open: hpt::open },
    Entry { spec: mgm::MGM_2B, recognises: mgm::recognises_gemma, open: mgm::open },
    Entry { spec: mgm::MGM_7B, recognises: mgm::recognises_vicuna, open: mgm::open },
    Entry { spec: mgm::MGM_HD_7B, recognises: mgm::recognises_vicuna_hd, open: mgm::open },
];

/// A picture made ready for a model.
#[derive(Debug, Clone)]
pub struct ImageInput {
    /// `[views, 3, S, S]`, f32.
    pub pixel_values: Tensor,
    /// `[1, 3, A, A]`, f32: what a second vision tower sees (MGM).
    pub pixel_values_aux: Option<Tensor>,
    /// Where the picture lies inside what the model sees.
    pub geometry: Geometry,
    /// The image's tokens; `start` is 0 until the prompt is known.
    pub layout: ImageLayout,
}

/// Pictures and a conversation made ready for a model.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// Token ids with the image token repeated once per image feature.
    pub token_ids: Vec<u32>,
    /// The pictures in their own order, each layout at its place in `token_ids`.
    pub images: Vec<ImageInput>,
}

/// What every opened model has, whatever its family.
#[derive(Debug)]
pub struct Base {
    /// The registry's line with the sizes of the model that was opened.
    pub spec: LmmSpec,
    /// The language model.
    pub decoder: Decoder,
    /// The model's tokenizer.
    pub tokenizer: Tokenizer,
    /// How conversations are written.
    pub format: &'static ChatFormat,
    /// Id of the token that stands for the image in a prompt; it may lie beyond the embedding table.
    pub image_token: u32,
    /// Ids that end an answer.
    pub stop_ids: Vec<u32>,
}

/// A frozen large multimodal model.
///
/// A family owns its configuration, preprocessing, prompt, vision tower and projector, and the layout of its
/// image tokens. Decoding, generation and grounding are common to all.
pub trait Lmm: Send + Sync {
    /// What every model has; the methods below read it.
    fn base(&self) -> &Base;

    /// The registry's line with the sizes of the model that was opened.
    fn spec(&self) -> &LmmSpec {
        &self.base().spec
    }

    /// The language model.
    fn decoder(&self) -> &Decoder {
        &self.base().decoder
    }

    /// The model's tokenizer.
    fn tokenizer(&self) -> &Tokenizer {
        &self.base().tokenizer
    }

    /// Id of the token that stands for the image in a prompt; it may lie beyond the embedding table.
    fn image_token(&self) -> u32 {
        self.base().image_token
    }

    /// Ids that end an answer.
    fn stop_ids(&self) -> &[u32] {
        &self.base().stop_ids
    }

    /// `turns` as the family's own chat has them.
    fn conversation<'a>(&self, turns: &'a [Turn]) -> Cow<'a, [Turn]> {
        Cow::Borrowed(turns)
    }

    /// Prompt ids of `turns` about `images` pictures, with one image token for each, in the order of
    /// [`order_shown`].
    ///
    /// A conversation that ends with an assistant turn is continued from that text.
    fn prompt(&self, turns: &[Turn], images: usize) -> Result<Vec<u32>> {
        self.tokenizer().encode(&self.base().format.render(&self.conversation(turns), images)?, true)
    }

    /// Fails with [`Error::Request`] unless a conversation may be about `count` pictures.
    fn check_images(&self, count: usize) -> Result<()> {
        let spec = self.spec();
        match count {
            0 => Err(Error::request("there is no picture", "give at least one picture")),
            1 => Ok(()),
            _ if spec.several_images => Ok(()),
            _ => {
                let several = REGISTRY.iter().filter(|entry| entry.spec.several_images);
                let names: Vec<&str> = several.map(|entry| entry.spec.name).collect();
                Err(Error::request(
                    format!("{} takes one picture per conversation, {count} were given", spec.name),
                    format!("give one picture, or use a model that takes several: {}", names.join(", ")),
                ))
            }
        }
    }

    /// Preprocesses a picture.
    fn prepare_image(&self, image: &RgbImage) -> Result<ImageInput>;

    /// The selected output of the vision tower: `[views, tokens, width]`.
    fn vision_features(&self, image: &ImageInput) -> Result<Tensor>;

    /// The embeddings that replace the image's tokens, from [`Lmm::vision_features`]: `[tokens, hidden]`.
    fn project(&self, image: &ImageInput, features: &Tensor) -> Result<Tensor>;

    /// Other tensors between a picture and its embeddings, by the names they are recorded under: parity tests
    /// compare them beside [`Lmm::vision_features`] and [`Lmm::project`].
    fn intermediates(&self, _image: &ImageInput) -> Result<Vec<(&'static str, Tensor)>> {
        Ok(Vec::new())
    }

    /// After how many tokens the published pipeline cuts off a text that is read to be grounded, for families
    /// that do (MGM, `spec/models.md` §4).
    fn reads_at_most(&self) -> Option<usize> {
        None
    }

    /// Preprocesses a picture and renders and tokenises a conversation about it.
    fn prepare(&self, image: &RgbImage, turns: &[Turn]) -> Result<Prepared> {
        self.prepare_all(&[image], turns)
    }

    /// As [`Lmm::prepare`], for several pictures where [`LmmSpec::several_images`].
    fn prepare_all(&self, images: &[&RgbImage], turns: &[Turn]) -> Result<Prepared> {
        self.check_images(images.len())?;
        let prompt = self.prompt(turns, images.len())?;
        let images = images.iter().map(|image| self.prepare_image(image)).collect::<Result<Vec<_>>>()?;
        let order = order_shown(turns, images.len())?;
        Prepared::new(images, &order, &prompt, self.image_token())
    }

    /// The embeddings `[tokens, hidden]` that replace the image's tokens.
    fn image_features(&self, image: &ImageInput) -> Result<Tensor> {
        self.project(image, &self.vision_features(image)?)
    }

    /// The decoder's input `[tokens, hidden]`.
    fn embed(&self, input: &Prepared) -> Result<Tensor> {
        let features = input.images.iter().map(|image| Ok((image.layout.start, self.image_features(image)?)));
        shared::embed_with_images(self.decoder(), &input.token_ids, features.collect::<Result<_>>()?)
    }
}

impl Prepared {
    /// Repeats each `image_token` of `prompt` for every token of its picture and places the layouts there. The
    /// tokens stand for `images[order[0]]`, `images[order[1]]`, …
    ///
    /// Fails with [`Error::Request`] if there is not one token for every picture.
    pub fn new(
        mut images: Vec<ImageInput>,
        order: &[usize],
        prompt: &[u32],
        image_token: u32,
    ) -> Result<Self> {
        let count = prompt.iter().filter(|&&id| id == image_token).count();
        if count != order.len() {
            return Err(Error::request(
                format!("the prompt holds {count} image tokens for {} pictures", order.len()),
                "do not write the image token in the text of a question",
            ));
        }
        let mut token_ids = Vec::with_capacity(prompt.len());
        let mut order = order.iter();
        for &id in prompt {
            if id != image_token {
                token_ids.push(id);
                continue;
            }
            let Some(image) = order.next().and_then(|&number| images.get_mut(number)) else {
                return Err(Error::request(
                    "the prompt shows a picture that there is not",
                    "give the picture",
                ));
            };
            image.layout.start = token_ids.len();
            token_ids.extend(std::iter::repeat_n(image_token, image.layout.tokens));
        }
        Ok(Self { token_ids, images })
    }
}

/// The registry's line for the model in `dir`, a folder as published on the hub.
///
/// Fails with the known types when the folder holds none of them.
pub fn recognise(dir: &Path) -> Result<&'static Entry> {
    for entry in REGISTRY {
        if (entry.recognises)(dir)? {
            return Ok(entry);
        }
    }
    let config = Config::read(&dir.join("config.json"))?;
    let model_type = config.text("model_type")?;
    let mut known: Vec<_> = REGISTRY.iter().map(|entry| entry.spec.model_type).collect();
    known.dedup();
    Err(config.error(
        "model_type",
        format!("unknown model type `{model_type}`; known types: {}", known.join(", ")),
        "choose a model of a known type: `flmm inspect lmms` lists them",
    ))
}

/// `config.json` of `dir` if there is one and its `model_type` is `model_type`.
pub(crate) fn config_of_type(dir: &Path, model_type: &str) -> Result<Option<Config>> {
    let file = dir.join("config.json");
    if !files::is_file(&file) {
        return Ok(None);
    }
    let config = Config::read(&file)?;
    let found = config.text_or("model_type", "")? == model_type;
    Ok(found.then_some(config))
}

/// The numbers that the model in `dir` was converted to; none if it was not. As [`stored_format`], which looks at one
/// checkpoint; the parts of an HPT have a folder each.
pub fn converted_to(dir: &Path) -> Result<Option<WeightFormat>> {
    if let Some(found) = stored_format(dir)? {
        return Ok(Some(found));
    }
    let inner = if files::is_dir(dir) { files::list_folders(dir)? } else { Vec::new() };
    inner.iter().find_map(|folder| stored_format(folder).transpose()).transpose()
}

/// Opens the model in `dir`, whatever its family. See [`open_with`].
pub fn open(dir: &Path, dtype: DType, device: &Device) -> Result<Box<dyn Lmm>> {
    open_with(dir, &OpenOptions::new(dtype, device))
}

/// Opens the model in `dir`, a folder as published on the hub, whatever its family.
///
/// Fails as [`recognise`], and with every missing or misshapen tensor in one error.
pub fn open_with(dir: &Path, options: &OpenOptions) -> Result<Box<dyn Lmm>> {
    if options.weights != WeightFormat::AsLoaded && !options.device.is_cpu() {
        return Err(Error::request(
            "int8 and int4 weights are for the processor only",
            "compute in bf16 there (--dtype bf16), or on the processor (--device cpu)",
        ));
    }
    let entry = recognise(dir)?;
    if options.weights == WeightFormat::AsLoaded || is_rehearsed() {
        return (entry.open)(&entry.spec, dir, options);
    }
    let packing = Packing::of(|| (entry.open)(&entry.spec, dir, options));
    (entry.open)(&entry.spec, dir, &OpenOptions { packing, ..options.clone() })
}
