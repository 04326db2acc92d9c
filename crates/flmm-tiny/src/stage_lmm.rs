//! Stages `codes` and `lmm`: the decoder learns to read codes, then pictures.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;
use flmm_data::world::{self, QuestionKind, Split, WorldConfig};
use rand::Rng;
use serde::Deserialize;

use crate::config::{self, LmmSizes};
use crate::gates::{Gate, check_gates, question_kind};
use crate::lmm::{Lmm, Report, Sample, Setting, Source, rng_for};
use crate::objects::Objects;
use crate::pack::{EASY, REFERRING};
use crate::parallel::Workers;
use crate::progress::{self, Run};
use crate::store::{AdamW, Store};

/// How long and how fast to train.
#[derive(Debug, Clone, clap::Args, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct LmmArgs {
    /// Optimiser steps in all.
    #[arg(long, default_value_t = 6000)]
    pub(crate) steps: usize,
    /// Of the stage `codes`: image tokens along one side; as many as the tower has patches unless given. Fewer are
    /// cheaper, and circuits form on them sooner.
    #[arg(long, value_parser = clap::value_parser!(u8).range(2..=24))]
    pub(crate) grid: Option<u8>,
    /// Fewest and most objects of a scene, as `1-2`; as the level has it unless given.
    #[arg(long)]
    pub(crate) objects: Option<Objects>,
    /// Scenes per worker and step.
    #[arg(long, default_value_t = 8)]
    pub(crate) batch: usize,
    /// Data-parallel workers, one thread each.
    #[arg(long, default_value_t = 2)]
    pub(crate) workers: usize,
    /// Peak learning rate.
    #[arg(long, default_value_t = 1.5e-3)]
    pub(crate) lr: f64,
    /// Seed of scenes and choices.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Steps between evaluations.
    #[arg(long, default_value_t = 250)]
    pub(crate) evaluate_every: usize,
    /// Scenes of an evaluation.
    #[arg(long, default_value_t = 96)]
    pub(crate) evaluation_scenes: u64,
    /// Only questions of these kinds, in the log's names: an early part of the curriculum.
    #[arg(long, value_delimiter = ',', value_parser = question_kind)]
    pub(crate) kinds: Vec<QuestionKind>,
    /// Fail unless this share of a kind is answered right, in percent: at the end (`Where=80`), or at the first
    /// evaluation from a step on (`Where=60@250`). Besides kinds of questions: `Closed`, all of them that have one
    /// answer; `Seen`, their phrases that had to be seen; `Pointing`, phrases the best head points at.
    #[arg(long)]
    pub(crate) gate: Vec<Gate>,
    /// End as soon as an evaluation passes all gates, before `--steps`.
    #[arg(long, requires = "gate")]
    pub(crate) until_gates: bool,
    /// Weight of the contrastive alignment of phrases with patches.
    #[arg(long, default_value_t = 0.3)]
    pub(crate) alignment: f64,
    /// Of the stage `lmm`: first set the heads that carry places as the stage `codes` sets them, for a model that
    /// was made before it did.
    #[arg(long)]
    pub(crate) carry_places: bool,
    /// How often a scene's objects are referred to, 0 to 1.
    #[arg(long, default_value_t = REFERRING, value_parser = share)]
    pub(crate) referring: f64,
    /// How often a question of an easy kind (existence, colours, reasons, backgrounds) is kept, 0 to 1.
    #[arg(long, default_value_t = EASY, value_parser = share)]
    pub(crate) easy: f64,
    /// Of the stage `lmm`: train the tower as well, at this share of the learning rate.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) tower_rate: f64,
    /// Begin from this LMM folder or stage: the stage `codes` from its decoder instead of a fresh one, the stage `lmm`
    /// from all of it instead of the stages `tower` and `codes`. Words keep their rows where the vocabulary has grown.
    #[arg(long)]
    pub(crate) from: Option<PathBuf>,
    /// Of the stage `lmm`: the folder of the stage `tower`.
    #[arg(long, default_value = "tower")]
    pub(crate) tower: PathBuf,
    /// Of the stage `lmm`: the folder of the stage `codes`.
    #[arg(long, default_value = "codes")]
    pub(crate) codes: PathBuf,
}

impl Default for LmmArgs {
    fn default() -> Self {
        config::defaults()
    }
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().map_err(|_| format!("`{text}` is not a number"))?;
    if (0.0..=1.0).contains(&share) { Ok(share) } else { Err("expected a number from 0 to 1".into()) }
}

/// Share of picture batches in the stage `lmm`; the rest stays on codes as an anchor.
const PIXEL_SHARE: f64 = 0.85;
/// Noise on the codes, in units of a code's length.
const CODE_NOISE: f32 = 0.45;
/// Share of the learning rate at which the projector, trained before, goes on.
const PROJECTOR_RATE: f64 = 0.3;

impl LmmArgs {
    fn source(&self, pixels: bool, sizes: &LmmSizes, draw: f64) -> Source {
        let side = if pixels { sizes.grid() } else { self.grid.map_or(sizes.grid(), usize::from) };
        if pixels && draw < PIXEL_SHARE {
            Source::Pixels
        } else {
            Source::Codes { grid: side, noise: CODE_NOISE }
        }
    }
}

/// Trains the decoder on codes or, with `pixels`, decoder and projector on pictures behind the tower, which is
/// trained too unless it is among the `frozen` tensors.
pub(crate) fn run(
    args: &LmmArgs,
    pixels: bool,
    setting: &Setting,
    world: &WorldConfig,
    store: &mut Store,
    frozen: &HashMap<String, Tensor>,
    folder: &Path,
) -> Result<()> {
    let world = &WorldConfig { objects: args.objects.map(|Objects(range)| range), ..world.clone() };
    let mut run = Run::open(folder, args.steps, store)?;
    let workers = Workers::new(args.workers)?;
    let adam = AdamW { betas: (0.9, 0.98), weight_decay: 0.02, max_norm: 1.0 };
    loop {
        let step = store.step;
        // A run that stopped here, perhaps because of a gate, does not pass it by being started again.
        if step > 0 && (step.is_multiple_of(args.evaluate_every) || step >= args.steps) {
            let lmm = Lmm::load(&setting.sizes, &store.params(frozen))?;
            if judge(args, pixels, setting, world, &lmm, step, &mut run)? {
                run.save(store)?;
                break;
            }
        }
        if step >= args.steps {
            break;
        }
        let source = args.source(pixels, &setting.sizes, rng_for(args.seed, step, 99).random());
        let lmm = Lmm::load(&setting.sizes, &store.params(frozen))?;
        let tokens = AtomicUsize::new(0);
        let (loss, grads) = workers.gradients(|worker| {
            let samples = draw(args, setting, world, store.step, source, worker)?;
            let rows = samples.iter().map(|sample| sample.packed.positions.len());
            tokens.fetch_add(rows.sum(), Ordering::Relaxed);
            let loss = lmm.loss(&samples, source, args.alignment)?;
            let gradients = store.gradients(&loss).context("backward pass")?;
            Ok((f64::from(loss.to_scalar::<f32>()?), gradients))
        })?;
        let lr = progress::rate(args.lr, step, args.steps, 0.25);
        let share = |name: &str| match name {
            name if name.starts_with("vision_tower.") => args.tower_rate,
            name if name.contains("projector") => PROJECTOR_RATE,
            _ => 1.0,
        };
        let norm = store.update(&grads, &adam, |name| share(name) * lr)?;
        ensure!(store.step > step, "the gradient is not finite at step {step} (norm {norm}); lower --lr");
        let tokens = tokens.into_inner();
        run.stepped(store, loss, &format!("tokens {tokens} norm {norm:.2} {source:?}"))?;
    }
    Ok(())
}

/// Evaluates and notes what it finds; fails if a gate that is due is missed. Whether training may end early.
fn judge(
    args: &LmmArgs,
    pixels: bool,
    setting: &Setting,
    world: &WorldConfig,
    lmm: &Lmm,
    step: usize,
    run: &mut Run,
) -> Result<bool> {
    // What the decoder answers from codes bounds what it can answer from pictures: the tower loses the rest.
    let mut sources = vec![args.source(pixels, &setting.sizes, 0.0)];
    if pixels {
        sources.push(Source::Codes { grid: setting.sizes.grid(), noise: CODE_NOISE });
    }
    let mut enough = args.until_gates && !args.gate.is_empty();
    for source in sources {
        let report = evaluate(setting, world, lmm, source, args.evaluation_scenes)?;
        run.report(step, &format!("{source:?} {}", report.line()))?;
        run.curve(&report.point_of_curve(step, source))?;
        let due = |gate: &&Gate| gate.is_due(step, args.steps, args.evaluate_every);
        check_gates(args.gate.iter().filter(due), &report, step)?;
        enough &= check_gates(args.gate.iter(), &report, step).is_ok();
    }
    Ok(enough)
}

/// A worker's scenes of a step.
fn draw(
    args: &LmmArgs,
    setting: &Setting,
    world: &WorldConfig,
    step: usize,
    source: Source,
    worker: usize,
) -> Result<Vec<Sample>> {
    let mut rng = rng_for(args.seed, step, worker);
    let first = ((step * args.workers + worker) * args.batch) as u64;
    let mut packer = packer_for(setting, source);
    packer.kinds.clone_from(&args.kinds);
    packer.referring = args.referring;
    packer.easy = args.easy;
    let mut samples = Vec::new();
    for index in first..first + args.batch as u64 {
        let scene = world::generate(world, Split::Train, args.seed, index);
        let packed = packer.pack(&scene, &mut rng)?;
        samples.push(setting.sample(&scene, packed, source, &mut rng)?);
    }
    Ok(samples)
}

fn packer_for(setting: &Setting, source: Source) -> crate::pack::Packer {
    let tokens = match source {
        Source::Codes { grid, .. } => grid * grid,
        Source::Pixels => setting.sizes.image_tokens(),
    };
    setting.packer.with_image_tokens(tokens)
}

/// Evaluates on scenes of the validation split: every question, one narration, referring expressions.
pub(crate) fn evaluate(
    setting: &Setting,
    world: &WorldConfig,
    lmm: &Lmm,
    source: Source,
    scenes: u64,
) -> Result<Report> {
    let packer = packer_for(setting, source);
    let mut report = Report::default();
    let mut batch: Vec<Sample> = Vec::new();
    for index in 0..scenes {
        let mut rng = rng_for(7, index as usize, 0);
        let scene = world::generate(world, Split::Val, 7, index);
        let mut sequences = vec![packer.pack(&scene, &mut rng)?];
        sequences.extend(packer.pack_all_questions(&scene)?);
        for packed in sequences {
            batch.push(setting.sample(&scene, packed, source, &mut rng)?);
        }
        if batch.len() >= 12 || index + 1 == scenes {
            report.add(lmm, &batch, source)?;
            batch.clear();
        }
    }
    Ok(report)
}
