//! Training the grounding head: what a sample is, what it costs, and where the tensors start.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use candle_core::{DType, Device, Tensor, Var};
use flmm::grounder::{
    GroundingHead, HeadSettings, HeadSizes, MaskLogits, Observation, RefinerKind, SAM_PREFIX,
};
use flmm::mask_head::{UNet, UNetConfig};
use flmm::nn::nearest;
use flmm::sam::{PromptOptions, Refiner};
use flmm::weights::Params;
use flmm::{Error, Result};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::losses::{bce, dice, stats};
use crate::optim::Vars;
use crate::selector::{SelectorConfig, selector_loss};
use crate::task::{Losses, Metric, Task};

/// One picture with its phrases, as the frozen models saw it, and what is wanted of it.
#[derive(Debug, Clone)]
pub struct HeadSample {
    /// From `Grounder::observe`.
    pub observation: Observation,
    /// One mask per phrase `[N, H, W]`, u8 0 or 1, at the picture's own size.
    pub masks: Tensor,
    /// Per token of `observation.hidden`, 1 if it belongs to a phrase, else 0: `[T]`. Only for samples that train
    /// the keyword selector.
    pub token_labels: Option<Tensor>,
}

impl HeadSample {
    /// The same on `device`; what is there already is not copied.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let labels = self.token_labels.as_ref().map(|labels| labels.to_device(device));
        Ok(Self {
            observation: self.observation.to_device(device)?,
            masks: self.masks.to_device(device)?,
            token_labels: labels.transpose()?,
        })
    }
}

/// What the refined masks are compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RefinedTarget {
    /// As published: masks that went to the LMM's picture size and back, by nearest neighbour, and are blocky.
    #[default]
    Published,
    /// The true masks.
    Exact,
}

/// Factors of the four mask losses; all 1 in the paper.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LossWeights {
    /// Cross-entropy of the coarse logits.
    pub coarse_bce: f64,
    /// Dice of the coarse logits.
    pub coarse_dice: f64,
    /// Cross-entropy of the refined logits.
    pub refined_bce: f64,
    /// Dice of the refined logits.
    pub refined_dice: f64,
}

impl Default for LossWeights {
    fn default() -> Self {
        Self { coarse_bce: 1.0, coarse_dice: 1.0, refined_bce: 1.0, refined_dice: 1.0 }
    }
}

impl LossWeights {
    /// The same without losses of the refined logits.
    pub(crate) fn coarse_only(self) -> Self {
        Self { refined_bce: 0.0, refined_dice: 0.0, ..self }
    }

    /// Whether the refined logits have a loss.
    fn refines(&self) -> bool {
        self.refined_bce != 0.0 || self.refined_dice != 0.0
    }
}

/// How the head is trained.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HeadConfig {
    /// Width of a fresh mask head's first stage; the published heads have 64.
    pub base_channels: usize,
    /// Factors of the mask losses. Without refined losses the refiner is not run.
    pub losses: LossWeights,
    /// Target of the refined losses.
    pub refined_target: RefinedTarget,
    /// Beyond the paper: without a refiner the mask head's logits, resized, are the masks, and SAM is not needed. Unless
    /// given, that of the head to begin from, or SAM.
    pub refiner: Option<RefinerKind>,
    /// Beyond the paper: the mask head looks at so many attention maps, the best by a few samples. Unless given, those of
    /// the head to begin from, or all.
    pub maps: Option<usize>,
    /// Trains the keyword selector along with the rest (`spec/training.md` §8.2, mode a).
    pub selector: Option<SelectorConfig>,
    /// Phrases of one picture that are decoded and differentiated together: bounds the memory of pictures with many.
    /// The loss is that of all phrases together; only its rounding depends on this.
    pub phrases_at_once: usize,
}

impl Default for HeadConfig {
    fn default() -> Self {
        Self {
            base_channels: 64,
            losses: LossWeights::default(),
            refined_target: RefinedTarget::default(),
            refiner: None,
            maps: None,
            selector: None,
            phrases_at_once: 8,
        }
    }
}

/// [`init_as`] for a published head.
pub fn init(
    sizes: &HeadSizes,
    base_channels: usize,
    selector: Option<&SelectorConfig>,
    sam: Option<&HashMap<String, Tensor>>,
    seed: u64,
) -> Result<BTreeMap<String, Tensor>> {
    init_as(sizes, &HeadSettings::default(), base_channels, selector, sam, seed)
}

/// Fresh tensors of a whole head with `settings` under their published names (`spec/pipeline.md` §3.4).
///
/// Prompt encoder and mask decoder are copied from `sam` (names of the public checkpoint) if given.
pub fn init_as(
    sizes: &HeadSizes,
    settings: &HeadSettings,
    base_channels: usize,
    selector: Option<&SelectorConfig>,
    sam: Option<&HashMap<String, Tensor>>,
    seed: u64,
) -> Result<BTreeMap<String, Tensor>> {
    let rng = &mut ChaCha8Rng::seed_from_u64(seed);
    let unet = UNetConfig { base_channels, ..UNetConfig::new(settings.channels(sizes.channels)?) };
    let mut tensors = prefixed("mask_head.", UNet::init(&unet, rng)?);
    let (width, hidden) = (sizes.sam.prompt_embed_dim, sizes.hidden_size);
    tensors.insert("text_proj.weight".into(), linear(&[width, hidden], hidden, rng)?);
    tensors.insert("text_proj.bias".into(), linear(&[width], hidden, rng)?);
    tensors.insert("text_layer_weights".into(), Tensor::ones(sizes.layers, DType::F32, &Device::Cpu)?);
    let refiner = match sam {
        None => Refiner::init(&sizes.sam, rng)?,
        Some(sam) => sam
            .iter()
            .filter(|(name, _)| name.starts_with("prompt_encoder.") || name.starts_with("mask_decoder."))
            .map(|(name, tensor)| Ok((name.clone(), tensor.to_dtype(DType::F32)?)))
            .collect::<Result<_>>()?,
    };
    tensors.extend(prefixed(SAM_PREFIX, refiner));
    if let Some(config) = selector {
        tensors.extend(prefixed("keyword_selector.", config.init(hidden, rng)?));
    }
    settings.retain(&mut tensors);
    Ok(tensors)
}

/// PyTorch's default for linear layers: uniform in ±1/√inputs.
pub(crate) fn linear(shape: &[usize], inputs: usize, rng: &mut impl Rng) -> Result<Tensor> {
    let bound = 1.0 / (inputs as f32).sqrt();
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-bound..bound)).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

fn prefixed(prefix: &str, tensors: BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    tensors.into_iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor)).collect()
}

/// [`trainable_as`] for a published head.
pub fn trainable(sizes: &HeadSizes, tensors: &BTreeMap<String, Tensor>) -> Result<(GroundingHead, Vars)> {
    trainable_as(sizes, &HeadSettings::default(), tensors)
}

/// A head with `settings` that can be trained, and its tensors by name.
///
/// Everything is trained but SAM's Gaussian matrix, which is a buffer. Tensors that never get a gradient
/// (`spec/pipeline.md` §5.4) only decay, as in the published training.
pub fn trainable_as(
    sizes: &HeadSizes,
    settings: &HeadSettings,
    tensors: &BTreeMap<String, Tensor>,
) -> Result<(GroundingHead, Vars)> {
    let (mut vars, mut all) = (Vars::new(), HashMap::new());
    for (name, tensor) in tensors {
        if name.ends_with("positional_encoding_gaussian_matrix") {
            all.insert(name.clone(), tensor.clone());
        } else {
            let var = Var::from_tensor(&tensor.to_dtype(DType::F32)?)?;
            all.insert(name.clone(), var.as_tensor().clone());
            vars.insert(name.clone(), var);
        }
    }
    let params = Params::new("the head to be trained", all);
    let head = GroundingHead::from_params_as(sizes, settings, &params)?;
    params.finish("begin from a head made for this LMM and this SAM")?;
    match params.unused().as_slice() {
        [] => Ok((head, vars)),
        unused => Err(Error::request(
            format!("tensors that belong to no part of the head: {}", unused.join(", ")),
            "begin from a head made for this LMM and this SAM",
        )),
    }
}

/// The mask losses of `spec/training.md` §4 and, if configured, the selector's.
pub struct HeadTask {
    head: GroundingHead,
    config: HeadConfig,
}

impl HeadTask {
    /// A task that trains `head`. Fails if the selector is to be trained and the head has none, or if refined masks have
    /// a loss and the head has no refiner.
    pub fn new(head: GroundingHead, config: HeadConfig) -> Result<Self> {
        if config.selector.is_some() && head.keyword_selector.is_none() {
            return Err(Error::request(
                "the keyword selector is to be trained, but the head has none",
                "add `keyword_selector.weight` and `keyword_selector.bias` to the head",
            ));
        }
        if head.refiner.is_none() && config.losses.refines() {
            return Err(Error::request(
                "the head has no refiner, but its refined masks have a loss",
                "set `head.losses.refined_bce` and `head.losses.refined_dice` to 0",
            ));
        }
        Ok(Self { head, config })
    }

    /// The head; it sees every step of the optimiser.
    pub fn head(&self) -> &GroundingHead {
        &self.head
    }

    /// The number of phrases, if the sample has as many masks.
    fn phrases(&self, sample: &HeadSample) -> Result<usize> {
        let n = sample.observation.phrases.len();
        match sample.masks.dims().first() == Some(&n) {
            true => Ok(n),
            false => Err(Error::request(
                format!("{n} phrases, but masks of shape {:?}", sample.masks.dims()),
                "give one mask per phrase, [N, H, W]",
            )),
        }
    }

    /// A term without any gradient, where the others are.
    fn nothing(&self) -> Result<Tensor> {
        Ok(Tensor::zeros((), DType::F32, self.head.text_layer_weights.device())?)
    }

    /// The selector's loss; 0 for samples that do not train it.
    fn selector_term(&self, sample: &HeadSample, metrics: &mut Vec<Metric>) -> Result<Tensor> {
        match (&self.config.selector, &sample.token_labels, &self.head.keyword_selector) {
            (Some(config), Some(labels), Some(selector)) => {
                let hidden = &sample.observation.hidden;
                let (loss, found) =
                    selector_loss(selector, hidden, &self.head.text_layer_weights, labels, config)?;
                metrics.extend(found);
                Ok(loss)
            }
            _ => self.nothing(),
        }
    }

    /// Coarse, and if it has a loss, refined losses of some phrases; `Σ` of all with their factors.
    fn mask_losses(
        &self,
        observation: &Observation,
        masks: &Tensor,
        padding: Option<f32>,
        metrics: &mut Vec<Metric>,
    ) -> Result<Tensor> {
        let n = observation.phrases.len() as f64;
        let LossWeights { coarse_bce, coarse_dice, refined_bce, refined_dice } = self.config.losses;
        let (coarse, refined) = if !self.config.losses.refines() {
            (self.head.coarse(observation)?, None)
        } else {
            let options = PromptOptions { padding, ..PromptOptions::default() };
            let logits = self.head.decode_with(observation, &options)?;
            (logits.coarse, Some(logits.refined))
        };
        let (_, h, w) = coarse.dims3()?;
        let (height, width) = observation.geometry.image_shape;
        let seen = nearest(masks, height, width)?;
        let mut add = |names: [&'static str; 4], values: [f64; 4]| {
            metrics.extend(names.iter().zip(values).map(|(&name, value)| Metric { name, value, weight: n }));
        };
        let mut judge = |names, logits: &Tensor, target: &Tensor, factors: (f64, f64)| -> Result<Tensor> {
            let (bce, dice) = (bce(logits, target)?, dice(logits, target)?);
            let found = stats(logits, target)?;
            let value = |x: &Tensor| x.to_scalar::<f32>().map(f64::from);
            add(names, [value(&bce)?, value(&dice)?, found.accuracy, found.aiou]);
            Ok(((bce * factors.0)? + (dice * factors.1)?)?)
        };
        // The published names of the logged values.
        let names = ["loss_mask", "loss_dice", "accuracy", "aiou"];
        let mut total = judge(names, &coarse, &nearest(&seen, h, w)?, (coarse_bce, coarse_dice))?;
        if let Some(refined) = refined {
            let target = match self.config.refined_target {
                RefinedTarget::Published => {
                    let (_, height, width) = refined.dims3()?;
                    nearest(&seen, height, width)?
                }
                RefinedTarget::Exact => masks.clone(),
            };
            let names = ["sam_loss_mask", "sam_loss_dice", "sam_accuracy", "sam_aiou"];
            total = (total + judge(names, &refined, &target, (refined_bce, refined_dice))?)?;
        }
        Ok(total)
    }
}

impl Task for HeadTask {
    type Sample = HeadSample;

    fn weights(&self, sample: &HeadSample) -> Vec<f64> {
        let selects = self.config.selector.is_some() && sample.token_labels.is_some();
        vec![sample.observation.phrases.len() as f64, f64::from(u8::from(selects))]
    }

    fn losses(&self, sample: &HeadSample) -> Result<Losses> {
        let mut metrics = Vec::new();
        let masks = match self.phrases(sample)? {
            0 => self.nothing()?,
            _ => self.mask_losses(&sample.observation, &sample.masks, None, &mut metrics)?,
        };
        let selector = self.selector_term(sample, &mut metrics)?;
        Ok(Losses { terms: vec![masks, selector], metrics })
    }

    fn in_parts(&self, sample: &HeadSample, each: &mut dyn FnMut(Losses) -> Result<()>) -> Result<()> {
        let n = self.phrases(sample)?;
        let size = self.config.phrases_at_once.max(1);
        if n <= size {
            return each(self.losses(sample)?);
        }
        let parts = parts(n, size);
        let padding = if self.config.losses.refines() {
            Some(padding(&self.head, &sample.observation, &parts)?)
        } else {
            None
        };
        for part in parts {
            let mut metrics = Vec::new();
            let (observation, count) = (sample.observation.part(part.clone())?, part.len());
            let masks = sample.masks.narrow(0, part.start, count)?;
            // Means over phrases: each part weighs as much as it has of them.
            let term =
                self.mask_losses(&observation, &masks, padding, &mut metrics)? * (count as f64 / n as f64);
            each(Losses { terms: vec![term?, self.nothing()?], metrics })?;
        }
        let mut metrics = Vec::new();
        let selector = self.selector_term(sample, &mut metrics)?;
        each(Losses { terms: vec![self.nothing()?, selector], metrics })
    }
}

/// `0..n` in pieces of at most `size`.
fn parts(n: usize, size: usize) -> Vec<Range<usize>> {
    (0..n).step_by(size.max(1)).map(|from| from..n.min(from + size.max(1))).collect()
}

/// The value that pads the mask prompts of all phrases, computed part by part: the parts must not differ in it.
fn padding(head: &GroundingHead, observation: &Observation, parts: &[Range<usize>]) -> Result<f32> {
    let mut smallest = f32::INFINITY;
    for part in parts {
        smallest = smallest.min(Refiner::padding(&head.coarse(&observation.part(part.clone())?)?)?);
    }
    Ok(smallest)
}

/// Mask logits of all phrases without gradients, computed for at most `size` of them at a time.
pub fn decode_in_parts(head: &GroundingHead, observation: &Observation, size: usize) -> Result<MaskLogits> {
    let parts = parts(observation.phrases.len(), size);
    let padding = match parts.len() {
        0 | 1 => None,
        _ => Some(padding(head, observation, &parts)?),
    };
    let options = PromptOptions { padding, ..PromptOptions::default() };
    let (mut coarse, mut refined) = (Vec::new(), Vec::new());
    for part in parts {
        let logits = head.decode_with(&observation.part(part)?, &options)?;
        coarse.push(logits.coarse.detach());
        refined.push(logits.refined.detach());
    }
    Ok(MaskLogits { coarse: Tensor::cat(&coarse, 0)?, refined: Tensor::cat(&refined, 0)? })
}
