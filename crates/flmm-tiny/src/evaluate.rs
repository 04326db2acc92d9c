//! Stage `evaluate`: the finished bundle on unseen scenes, through the same code that users run.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{DType, Device};
use flmm::Grounder;
use flmm::clusters::{at_logit_size, better_side};
use flmm::grounder::{AnswerOptions, Caption, ModelPaths, Observation};
use flmm::lmm::Turn;
use flmm::masks::Mask;
use flmm::phrases::{LAMBDA, select_keywords, token_texts, true_ranges};
use flmm_data::world::{self, QuestionKind, Scene, SegmentRef, Split, WorldConfig};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::config;
use crate::lmm::rng_for;
use crate::stage_head::{Told, expressions, narration, union};

/// What to evaluate on.
#[derive(Debug, Clone, clap::Args, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct EvaluateArgs {
    /// Scenes of the test split.
    #[arg(long, default_value_t = 500)]
    pub(crate) scenes: u64,
    /// Seed of the test scenes; training and gates use others, and other splits.
    #[arg(long, default_value_t = 2026)]
    pub(crate) seed: u64,
    /// Scenes of the validation split on which the best head is chosen.
    #[arg(long, default_value_t = 100)]
    pub(crate) choose_head_on: u64,
}

impl Default for EvaluateArgs {
    fn default() -> Self {
        config::defaults()
    }
}

/// Right and all.
type Count = (usize, usize);

/// Intersection and union pixels, and the sum of single IoUs.
#[derive(Debug, Default)]
struct Overlap {
    intersection: usize,
    union: usize,
    ious: f64,
    masks: usize,
}

impl Overlap {
    fn add(&mut self, found: &Mask, truth: &Mask) -> Result<()> {
        let intersection = found.intersection(truth)?.area();
        let union = found.area() + truth.area() - intersection;
        self.intersection += intersection;
        self.union += union;
        self.ious += if union == 0 { 1.0 } else { intersection as f64 / union as f64 };
        self.masks += 1;
        Ok(())
    }

    fn json(&self) -> Value {
        json!({
            "cIoU": percent(self.intersection, self.union),
            "mIoU": round(100.0 * self.ious / self.masks.max(1) as f64),
            "masks": self.masks,
        })
    }
}

#[derive(Default)]
struct Report {
    questions: BTreeMap<QuestionKind, Count>,
    closed: Count,
    /// Per head: phrases whose strongest point lies on the named object.
    pointing: Vec<usize>,
    phrases: usize,
    coarse: Overlap,
    refined: Overlap,
    narrated_coarse: Overlap,
    narrated_refined: Overlap,
    clusters: Overlap,
    /// Phrases found, predicted and true.
    keywords: [usize; 3],
}

/// Evaluates the bundle and returns the figures of the model card.
pub(crate) fn run(
    args: &EvaluateArgs,
    bundle: &Path,
    raw: &tokenizers::Tokenizer,
    world: &WorldConfig,
) -> Result<Value> {
    let grounder = Grounder::open(&ModelPaths::bundle(bundle), &Device::Cpu, DType::F32)?;
    let mut chosen = Report::default();
    for index in 0..args.choose_head_on {
        let scene = world::generate(world, Split::Val, args.seed, index);
        chosen.narration(&grounder, raw, &scene)?;
    }
    let best = (0..chosen.pointing.len()).max_by_key(|head| chosen.pointing[*head]).unwrap_or(0);
    let bar = indicatif::ProgressBar::new(args.scenes);
    let mut report = Report::default();
    for index in 0..args.scenes {
        let scene = world::generate(world, Split::Test, args.seed, index);
        report.answers(&grounder, &scene).with_context(|| format!("scene {index}"))?;
        report.expressions(&grounder, &scene, index)?;
        report.narration(&grounder, raw, &scene)?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    let all: usize = report.pointing.iter().sum();
    let [found, predicted, truth] = report.keywords;
    let kinds: serde_json::Map<String, Value> = report
        .questions
        .iter()
        .map(|(kind, (right, all))| {
            (format!("{kind:?}"), json!({ "right": percent(*right, *all), "asked": all }))
        })
        .collect();
    Ok(json!({
        "scenes": args.scenes,
        "seed": args.seed,
        "closed_questions": percent(report.closed.0, report.closed.1),
        "questions": kinds,
        "pointing": {
            "best_head": best,
            "best_head_right": percent(report.pointing.get(best).copied().unwrap_or(0), report.phrases),
            "mean_over_heads": percent(all, report.phrases * report.pointing.len()),
            "phrases": report.phrases,
        },
        "referring": { "coarse": report.coarse.json(), "refined": report.refined.json(),
                       "kmeans_better_side": report.clusters.json() },
        "narration": { "coarse": report.narrated_coarse.json(), "refined": report.narrated_refined.json() },
        "keyword_phrases": {
            "precision": percent(found, predicted),
            "recall": percent(found, truth),
            "f1": percent(2 * found, predicted + truth),
        },
    }))
}

impl Report {
    /// Asks every question of the scene, each in a conversation of its own.
    fn answers(&mut self, grounder: &Grounder, scene: &Scene) -> Result<()> {
        let mut session = grounder.start(&scene.image)?;
        let options = AnswerOptions { phrases: None, max_new_tokens: 48, ..AnswerOptions::default() };
        for question in scene.texts.questions.iter().chain(&scene.texts.reasoning) {
            session.turns = vec![Turn::user(&question.question)];
            let answer = grounder.reply(&mut session, &options, &mut |_| {})?;
            let right = usize::from(answer.answer.trim() == question.answer);
            let count = self.questions.entry(question.kind).or_default();
            *count = (count.0 + right, count.1 + 1);
            if question.closed {
                self.closed = (self.closed.0 + right, self.closed.1 + 1);
            }
        }
        Ok(())
    }

    /// Referring segmentation: one expression per object, concatenated as in RefCOCO evaluation.
    fn expressions(&mut self, grounder: &Grounder, scene: &Scene, index: u64) -> Result<()> {
        let chosen = expressions(scene, usize::MAX, &mut rng_for(11, index as usize, 0));
        if chosen.is_empty() {
            return Ok(());
        }
        let caption =
            Caption::from_expressions(grounder.lmm().tokenizer(), chosen.iter().map(|(text, _)| *text))?;
        let observation = grounder.observe(&scene.image, &caption)?;
        let masks = grounder.segment(&observation)?;
        for (at, (_, object)) in chosen.iter().enumerate() {
            let truth = truth(scene, &[SegmentRef::Object(*object)])?;
            self.refined.add(&masks[at].0, &truth)?;
            self.coarse.add(&masks[at].1, &truth)?;
            // The training-free baseline, with the better of its two sides chosen by the ground truth.
            let stack = at_logit_size(&observation.maps.get(at)?, &observation.geometry)?;
            self.clusters.add(&better_side(&stack, &truth, 0)?.mask, &truth)?;
        }
        Ok(())
    }

    /// A narration: pointing of every head, masks of every phrase, and whether the selector finds the phrases.
    fn narration(&mut self, grounder: &Grounder, raw: &tokenizers::Tokenizer, scene: &Scene) -> Result<()> {
        let Told { caption, segments, .. } = narration(raw, scene, 0)?;
        let observation = grounder.observe(&scene.image, &caption)?;
        self.point(scene, &observation, &segments)?;
        for (segments, (refined, coarse)) in segments.iter().zip(grounder.segment(&observation)?) {
            let truth = truth(scene, segments)?;
            self.narrated_refined.add(&refined, &truth)?;
            self.narrated_coarse.add(&coarse, &truth)?;
        }
        if let Some(probs) = grounder.head().keyword_probs(&observation.hidden)? {
            let texts = token_texts(grounder.lmm().tokenizer(), &caption.token_ids);
            let found = select_keywords(&probs, &texts, LAMBDA);
            let truth = true_ranges(&caption.mask_ids);
            self.keywords[0] += found.iter().filter(|range| truth.contains(range)).count();
            self.keywords[1] += found.len();
            self.keywords[2] += truth.len();
        }
        Ok(())
    }

    fn point(
        &mut self,
        scene: &Scene,
        observation: &Observation,
        segments: &[Vec<SegmentRef>],
    ) -> Result<()> {
        let (_, channels, rows, columns) = observation.maps.dims4()?;
        self.pointing.resize(channels, 0);
        let geometry = &observation.geometry;
        let scale = geometry.original.1 as f64 / geometry.image_shape.1 as f64;
        let (cell_h, cell_w) =
            (geometry.padded_shape.0 as f64 / rows as f64, geometry.padded_shape.1 as f64 / columns as f64);
        for (at, segments) in segments.iter().enumerate() {
            if segments.iter().any(|s| matches!(s, SegmentRef::Stuff(_))) {
                continue;
            }
            self.phrases += 1;
            let truth = truth(scene, segments)?;
            let maps: Vec<f32> = observation.maps.get(at)?.flatten_all()?.to_vec1()?;
            for (head, map) in maps.chunks_exact(rows * columns).enumerate() {
                let peak = (0..map.len()).fold(0, |best, i| if map[i] > map[best] { i } else { best });
                let y = ((peak / columns) as f64 + 0.5) * cell_h - geometry.before.0 as f64;
                let x = ((peak % columns) as f64 + 0.5) * cell_w - geometry.before.1 as f64;
                let inside = x >= 0.0
                    && y >= 0.0
                    && x * scale < truth.width() as f64
                    && y * scale < truth.height() as f64;
                let hit = inside && truth.get((x * scale) as usize, (y * scale) as usize);
                self.pointing[head] += usize::from(hit);
            }
        }
        Ok(())
    }
}

fn truth(scene: &Scene, segments: &[SegmentRef]) -> Result<Mask> {
    let (height, width) = (scene.image.height() as usize, scene.image.width() as usize);
    Ok(Mask::new(width, height, union(scene, segments).iter().map(|v| *v > 0).collect())?)
}

fn percent(part: usize, whole: usize) -> f64 {
    round(100.0 * part as f64 / whole.max(1) as f64)
}

fn round(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}
