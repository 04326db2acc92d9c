//! Stages `codes` and `lmm`: the decoder learns to read codes, then pictures.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;
use flmm_data::world::{self, Split, WorldConfig};
use rand::Rng;

use crate::lmm::{Lmm, Report, Sample, Setting, Source, rng_for};
use crate::parallel;
use crate::progress::{self, Run};
use crate::store::{AdamW, Grads, Store};

/// How long and how fast to train.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct LmmArgs {
    /// Optimiser steps in all.
    #[arg(long, default_value_t = 6000)]
    pub(crate) steps: usize,
    /// Of the stage `codes`: steps on an 8×8 grid before the full grid.
    #[arg(long, default_value_t = 1500)]
    pub(crate) coarse_steps: usize,
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
    /// Weight of the contrastive alignment of phrases with patches.
    #[arg(long, default_value_t = 0.3)]
    pub(crate) alignment: f64,
    /// Of the stage `lmm`: begin from this trained LMM folder instead of the stages `tower` and `codes`.
    #[arg(long)]
    pub(crate) from: Option<PathBuf>,
}

/// Share of picture batches in the stage `lmm`; the rest stays on codes as an anchor.
const PIXEL_SHARE: f64 = 0.85;
/// Noise on the codes, in units of a code's length.
const CODE_NOISE: f32 = 0.45;
/// Scenes of the regular evaluation.
const EVALUATION_SCENES: u64 = 96;

impl LmmArgs {
    fn source(&self, pixels: bool, step: usize, draw: f64) -> Source {
        if pixels && draw < PIXEL_SHARE {
            Source::Pixels
        } else if pixels || step >= self.coarse_steps {
            Source::Codes { grid: 12, noise: CODE_NOISE }
        } else {
            Source::Codes { grid: 8, noise: CODE_NOISE }
        }
    }
}

/// Trains the decoder on codes or, with `pixels`, decoder and projector on pictures behind the `frozen` tower.
pub(crate) fn run(
    args: &LmmArgs,
    pixels: bool,
    setting: &Setting,
    world: &WorldConfig,
    store: &mut Store,
    frozen: &HashMap<String, Tensor>,
    folder: &Path,
) -> Result<()> {
    let mut run = Run::open(folder, args.steps, store)?;
    let adam = AdamW { betas: (0.9, 0.98), weight_decay: 0.02, max_norm: 1.0 };
    while store.step < args.steps {
        let step = store.step;
        let source = args.source(pixels, step, rng_for(args.seed, step, 99).random());
        let lmm = Lmm::load(&setting.sizes, &store.params(frozen))?;
        let (loss, grads) = parallel::gradients(args.workers, |worker| {
            gradients(args, setting, world, &lmm, store, source, worker)
        })?;
        let lr = progress::rate(args.lr, step, args.steps, 0.25);
        let norm =
            store.update(&grads, &adam, |name| if name.contains("projector") { 0.3 * lr } else { lr })?;
        ensure!(store.step > step, "the gradient is not finite at step {step} (norm {norm}); lower --lr");
        run.stepped(store, loss, &format!("norm {norm:.2} {source:?}"))?;
        if store.step.is_multiple_of(args.evaluate_every) || store.step == args.steps {
            let lmm = Lmm::load(&setting.sizes, &store.params(frozen))?;
            let source = args.source(pixels, step, 0.0);
            let report = evaluate(setting, world, &lmm, source, EVALUATION_SCENES)?;
            run.report(store.step, &report.line())?;
        }
    }
    Ok(())
}

fn gradients(
    args: &LmmArgs,
    setting: &Setting,
    world: &WorldConfig,
    lmm: &Lmm,
    store: &Store,
    source: Source,
    worker: usize,
) -> Result<(f64, Grads)> {
    let mut rng = rng_for(args.seed, store.step, worker);
    let first = ((store.step * args.workers + worker) * args.batch) as u64;
    let packer = packer_for(setting, source);
    let mut samples = Vec::new();
    for index in first..first + args.batch as u64 {
        let scene = world::generate(world, Split::Train, args.seed, index);
        let packed = packer.pack(&scene, &mut rng)?;
        samples.push(setting.sample(&scene, packed, source, &mut rng)?);
    }
    let loss = lmm.loss(&samples, source, args.alignment)?;
    Ok((f64::from(loss.to_scalar::<f32>()?), store.gradients(&loss).context("backward pass")?))
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
