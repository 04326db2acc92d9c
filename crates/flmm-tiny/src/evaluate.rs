//! Stage `evaluate`: the finished bundle on unseen scenes, through the same code that users run.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::{DType, Device};
use flmm::Grounder;
use flmm::clusters::{at_logit_size, better_side};
use flmm::grounder::{AnswerOptions, Caption, GroundedAnswer, ModelPaths, Observation, Session};
use flmm::lmm::Turn;
use flmm::masks::Mask;
use flmm::phrases::{LAMBDA, select_keywords, token_texts, true_ranges};
use flmm_data::world::{self, Question, QuestionKind, Scene, SegmentRef, Split, WorldConfig};
use flmm_eval::marks::observe_reply;
use flmm_eval::reasonseg;
use flmm_eval::runs::Runs;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::ablations::{Ablations, ranked};
use crate::config;
use crate::lmm::rng_for;
use crate::measure::{Count, Narrated, Overlap, Phrases, median, percent, round, truth};
use crate::stage_head::{Told, expressions, narration};

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
    /// Also what other ways of making masks and finding phrases reach: max merging, fewer heads, noun-phrase rules,
    /// clusters of attention.
    #[arg(long)]
    pub(crate) ablations: bool,
}

impl Default for EvaluateArgs {
    fn default() -> Self {
        config::defaults()
    }
}

#[derive(Default)]
pub(crate) struct Report {
    questions: BTreeMap<QuestionKind, Count>,
    pub(crate) closed: Count,
    /// Per head: phrases whose strongest point lies on the named object.
    pointing: Vec<usize>,
    phrases: usize,
    pub(crate) coarse: Overlap,
    pub(crate) refined: Overlap,
    narrated_coarse: Narrated,
    narrated_refined: Narrated,
    clusters: Overlap,
    keywords: Phrases,
    /// Answers to reasoning questions: all phrases that the selector finds in them.
    reasoning: Vec<reasonseg::Score>,
    /// The same with all tokens of the answer as one phrase, as the paper measures it.
    reasoning_whole: Vec<reasonseg::Score>,
    /// Seconds from a picture and its first question to the grounded answer.
    seconds: Vec<f64>,
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
    let ranked = ranked(&chosen.pointing);
    let best = ranked.first().copied().unwrap_or(0);
    let mut ablations = args.ablations.then(|| Ablations::new(ranked));
    let bar = indicatif::ProgressBar::new(args.scenes);
    let mut report = Report::default();
    for index in 0..args.scenes {
        let scene = world::generate(world, Split::Test, args.seed, index);
        report.answers(&grounder, &scene).with_context(|| format!("scene {index}"))?;
        report.expressions(&grounder, &scene, index, ablations.as_mut())?;
        report.narration(&grounder, raw, &scene)?;
        if let Some(ablations) = &mut ablations {
            ablations.narration(&grounder, raw, &scene)?;
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let mut figures = report.json(best);
    figures["level"] = world.level.number().into();
    figures["scenes"] = args.scenes.into();
    figures["seed"] = args.seed.into();
    figures["bundle_megabytes"] = round(bytes(bundle)? as f64 / 1e6).into();
    if let Some(ablations) = ablations {
        figures["ablations"] = ablations.json();
    }
    Ok(figures)
}

/// Size of all files below `folder`.
fn bytes(folder: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let entry = entry?;
        let about = entry.metadata()?;
        sum += if about.is_dir() { bytes(&entry.path())? } else { about.len() };
    }
    Ok(sum)
}

impl Report {
    fn json(&self, best: usize) -> Value {
        let all: usize = self.pointing.iter().sum();
        let kinds: serde_json::Map<String, Value> = self
            .questions
            .iter()
            .map(|(kind, (right, all))| {
                (format!("{kind:?}"), json!({ "right": percent(*right, *all), "asked": all }))
            })
            .collect();
        let giou = |scores: &[reasonseg::Score]| {
            round(reasonseg::metrics(scores).metrics.get("gIoU").unwrap_or_default())
        };
        json!({
            "closed_questions": percent(self.closed.0, self.closed.1),
            "questions": kinds,
            "pointing": {
                "best_head": best,
                "best_head_right": percent(self.pointing.get(best).copied().unwrap_or(0), self.phrases),
                "mean_over_heads": percent(all, self.phrases * self.pointing.len()),
                "phrases": self.phrases,
            },
            "referring": { "coarse": self.coarse.json(), "refined": self.refined.json(),
                           "kmeans_better_side": self.clusters.json() },
            "narration": { "coarse": self.narrated_coarse.json(), "refined": self.narrated_refined.json() },
            "keyword_phrases": self.keywords.json(),
            "reasoning": {
                "gIoU": giou(&self.reasoning),
                "gIoU_whole_answer": giou(&self.reasoning_whole),
                "questions": self.reasoning.len(),
            },
            "answer_and_ground": {
                "median_seconds": (1e3 * median(self.seconds.clone())).round() / 1e3,
                "threads": rayon::current_num_threads(),
            },
        })
    }

    /// Asks every question of the scene, each in a conversation of its own, and gives the answers.
    pub(crate) fn answers(&mut self, grounder: &Grounder, scene: &Scene) -> Result<Vec<String>> {
        let clock = Instant::now();
        let mut answers = Vec::new();
        let mut session = grounder.start(&scene.image)?;
        for (at, question) in scene.texts.questions.iter().enumerate() {
            // The first one is timed with all that a user waits for: reading the picture, answering, masks.
            let answer = ask(grounder, &mut session, question, at == 0)?;
            if at == 0 {
                self.seconds.push(clock.elapsed().as_secs_f64());
            }
            self.count(question, &answer);
            answers.push(answer.answer);
        }
        for question in &scene.texts.reasoning {
            let answer = ask(grounder, &mut session, question, true)?;
            self.count(question, &answer);
            let masks: Vec<&Mask> = answer.phrases.iter().map(|phrase| &phrase.mask).collect();
            self.reasoning.push(reasoned(scene, question, &masks)?);
            let turns = [Turn::user(&question.question)];
            let (_, observation) = observe_reply(grounder, &mut session, &turns, &options(false))?;
            let masks = observation.map_or(Ok(Vec::new()), |seen| grounder.segment(&seen))?;
            let masks: Vec<&Mask> = masks.iter().map(|(refined, _)| refined).collect();
            self.reasoning_whole.push(reasoned(scene, question, &masks)?);
            answers.push(answer.answer);
        }
        Ok(answers)
    }

    fn count(&mut self, question: &Question, answer: &GroundedAnswer) {
        let right = usize::from(answer.answer.trim() == question.answer);
        let count = self.questions.entry(question.kind).or_default();
        *count = (count.0 + right, count.1 + 1);
        if question.closed {
            self.closed = (self.closed.0 + right, self.closed.1 + 1);
        }
    }

    /// Referring segmentation: one expression per object, concatenated as in RefCOCO evaluation.
    pub(crate) fn expressions(
        &mut self,
        grounder: &Grounder,
        scene: &Scene,
        index: u64,
        ablations: Option<&mut Ablations>,
    ) -> Result<()> {
        let chosen = expressions(scene, usize::MAX, &mut rng_for(11, index as usize, 0));
        if chosen.is_empty() {
            return Ok(());
        }
        let caption =
            Caption::from_expressions(grounder.lmm().tokenizer(), chosen.iter().map(|(text, _)| *text))?;
        let observation = grounder.observe(&scene.image, &caption)?;
        let masks = grounder.segment(&observation)?;
        let mut truths = Vec::new();
        for (at, (_, object)) in chosen.iter().enumerate() {
            let truth = truth(scene, &[SegmentRef::Object(*object)])?;
            self.refined.add(&masks[at].0, &truth)?;
            self.coarse.add(&masks[at].1, &truth)?;
            // The training-free baseline, with the better of its two sides chosen by the ground truth.
            let stack = at_logit_size(&observation.maps.get(at)?, &observation.geometry)?;
            self.clusters.add(&better_side(&stack, &truth, 0)?.mask, &truth)?;
            truths.push(truth);
        }
        match ablations {
            Some(ablations) => ablations.expressions(grounder, scene, &caption, &observation, &truths),
            None => Ok(()),
        }
    }

    /// A narration: pointing of every head, masks of every phrase, and whether the selector finds the phrases.
    fn narration(&mut self, grounder: &Grounder, raw: &tokenizers::Tokenizer, scene: &Scene) -> Result<()> {
        let Told { caption, segments, .. } = narration(raw, scene, 0)?;
        let observation = grounder.observe(&scene.image, &caption)?;
        self.point(scene, &observation, &segments)?;
        for (segments, (refined, coarse)) in segments.iter().zip(grounder.segment(&observation)?) {
            self.narrated_refined.add(&refined, scene, segments)?;
            self.narrated_coarse.add(&coarse, scene, segments)?;
        }
        if let Some(probs) = grounder.head().keyword_probs(&observation.hidden)? {
            let texts = token_texts(grounder.lmm().tokenizer(), &caption.token_ids);
            self.keywords.add(&select_keywords(&probs, &texts, LAMBDA), &true_ranges(&caption.mask_ids));
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

fn options(grounded: bool) -> AnswerOptions {
    let all = AnswerOptions { max_new_tokens: 48, ..AnswerOptions::default() };
    if grounded { all } else { AnswerOptions { phrases: None, ..all } }
}

/// What the model says to a question in a conversation of its own.
fn ask(
    grounder: &Grounder,
    session: &mut Session,
    question: &Question,
    grounded: bool,
) -> Result<GroundedAnswer> {
    session.turns = vec![Turn::user(&question.question)];
    Ok(grounder.reply(session, &options(grounded), &mut |_| {})?)
}

/// The union of `masks` against what the right answer to `question` means.
fn reasoned(scene: &Scene, question: &Question, masks: &[&Mask]) -> Result<reasonseg::Score> {
    let segments: Vec<SegmentRef> = question.links.iter().flat_map(|link| link.segments.clone()).collect();
    let truth = Runs::from(&truth(scene, &segments)?);
    let inside = |x: u32, y: u32| masks.iter().any(|mask| mask.get(x as usize, y as usize));
    let [height, width] = truth.size();
    let found = Runs::from_fn(height, width, inside);
    Ok(reasonseg::Score::new(&found, &truth, &Runs::empty(height, width), true)?)
}
