//! Stage `head`: the grounding head learns on what the frozen LMM and the frozen SAM encoder observe of scenes.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;

use anyhow::Result;
use candle_core::{Device, Tensor};
use flmm::Grounder;
use flmm::capture::weighted_hidden;
use flmm::grounder::{Caption, GroundingHead, HeadSizes, Observation};
use flmm::mask_head::{UNet, UNetConfig};
use flmm::nn::nearest;
use flmm::sam::Sam;
use flmm::text::tokenizer::Tokenizer;
use flmm::weights::{Params, load_checkpoint};
use flmm_data::world::{self, Scene, SegmentRef, Split, WorldConfig};
use flmm_train::losses::{bce, dice, stats};
use flmm_train::optim::Vars;
use flmm_train::samples::from_fn;
use flmm_train::task::{Losses, Metric, Task};
use flmm_train::trainer::{RunOptions, TrainConfig, Trainer};
use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;

use crate::config::LmmSizes;
use crate::lmm::rng_for;
use crate::stage_sam;
use crate::store::Init;

/// How long and how fast to train.
#[derive(Debug, Clone, clap::Args)]
pub struct HeadArgs {
    /// Scenes in all.
    #[arg(long, default_value_t = 4000)]
    pub scenes: usize,
    /// Scenes per step.
    #[arg(long, default_value_t = 4)]
    pub batch: usize,
    /// Threads that compute gradients, one scene at a time each.
    #[arg(long, default_value_t = 2)]
    pub workers: usize,
    /// Peak learning rate.
    #[arg(long, default_value_t = 1e-3)]
    pub lr: f64,
    /// Seed of the scenes.
    #[arg(long, default_value_t = 5)]
    pub seed: u64,
}

/// Base width of the mask head.
const BASE_CHANNELS: usize = 16;
/// Share of narrations; the rest are referring expressions.
const NARRATIONS: f64 = 0.5;
/// Most phrases of one scene.
const MOST_PHRASES: usize = 4;

/// Opens the bundle's frozen parts with a head made of `vars`.
pub fn grounder(bundle: &Path, vars: &HashMap<String, Tensor>) -> Result<Grounder> {
    let lmm = flmm::lmm::open(&bundle.join("lmm"), candle_core::DType::F32, &Device::Cpu)?;
    let config = stage_sam::config();
    let sam = load_checkpoint(bundle.join("sam"), Some(candle_core::DType::F32), &Device::Cpu)?;
    let sam = Sam::load(&config, &Params::new(bundle.join("sam"), sam))?;
    let sizes = HeadSizes {
        channels: lmm.spec().channels,
        layers: lmm.spec().layers,
        hidden_size: lmm.decoder().config().hidden_size,
        sam: config,
    };
    let params = Params::new("head", vars.clone());
    let head = GroundingHead::from_params(&sizes, &params)?;
    params.finish("rerun the stage `head`")?;
    Ok(Grounder::from_parts(lmm, sam, head))
}

/// Initial tensors of the head: the refiner goes on from the stage `sam`.
pub fn init(sizes: &LmmSizes, sam: &HashMap<String, Tensor>, rng: &mut ChaCha8Rng) -> Result<Vars> {
    let unet = UNetConfig { in_channels: sizes.layers * sizes.heads, base_channels: BASE_CHANNELS, input_size: 64 };
    let mut tensors: Vec<(String, Tensor)> = Vec::new();
    for (name, tensor) in UNet::init(&unet, rng)? {
        tensors.push((format!("mask_head.{name}"), tensor));
    }
    for (name, tensor) in sam {
        if !name.starts_with("image_encoder.") {
            tensors.push((format!("sam.model.{name}"), tensor.clone()));
        }
    }
    let mut init = Init::new(rng);
    let (d, c) = (sizes.width, stage_sam::config().prompt_embed_dim);
    let std = (1.0 / (3.0 * d as f32)).sqrt();
    init.normal("text_proj.weight", &[c, d], std)?;
    init.constant("text_proj.bias", &[c], 0.0)?;
    init.constant("text_layer_weights", &[sizes.layers], 1.0)?;
    init.normal("keyword_selector.weight", &[1, d], std)?;
    init.constant("keyword_selector.bias", &[1], 0.0)?;
    tensors.extend(init.finish());
    let vars = tensors.into_iter().map(|(name, tensor)| Ok((name, candle_core::Var::from_tensor(&tensor)?)));
    vars.collect()
}

/// What the frozen models see of one scene, and what the head should make of it.
pub struct HeadSample {
    observation: Observation,
    /// `[N, H, W]`, 0 or 1.
    masks: Tensor,
    /// Per token of the text whether it belongs to a phrase; only for narrations.
    keywords: Option<Vec<f32>>,
}

/// A text of the scene with its phrases, and the segments each phrase refers to.
pub fn narration(
    tokenizer: &Tokenizer,
    raw: &tokenizers::Tokenizer,
    scene: &Scene,
    index: usize,
) -> Result<(Caption, Vec<Vec<SegmentRef>>)> {
    let narration = &scene.texts.narrations[index];
    let text: String = narration.segments.iter().map(|s| s.utterance.as_str()).collect();
    let encoding =
        raw.encode_char_offsets(text.as_str(), false).map_err(|e| anyhow::anyhow!("cannot encode {text:?}: {e}"))?;
    let mut caption = Caption { token_ids: tokenizer.encode(&text, false)?, mask_ids: Vec::new() };
    caption.mask_ids = vec![-1; caption.token_ids.len()];
    let (mut segments, mut start) = (Vec::new(), 0);
    for segment in &narration.segments {
        let end = start + segment.utterance.chars().count();
        if !segment.segments.is_empty() {
            for (id, (from, to)) in caption.mask_ids.iter_mut().zip(encoding.get_offsets()) {
                if *from < end && *to > start {
                    *id = segments.len() as i32;
                }
            }
            segments.push(segment.segments.clone());
        }
        start = end;
    }
    Ok((caption, segments))
}

/// Up to `most` referring expressions of different objects, in random order.
pub fn expressions<'a>(scene: &'a Scene, most: usize, rng: &mut ChaCha8Rng) -> Vec<(&'a str, usize)> {
    let mut chosen = Vec::new();
    let mut objects: Vec<usize> = (0..scene.objects.len()).collect();
    objects.shuffle(rng);
    for object in objects {
        let of_object: Vec<_> = scene.texts.referring.iter().filter(|r| r.target == object).collect();
        if let Some(referring) = of_object.choose(rng) {
            let texts: Vec<&String> = std::iter::once(&referring.text).chain(&referring.alternatives).collect();
            if let Some(text) = texts.choose(rng) {
                chosen.push((text.as_str(), object));
            }
        }
    }
    chosen.truncate(most);
    chosen
}

/// The union of segments as 0 and 1, row by row.
pub fn union(scene: &Scene, segments: &[SegmentRef]) -> Vec<f32> {
    let mut out = vec![0f32; (scene.image.width() * scene.image.height()) as usize];
    for segment in segments {
        let mask = match segment {
            SegmentRef::Object(i) => &scene.objects[*i].mask,
            SegmentRef::Stuff(i) => &scene.stuff[*i].mask,
        };
        for (value, inside) in out.iter_mut().zip(stage_sam::mask_values(mask)) {
            *value = value.max(inside);
        }
    }
    out
}

/// Draws and observes one sample.
pub fn sample(
    grounder: &Grounder,
    raw: &tokenizers::Tokenizer,
    scene: &Scene,
    rng: &mut ChaCha8Rng,
) -> Result<HeadSample> {
    let tokenizer = grounder.lmm().tokenizer();
    let as_narration = rng.random_bool(NARRATIONS) || scene.texts.referring.is_empty();
    let (caption, segments) = if as_narration {
        narration(tokenizer, raw, scene, rng.random_range(0..scene.texts.narrations.len()))?
    } else {
        let chosen = expressions(scene, MOST_PHRASES, rng);
        let caption = Caption::from_expressions(tokenizer, chosen.iter().map(|(text, _)| *text))?;
        (caption, chosen.iter().map(|(_, object)| vec![SegmentRef::Object(*object)]).collect())
    };
    let keywords = as_narration.then(|| caption.mask_ids.iter().map(|id| f32::from(u8::from(*id >= 0))).collect());
    let observation = grounder.observe(&scene.image, &caption)?;
    let masks: Vec<f32> = segments.iter().flat_map(|s| union(scene, s)).collect();
    let (height, width) = (scene.image.height() as usize, scene.image.width() as usize);
    let masks = Tensor::from_vec(masks, (segments.len(), height, width), &Device::Cpu)?;
    Ok(HeadSample { observation, masks, keywords })
}

struct HeadTask<'a> {
    grounder: &'a Grounder,
}

impl Task for HeadTask<'_> {
    type Sample = HeadSample;

    fn weights(&self, sample: &HeadSample) -> Vec<f64> {
        let masks = sample.masks.dims()[0] as f64;
        vec![masks, if sample.keywords.is_some() { 1.0 } else { 0.0 }]
    }

    fn losses(&self, sample: &HeadSample) -> flmm::Result<Losses> {
        let head = self.grounder.head();
        let logits = self.grounder.decode(&sample.observation)?;
        let (_, height, width) = logits.coarse.dims3()?;
        let small = nearest(&sample.masks.unsqueeze(0)?, height, width)?.squeeze(0)?;
        let coarse = (bce(&logits.coarse, &small)? + dice(&logits.coarse, &small)?)?;
        let refined = (bce(&logits.refined, &sample.masks)? + dice(&logits.refined, &sample.masks)?)?;
        let weight = sample.masks.dims()[0] as f64;
        let metric = |name, value| Metric { name, value, weight };
        let metrics = vec![
            metric("coarse_aiou", stats(&logits.coarse, &small)?.aiou),
            metric("refined_aiou", stats(&logits.refined, &sample.masks)?.aiou),
        ];
        let keywords = match (&sample.keywords, &head.keyword_selector) {
            (Some(labels), Some(selector)) => {
                let hidden = sample.observation.hidden.detach();
                let states = weighted_hidden(&hidden, &head.text_layer_weights.detach())?;
                let labels = Tensor::from_slice(labels, (1, 1, labels.len()), &Device::Cpu)?;
                bce(&selector.forward(&states)?.t()?.unsqueeze(0)?, &labels)?
            }
            _ => Tensor::zeros((), candle_core::DType::F32, &Device::Cpu)?,
        };
        Ok(Losses { terms: vec![(coarse + refined)?, keywords], metrics })
    }
}

/// Trains and returns the head's tensors.
pub fn run(
    args: &HeadArgs,
    bundle: &Path,
    raw: &tokenizers::Tokenizer,
    world: &WorldConfig,
    vars: Vars,
    folder: &Path,
) -> Result<std::collections::BTreeMap<String, Tensor>> {
    let tensors = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
    let grounder = grounder(bundle, &tensors)?;
    let task = HeadTask { grounder: &grounder };
    let config =
        TrainConfig { seed: args.seed, epochs: 1, batch_size: args.batch, learning_rate: args.lr, ..TrainConfig::default() };
    let options = RunOptions {
        workers: args.workers,
        progress: true,
        checkpoint_every: std::time::Duration::from_secs(150),
        ..RunOptions::new(folder)
    };
    let trained = vars.iter().filter(|(name, _)| !name.ends_with("gaussian_matrix"));
    let trained = trained.map(|(name, var)| (name.clone(), var.clone())).collect();
    let mut trainer = Trainer::new(&task, trained, config, serde_json::json!({ "head": "flmm-tiny" }), options)?;
    let samples = from_fn(args.scenes, |index, _| {
        let scene = world::generate(world, Split::Train, args.seed, index as u64);
        sample(&grounder, raw, &scene, &mut rng_for(args.seed, index, 0))
            .map_err(|e| flmm::Error::request(format!("scene {index}: {e:#}"), "this is a bug in flmm-tiny"))
    });
    trainer.run(&samples, |_| ControlFlow::Continue(()))?;
    Ok(vars.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect())
}
