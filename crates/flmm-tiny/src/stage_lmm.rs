//! Stages `codes` and `lmm`: the decoder learns to read codes, then pictures.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;
use flmm_data::world::{self, QuestionKind, Split, WorldConfig};
use rand::Rng;

use crate::lmm::{Lmm, Report, Sample, Setting, Source, rng_for};
use crate::pack::{Kind, REFERRING};
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
    /// Only questions of these kinds, in the log's names: an early part of the curriculum.
    #[arg(long, value_delimiter = ',', value_parser = question_kind)]
    pub(crate) kinds: Vec<QuestionKind>,
    /// Fail unless this share of a kind is answered right, in percent: at the end (`Where=80`), or at the first
    /// evaluation from a step on (`Where=60@250`).
    #[arg(long, value_parser = gate)]
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
    /// Of the stage `lmm`: train the tower as well, at this share of the learning rate.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) tower_rate: f64,
    /// Of the stage `lmm`: begin from this trained LMM folder instead of the stages `tower` and `codes`.
    #[arg(long)]
    pub(crate) from: Option<PathBuf>,
}

/// A kind of question by the name it has in the log.
fn question_kind(name: &str) -> Result<QuestionKind, String> {
    let kind = serde_json::from_value(serde_json::Value::from(name));
    kind.map_err(|_| format!("no kind of question is called `{name}`"))
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().map_err(|_| format!("`{text}` is not a number"))?;
    if (0.0..=1.0).contains(&share) { Ok(share) } else { Err("expected a number from 0 to 1".into()) }
}

/// What a kind of question has to reach.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Gate {
    kind: QuestionKind,
    /// Right answers, in percent.
    percent: f64,
    /// When it is checked; at the end if `None`.
    step: Option<usize>,
}

impl Gate {
    /// Whether the evaluation at `step` is the first at or behind the gate's own step, of `steps` in all.
    /// It depends on nothing else, so a resumed run checks what an uninterrupted one checks.
    fn is_due(&self, step: usize, steps: usize, every: usize) -> bool {
        let at = self.step.unwrap_or(steps).min(steps);
        let before = (step - 1) / every.max(1) * every;
        before < at && at <= step
    }
}

/// `KIND=PERCENT` or `KIND=PERCENT@STEP`
fn gate(text: &str) -> Result<Gate, String> {
    let (kind, rest) = text.split_once('=').ok_or("expected KIND=PERCENT, such as Where=80")?;
    let (percent, step) = match rest.split_once('@') {
        Some((percent, step)) => (percent, Some(step)),
        None => (rest, None),
    };
    let percent = percent.parse().map_err(|_| format!("`{percent}` is not a number"))?;
    let step =
        step.map(|s| s.parse().ok().filter(|s| *s > 0).ok_or(format!("`{s}` is not a step"))).transpose()?;
    Ok(Gate { kind: question_kind(kind)?, percent, step })
}

/// Share of picture batches in the stage `lmm`; the rest stays on codes as an anchor.
const PIXEL_SHARE: f64 = 0.85;
/// Noise on the codes, in units of a code's length.
const CODE_NOISE: f32 = 0.45;
/// Share of the learning rate at which the projector, trained before, goes on.
const PROJECTOR_RATE: f64 = 0.3;
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
    let mut run = Run::open(folder, args.steps, store)?;
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
        let source = args.source(pixels, step, rng_for(args.seed, step, 99).random());
        let lmm = Lmm::load(&setting.sizes, &store.params(frozen))?;
        let (loss, grads) = parallel::gradients(args.workers, |worker| {
            gradients(args, setting, world, &lmm, store, source, worker)
        })?;
        let lr = progress::rate(args.lr, step, args.steps, 0.25);
        let share = |name: &str| match name {
            name if name.starts_with("vision_tower.") => args.tower_rate,
            name if name.contains("projector") => PROJECTOR_RATE,
            _ => 1.0,
        };
        let norm = store.update(&grads, &adam, |name| share(name) * lr)?;
        ensure!(store.step > step, "the gradient is not finite at step {step} (norm {norm}); lower --lr");
        run.stepped(store, loss, &format!("norm {norm:.2} {source:?}"))?;
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
    let mut sources = vec![args.source(pixels, step - 1, 0.0)];
    if pixels {
        sources.push(Source::Codes { grid: setting.sizes.grid(), noise: CODE_NOISE });
    }
    let mut enough = args.until_gates;
    for source in sources {
        let report = evaluate(setting, world, lmm, source, EVALUATION_SCENES)?;
        run.report(step, &format!("{source:?} {}", report.line()))?;
        run.curve(&report.point_of_curve(step, source))?;
        let due = |gate: &&Gate| gate.is_due(step, args.steps, args.evaluate_every);
        check_gates(args.gate.iter().filter(due), &report, step)?;
        enough &= check_gates(args.gate.iter(), &report, step).is_ok();
    }
    Ok(enough)
}

/// Hours are not worth spending on a model that has not learnt what they build on.
fn check_gates<'a>(gates: impl Iterator<Item = &'a Gate>, report: &Report, step: usize) -> Result<()> {
    for Gate { kind, percent: wanted, .. } in gates {
        let (right, all) = report.answers.get(&Kind::Question(*kind)).copied().unwrap_or_default();
        let percent = 100.0 * right as f64 / all.max(1) as f64;
        ensure!(
            percent >= *wanted,
            "gate missed at step {step}: {kind:?} {percent:.0} %, wanted {wanted} %; train longer"
        );
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
    let mut packer = packer_for(setting, source);
    packer.kinds.clone_from(&args.kinds);
    packer.referring = args.referring;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_is_due_at_one_evaluation() {
        let steps = |gate: &str| {
            let gate = self::gate(gate).expect(gate);
            let evaluations = [250, 500, 750, 900];
            evaluations.into_iter().filter(|step| gate.is_due(*step, 900, 250)).collect::<Vec<_>>()
        };
        assert_eq!(steps("Where=80"), [900]);
        assert_eq!(steps("Where=80@250"), [250]);
        assert_eq!(steps("Where=80@251"), [500]);
        assert_eq!(steps("Where=80@800"), [900]);
        assert_eq!(steps("Where=80@5000"), [900]);
    }

    #[test]
    fn wrong_gates_are_refused() {
        for text in ["Where", "Where=x", "Wher=80", "Where=80@", "Where=80@0", "Where=80@x"] {
            assert!(gate(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_missed_gate_names_its_kind_and_step() -> Result<()> {
        let mut report = Report::default();
        report.answers.insert(Kind::Question(QuestionKind::Where), (7, 10));
        let gates = ["Where=70", "Where=71"].map(|text| gate(text).expect(text));
        check_gates(gates[..1].iter(), &report, 500)?;
        let missed = check_gates(gates.iter(), &report, 500).expect_err("70 % is less than 71 %").to_string();
        assert_eq!(missed, "gate missed at step 500: Where 70 %, wanted 71 %; train longer");
        Ok(())
    }
}
