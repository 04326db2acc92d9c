//! Stage `tower`: the tower and the projector learn to say, for every patch, the word of the thing under it and
//! where it is. This takes the place of CLIP's contrastive pre-training.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use candle_core::{D, Device, Tensor};
use flmm::nn::cross_entropy;
use flmm_data::world::{self, Split, WorldConfig};
use serde::Deserialize;
use serde_json::json;

use crate::config;
use crate::lmm::Setting;
use crate::parallel::Workers;
use crate::progress::{self, Run};
use crate::store::{AdamW, Store};
use crate::symbolic::Thing;
use crate::tower::{Projector, Tower};

/// How long and how fast to train.
#[derive(Debug, Clone, clap::Args, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct TowerArgs {
    /// Optimiser steps in all.
    #[arg(long, default_value_t = 2500)]
    pub(crate) steps: usize,
    /// Scenes per worker and step.
    #[arg(long, default_value_t = 8)]
    pub(crate) batch: usize,
    /// Data-parallel workers, one thread each.
    #[arg(long, default_value_t = 2)]
    pub(crate) workers: usize,
    /// Peak learning rate.
    #[arg(long, default_value_t = 1.5e-3)]
    pub(crate) lr: f64,
    /// Seed of the scenes.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Steps between evaluations.
    #[arg(long, default_value_t = 250)]
    pub(crate) evaluate_every: usize,
    /// Object accuracy on projected tokens that the last evaluation must reach.
    #[arg(long, default_value_t = 0.95)]
    pub(crate) gate: f64,
    /// Begin from the tower and the projector of this LMM folder or stage, where they have the same sizes.
    #[arg(long)]
    pub(crate) from: Option<PathBuf>,
}

impl Default for TowerArgs {
    fn default() -> Self {
        config::defaults()
    }
}

/// Sharpness of the word classification.
const COSINE_SCALE: f64 = 15.0;
/// Weight of the squared distance to the whole code, beside the words.
const DISTANCE_WEIGHT: f64 = 0.5;
/// Scenes of an evaluation.
const EVALUATION_SCENES: u64 = 96;
/// Weight of patches that show background and padding.
const STUFF_WEIGHT: f32 = 0.25;
const PADDING_WEIGHT: f32 = 0.1;

struct Batch {
    patches: Tensor,
    codes: Tensor,
    classes: Vec<u32>,
    weights: Vec<f32>,
    /// Per patch: scene of the batch and object, if it shows one.
    objects: Vec<Option<(usize, usize)>>,
}

/// Trains; fails if the object accuracy of the last evaluation is below the gate.
pub(crate) fn run(
    args: &TowerArgs,
    setting: &Setting,
    world: &WorldConfig,
    store: &mut Store,
    folder: &Path,
) -> Result<()> {
    let mut run = Run::open(folder, args.steps, store)?;
    let workers = Workers::new(args.workers)?;
    let adam = AdamW { betas: (0.9, 0.98), weight_decay: 0.02, max_norm: 1.0 };
    let directions = setting.codes.directions()?;
    loop {
        let step = store.step;
        // Also where a run is taken up again: one that has all its steps is judged by what it reached.
        if step > 0 && (step.is_multiple_of(args.evaluate_every) || step >= args.steps) {
            let scores = evaluate(setting, world, store, EVALUATION_SCENES)?;
            run.report(step, &format!("{scores:.3?}"))?;
            run.curve(&json!({
                "step": step, "objects": scores.objects, "patches": scores.patches, "distance": scores.distance,
            }))?;
            if step >= args.steps {
                ensure!(
                    scores.objects >= args.gate,
                    "gate missed at step {step}: object accuracy {:.3}, wanted {}; train longer (--steps)",
                    scores.objects,
                    args.gate
                );
                return Ok(());
            }
        }
        if step >= args.steps {
            return Ok(());
        }
        let params = store.params(&Default::default());
        let tower = Tower::load(&setting.sizes, &params)?;
        let projector = Projector::load(&setting.sizes, &params)?;
        let (loss, grads) = workers.gradients(|worker| {
            let first = ((step * args.workers + worker) * args.batch) as u64;
            let batch = batch(setting, world, Split::Train, args.seed, first..first + args.batch as u64)?;
            let tokens = projector.forward(&tower.forward(&batch.patches)?)?;
            let loss = loss(&tokens, &directions, &batch)?;
            Ok((f64::from(loss.to_scalar::<f32>()?), store.gradients(&loss)?))
        })?;
        let norm = store.update(&grads, &adam, |_| progress::rate(args.lr, step, args.steps, 0.5))?;
        ensure!(store.step > step, "the gradient is not finite at step {step} (norm {norm}); lower --lr");
        run.stepped(store, loss, "")?;
    }
}

fn batch(
    setting: &Setting,
    world: &WorldConfig,
    split: Split,
    seed: u64,
    indices: std::ops::Range<u64>,
) -> Result<Batch> {
    let count = (indices.end - indices.start) as usize;
    let tokens = setting.sizes.image_tokens();
    let (mut patches, mut codes) = (Vec::new(), Vec::new());
    let (mut classes, mut weights, mut objects) = (Vec::new(), Vec::new(), Vec::new());
    for (at, index) in indices.enumerate() {
        let scene = world::generate(world, split, seed, index);
        let (things, pixels) = setting.pixels(&scene)?;
        patches.extend(pixels);
        codes.extend(setting.codes.tokens(&scene, &things, &setting.geometry(&scene)?));
        for thing in things {
            classes.push(setting.codes.class_of(&scene, thing) as u32);
            weights.push(match thing {
                Thing::Object(_) => 1.0,
                Thing::Stuff(_) => STUFF_WEIGHT,
                Thing::Padding => PADDING_WEIGHT,
            });
            objects.push(match thing {
                Thing::Object(object) => Some((at, object)),
                _ => None,
            });
        }
    }
    let patch = patches.len() / (count * tokens);
    Ok(Batch {
        patches: Tensor::from_vec(patches, (count, tokens, patch), &Device::Cpu)?,
        codes: Tensor::from_vec(codes, (count * tokens, setting.sizes.width), &Device::Cpu)?,
        classes,
        weights,
        objects,
    })
}

/// Cosines `[patches, classes]` of projected tokens `[B, tokens, width]` to unit `directions`.
fn cosines(tokens: &Tensor, directions: &Tensor) -> Result<Tensor> {
    let tokens = tokens.flatten(0, 1)?;
    let norm = (tokens.sqr()?.sum_keepdim(D::Minus1)? + 1e-6)?.sqrt()?;
    Ok(tokens.broadcast_div(&norm)?.matmul(&directions.t()?)?)
}

/// Word classification plus squared distance to the whole code.
fn loss(tokens: &Tensor, directions: &Tensor, batch: &Batch) -> Result<Tensor> {
    let logits = (cosines(tokens, directions)? * COSINE_SCALE)?;
    let words = cross_entropy(&logits, batch.classes.clone(), Some(batch.weights.clone()))?;
    let total: f32 = batch.weights.iter().sum();
    let weights = Tensor::new(batch.weights.as_slice(), &Device::Cpu)?;
    let distance = (tokens.flatten(0, 1)? - &batch.codes)?.sqr()?.sum(D::Minus1)?;
    Ok((words + ((distance * weights)?.sum_all()? * (DISTANCE_WEIGHT / f64::from(total)))?)?)
}

/// Shares of right classifications.
#[derive(Debug)]
struct Scores {
    /// Of objects, pooled over their patches.
    objects: f64,
    /// Of single patches.
    patches: f64,
    /// Mean squared distance of projected object tokens to their codes.
    distance: f64,
}

fn evaluate(setting: &Setting, world: &WorldConfig, store: &Store, scenes: u64) -> Result<Scores> {
    let params = store.params(&Default::default());
    let (tower, projector) =
        (Tower::load(&setting.sizes, &params)?, Projector::load(&setting.sizes, &params)?);
    let directions = setting.codes.directions()?;
    let classes = directions.dim(0)?;
    let (mut right, mut all, mut patches, mut seen) = (0, 0, 0, 0);
    let mut distance = 0.0;
    for first in (0..scenes).step_by(16) {
        let batch = batch(setting, world, Split::Val, 7, first..(first + 16).min(scenes))?;
        let tokens = projector.forward(&tower.forward(&batch.patches)?)?.detach();
        let cosines = cosines(&tokens, &directions)?.flatten_all()?.to_vec1::<f32>()?;
        let far = (tokens.flatten(0, 1)? - &batch.codes)?.sqr()?.sum(D::Minus1)?.to_vec1::<f32>()?;
        let mut pooled = std::collections::BTreeMap::new();
        for (at, object) in batch.objects.iter().enumerate() {
            let row = &cosines[at * classes..(at + 1) * classes];
            patches += usize::from(argmax(row) == batch.classes[at] as usize);
            seen += 1;
            if let Some(object) = object {
                distance += f64::from(far[at]);
                let (sum, class) = pooled.entry(*object).or_insert((vec![0f32; classes], batch.classes[at]));
                sum.iter_mut().zip(row).for_each(|(s, v)| *s += v);
                debug_assert_eq!(*class, batch.classes[at]);
            }
        }
        all += pooled.len();
        right += pooled.values().filter(|(sum, class)| argmax(sum) == *class as usize).count();
    }
    let shown = seen.max(1) as f64;
    Ok(Scores {
        objects: right as f64 / all.max(1) as f64,
        patches: patches as f64 / shown,
        distance: distance / shown,
    })
}

fn argmax(row: &[f32]) -> usize {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}
