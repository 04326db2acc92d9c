//! Stage `head`: the grounding head learns on what the frozen LMM and the frozen SAM encoder observe of scenes.

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use flmm::Grounder;
use flmm::grounder::{Caption, GroundingHead, HeadSizes};
use flmm::lmm::{GROUNDING_INSTRUCTION, Turn};
use flmm::sam::Sam;
use flmm::weights::{Params, load_checkpoint};
use flmm_data::world::{self, Link, Question, Scene, SegmentRef, Split, WorldConfig};
use flmm_train::head::{self, HeadConfig, HeadSample, HeadTask, RefinedTarget};
use flmm_train::samples::from_fn;
use flmm_train::selector::SelectorConfig;
use flmm_train::{RunOptions, TrainConfig, Trainer};
use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;
use tokenizers::Tokenizer;

use crate::config;
use crate::lmm::rng_for;
use crate::progress;
use crate::stage_sam;

/// How long and how fast to train.
#[derive(Debug, Clone, clap::Args, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct HeadArgs {
    /// Scenes in all.
    #[arg(long, default_value_t = 4000)]
    pub(crate) scenes: usize,
    /// Scenes per step.
    #[arg(long, default_value_t = 4)]
    pub(crate) batch: usize,
    /// Threads that compute gradients, one scene at a time each.
    #[arg(long, default_value_t = 2)]
    pub(crate) workers: usize,
    /// Peak learning rate.
    #[arg(long, default_value_t = 1e-3)]
    pub(crate) lr: f64,
    /// Seed of the scenes.
    #[arg(long, default_value_t = 5)]
    pub(crate) seed: u64,
    /// Share of referring expressions among the texts; the rest are narrations and answers.
    #[arg(long, default_value_t = 0.35)]
    pub(crate) referring: f64,
    /// Begin from this trained head folder instead of fresh tensors.
    #[arg(long)]
    pub(crate) from: Option<PathBuf>,
}

impl Default for HeadArgs {
    fn default() -> Self {
        config::defaults()
    }
}

/// Base width of the mask head.
const BASE_CHANNELS: usize = 16;
/// Share of narrations among the texts that are not referring expressions; the rest are answers to questions.
const NARRATIONS: f64 = 0.6;
/// Most phrases of one scene.
const MOST_PHRASES: usize = 4;

/// A text with its phrases, what was asked, and what each phrase refers to.
pub(crate) struct Told {
    /// The user's turn.
    pub(crate) prompt: String,
    /// The text.
    pub(crate) caption: Caption,
    /// Per phrase the segments it refers to.
    pub(crate) segments: Vec<Vec<SegmentRef>>,
}

/// A text encoded in one piece, as the model itself would write it, with `links` as its phrases.
fn told(tokenizer: &Tokenizer, prompt: &str, text: &str, links: &[Link]) -> Result<Told> {
    let encoding = tokenizer
        .encode_char_offsets(text, false)
        .map_err(|e| anyhow::anyhow!("cannot encode {text:?}: {e}"))?;
    let token_ids = encoding.get_ids().to_vec();
    let mut mask_ids = vec![-1; token_ids.len()];
    for (phrase, link) in links.iter().enumerate() {
        for (id, (from, to)) in mask_ids.iter_mut().zip(encoding.get_offsets()) {
            if *from < link.range.end && *to > link.range.start {
                *id = phrase as i32;
            }
        }
    }
    let segments = links.iter().map(|link| link.segments.clone()).collect();
    Ok(Told { prompt: prompt.into(), caption: Caption { token_ids, mask_ids }, segments })
}

/// One of the scene's narrations.
pub(crate) fn narration(tokenizer: &Tokenizer, scene: &Scene, index: usize) -> Result<Told> {
    let (mut text, mut links) = (String::new(), Vec::new());
    for segment in &scene.texts.narrations[index].segments {
        let start = text.chars().count();
        text += &segment.utterance;
        if !segment.segments.is_empty() {
            let range = start..text.chars().count();
            links.push(Link { range, segments: segment.segments.clone(), from_image: true });
        }
    }
    told(tokenizer, GROUNDING_INSTRUCTION, &text, &links)
}

/// Referring expressions of up to `most` different objects, in random order.
pub(crate) fn expressions<'a>(scene: &'a Scene, most: usize, rng: &mut ChaCha8Rng) -> Vec<(&'a str, usize)> {
    let mut chosen = Vec::new();
    let mut objects: Vec<usize> = (0..scene.objects.len()).collect();
    objects.shuffle(rng);
    for object in objects {
        let of_object: Vec<_> = scene.texts.referring.iter().filter(|r| r.target == object).collect();
        if let Some(referring) = of_object.choose(rng) {
            let texts: Vec<&String> =
                std::iter::once(&referring.text).chain(&referring.alternatives).collect();
            if let Some(text) = texts.choose(rng) {
                chosen.push((text.as_str(), object));
            }
        }
    }
    chosen.truncate(most);
    chosen
}

/// The union of segments, `H · W` values of 0 and 1.
pub(crate) fn union(scene: &Scene, segments: &[SegmentRef]) -> Vec<u8> {
    let mut out = vec![0u8; (scene.image.width() * scene.image.height()) as usize];
    for segment in segments {
        let mask = match segment {
            SegmentRef::Object(i) => &scene.objects[*i].mask,
            SegmentRef::Stuff(i) => &scene.stuff[*i].mask,
        };
        out.iter_mut().zip(&mask.data).for_each(|(value, inside)| *value |= u8::from(*inside));
    }
    out
}

/// Draws and observes one sample.
fn sample(
    grounder: &Grounder,
    tokenizer: &Tokenizer,
    scene: &Scene,
    referring: f64,
    rng: &mut ChaCha8Rng,
) -> Result<HeadSample> {
    let draw: f64 = rng.random();
    let linked = |q: &&Question| !q.links.is_empty();
    let asked = scene.texts.questions.iter().chain(&scene.texts.reasoning);
    let questions: Vec<&Question> = asked.filter(linked).collect();
    let chosen = expressions(scene, MOST_PHRASES, rng);
    let (told, labelled) = if draw < referring && !chosen.is_empty() {
        let caption =
            Caption::from_expressions(grounder.lmm().tokenizer(), chosen.iter().map(|(text, _)| *text))?;
        let segments = chosen.iter().map(|(_, object)| vec![SegmentRef::Object(*object)]).collect();
        (Told { prompt: GROUNDING_INSTRUCTION.into(), caption, segments }, false)
    } else if let (true, Some(question)) =
        (draw > referring + (1.0 - referring) * NARRATIONS, questions.choose(rng))
    {
        (told(tokenizer, &question.question, &question.answer, &question.links)?, true)
    } else {
        (narration(tokenizer, scene, rng.random_range(0..scene.texts.narrations.len()))?, true)
    };
    let labels: Vec<f32> = told.caption.mask_ids.iter().map(|id| f32::from(u8::from(*id >= 0))).collect();
    let token_labels = if labelled { Some(Tensor::new(labels, &Device::Cpu)?) } else { None };
    let mut session = grounder.start(&scene.image)?;
    let observation = grounder.observe_in(&mut session, &[Turn::user(&told.prompt)], &told.caption)?;
    let masks: Vec<u8> = told.segments.iter().flat_map(|s| union(scene, s)).collect();
    let (height, width) = (scene.image.height() as usize, scene.image.width() as usize);
    let masks = Tensor::from_vec(masks, (told.segments.len(), height, width), &Device::Cpu)?;
    Ok(HeadSample { observation, masks, token_labels })
}

/// Trains on the frozen parts in `bundle` and returns the head's tensors.
pub(crate) fn run(
    args: &HeadArgs,
    bundle: &Path,
    tokenizer: &Tokenizer,
    world: &WorldConfig,
    folder: &Path,
) -> Result<BTreeMap<String, Tensor>> {
    let lmm = flmm::lmm::open(&bundle.join("lmm"), DType::F32, &Device::Cpu)?;
    let sizes = HeadSizes::of(lmm.as_ref(), stage_sam::config());
    let sam: HashMap<String, Tensor> = load_checkpoint(bundle.join("sam"), Some(DType::F32), &Device::Cpu)?;
    let selector = SelectorConfig { positive_rate: 0.4, ..SelectorConfig::default() };
    let mut tensors = head::init(&sizes, BASE_CHANNELS, Some(&selector), Some(&sam), args.seed)?;
    if let Some(trained) = &args.from {
        tensors.extend(load_checkpoint(trained, Some(DType::F32), &Device::Cpu)?);
    }
    let (trainable, vars) = head::trainable(&sizes, &tensors)?;
    // Observing needs the frozen parts only; the head beside them is never run.
    let frozen =
        GroundingHead::from_params(&sizes, &Params::new("head", tensors.clone().into_iter().collect()))?;
    let sam = Sam::load(&sizes.sam, &Params::new(bundle.join("sam"), sam))?;
    let grounder = Grounder::from_parts(lmm, sam, frozen);
    let config = HeadConfig {
        refined_target: RefinedTarget::Exact,
        selector: Some(selector),
        ..HeadConfig::default()
    };
    let task = HeadTask::new(trainable, config)?;
    let train = TrainConfig {
        seed: args.seed,
        epochs: 1,
        batch_size: args.batch,
        learning_rate: args.lr,
        ..TrainConfig::default()
    };
    let options = RunOptions {
        workers: args.workers,
        checkpoint_every: Duration::from_secs(150),
        ..RunOptions::new(folder)
    };
    let mut trainer = Trainer::new(&task, vars.clone(), train, serde_json::to_value(config)?, options)?;
    let samples = from_fn(args.scenes, |index, _| {
        let scene = world::generate(world, Split::Train, args.seed, index as u64);
        sample(&grounder, tokenizer, &scene, args.referring, &mut rng_for(args.seed, index, 0)).map_err(|e| {
            flmm::Error::request(format!("scene {index}: {e:#}"), "report this: the world made it")
        })
    });
    let bar = progress::bar(args.scenes.div_ceil(args.batch) as u64)?;
    trainer.run(&samples, |step| {
        bar.set_position(step.step);
        bar.set_message(format!("loss {:.3}", step.loss));
        ControlFlow::Continue(())
    })?;
    bar.finish_and_clear();
    tensors.extend(vars.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())));
    Ok(tensors)
}
