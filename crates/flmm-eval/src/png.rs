//! Panoptic narrative grounding (`spec/evaluation.md` §2).

use std::sync::Arc;

use candle_core::Tensor;
use flmm::grounder::Caption;
use flmm::lmm::{GROUNDING_INSTRUCTION, Turn};
use flmm::masks::Mask;
use flmm::{Error, Grounder, Result};
use flmm_data::images::ImageStore;
use flmm_data::narratives::{NarrativeSample, Narratives};
use hotcoco::types::Rle;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::marks::{LastSession, Marks};
use crate::record::{Metrics, Prediction};
use crate::runs::{Overlap, Runs};
use crate::task::{Aggregate, Need, Predicted, Rows, Samples, Settings, Task, Truth, parse_scores};

/// What of the reference's procedure may be chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Protocol {
    /// As the reference, put a random other narrative, drawn by this seed, in the place of each that has no grounded
    /// phrase; unless set, such narratives are left out.
    pub replace_empty: Option<u64>,
}

/// The split that results are published on.
pub const SPLIT: &str = "val2017";
/// Number of thresholds of average recall, the last one excluded.
const THRESHOLDS: u64 = 99_999;
/// Points of the recall curve that are kept: IoU 0, 0.01 … 1.
const CURVE: u32 = 100;

/// The validation set, on which results are published.
pub struct Png;

/// The task.
pub fn tasks() -> impl Iterator<Item = Box<dyn Task>> {
    std::iter::once(Box::new(Png) as Box<dyn Task>)
}

/// The files of the narratives.
pub(crate) fn needs() -> Vec<Need> {
    let png = "Panoptic Narrative Grounding";
    let coco = "COCO 2017 panoptic annotations";
    vec![
        Need::new(format!("coco/annotations/png_coco_{SPLIT}.json"), png),
        Need::new(format!("coco/annotations/panoptic_{SPLIT}.json"), coco),
        Need::new(format!("coco/annotations/panoptic_{SPLIT}"), coco),
        Need::pictures(format!("coco/{SPLIT}"), "COCO 2017 validation pictures"),
    ]
}

impl Task for Png {
    fn name(&self) -> &str {
        "png"
    }

    fn about(&self) -> String {
        "panoptic narrative grounding, val: average recall of all phrases, things, stuff, singulars, plurals"
            .into()
    }

    fn needs(&self) -> Vec<Need> {
        needs()
    }

    fn open(&self, settings: &Settings) -> Result<Box<dyn Samples>> {
        Ok(Box::new(PngSamples::open(settings)?))
    }

    fn aggregate(&self, scores: &[Value]) -> Result<Aggregate> {
        Ok(metrics(&parse_scores::<Score>(scores)?))
    }
}

/// The scores of a narrative's phrases, one entry each.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Intersection over union.
    pub iou: Vec<f64>,
    /// Share of the pixels on which prediction and truth agree.
    pub accuracy: Vec<f64>,
    /// Whether the phrase means things; stuff otherwise.
    pub thing: Vec<bool>,
    /// Whether more than one object is meant.
    pub plural: Vec<bool>,
}

impl Score {
    /// Adds a phrase whose masks overlap so in a picture of `pixels` pixels.
    pub fn push(&mut self, overlap: Overlap, pixels: u64, thing: bool, plural: bool) {
        let wrong = overlap.union - overlap.intersection;
        self.iou.push(overlap.iou());
        self.accuracy.push((pixels - wrong) as f64 / pixels.max(1) as f64);
        self.thing.push(thing);
        self.plural.push(plural);
    }
}

/// Average recall: the area under the recall curve, as a left sum over thresholds 1e-5 apart.
///
/// Kept as whole numbers, so that the order of adding cannot matter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AverageRecall {
    reached: u64,
    count: u64,
}

impl AverageRecall {
    /// Adds an IoU, 0 to 1.
    pub fn add(&mut self, iou: f64) {
        self.reached += thresholds_reached(iou);
        self.count += 1;
    }

    /// As a fraction; 0 without any IoU.
    pub fn value(self) -> f64 {
        self.reached as f64 * 1e-5 / self.count.max(1) as f64
    }
}

/// How many of the thresholds i · 1e-5, i = 0 … 99,998, are at most `iou`; compared in f32, as in the reference.
fn thresholds_reached(iou: f64) -> u64 {
    let reaches = |i: u64| (i as f64 * 1e-5) as f32 <= iou as f32;
    let mut count = ((iou * 1e5) as u64).min(THRESHOLDS);
    while count > 0 && !reaches(count - 1) {
        count -= 1;
    }
    while count < THRESHOLDS && reaches(count) {
        count += 1;
    }
    count
}

/// Average recall of all phrases and of the four kinds, share of IoU above 0.5, mean pixel accuracy: percent. The
/// details hold the recall curves (percent at IoU 0, 0.01 … 1) and the number of phrases of each kind.
pub fn metrics(scores: &[Score]) -> Aggregate {
    /// Whether a phrase of things, of several objects, belongs to a kind.
    type Belongs = fn(thing: bool, plural: bool) -> bool;
    let kinds: [(&str, Belongs); 5] = [
        ("all", |_, _| true),
        ("thing", |thing, _| thing),
        ("stuff", |thing, _| !thing),
        ("singular", |_, plural| !plural),
        ("plural", |_, plural| plural),
    ];
    let phrases = || {
        scores.iter().flat_map(|score| {
            let flags = score.thing.iter().zip(&score.plural);
            score.iou.iter().zip(flags).map(|(iou, (thing, plural))| (*iou, *thing, *plural))
        })
    };
    let mut metrics = Metrics::default();
    let (mut curves, mut counts) = (serde_json::Map::new(), serde_json::Map::new());
    for (kind, belongs) in kinds {
        let (mut recall, mut reached) = (AverageRecall::default(), [0u64; CURVE as usize + 1]);
        for (iou, ..) in phrases().filter(|(_, thing, plural)| belongs(*thing, *plural)) {
            recall.add(iou);
            for (i, count) in reached.iter_mut().enumerate() {
                *count += u64::from(iou >= i as f64 / f64::from(CURVE));
            }
        }
        metrics.push(format!("AR {kind}"), 100.0 * recall.value());
        let curve = reached.map(|count| 100.0 * count as f64 / recall.count.max(1) as f64);
        curves.insert(kind.to_owned(), json!(curve.as_slice()));
        counts.insert(kind.to_owned(), json!(recall.count));
    }
    let count = phrases().count().max(1) as f64;
    let above = phrases().filter(|(iou, ..)| *iou > 0.5).count();
    let accuracy: f64 = scores.iter().flat_map(|score| &score.accuracy).sum();
    metrics.push("acc@0.5", 100.0 * above as f64 / count);
    metrics.push("pixel accuracy", 100.0 * accuracy / count);
    Aggregate { metrics, details: json!({ "phrases": counts, "recall_curves": curves }) }
}

/// The narratives that are evaluated.
pub(crate) struct PngSamples {
    pub(crate) narratives: Narratives,
    pictures: Arc<ImageStore>,
    pub(crate) ids: Vec<String>,
    /// The narrative of each sample.
    places: Vec<usize>,
    protocol: Protocol,
    last: LastSession,
}

impl PngSamples {
    pub(crate) fn open(settings: &Settings) -> Result<Self> {
        let narratives = Narratives::open_split(&settings.data, SPLIT)?;
        let protocol = settings.png;
        let all = 0..narratives.len();
        let is_grounded = |&index: &usize| narratives.is_grounded(index);
        let grounded: Vec<usize> = all.clone().filter(is_grounded).collect();
        if grounded.is_empty() {
            return Err(Error::request(
                "no narrative has a grounded phrase",
                "check that the narrative and panoptic files belong together",
            ));
        }
        let (mut ids, mut places) = (Vec::new(), Vec::new());
        for index in all {
            let place = match (is_grounded(&index), protocol.replace_empty) {
                (true, _) => index,
                (false, None) => continue,
                (false, Some(seed)) => grounded[draw(seed, index) % grounded.len()],
            };
            ids.push(index.to_string());
            places.push(place);
        }
        let pictures = settings.pictures()?;
        Ok(Self { narratives, pictures, ids, places, protocol, last: LastSession::default() })
    }

    pub(crate) fn sample(&self, index: usize) -> Result<NarrativeSample> {
        self.narratives.sample(self.places[index])
    }

    /// As [`PngSamples::sample`], with run lengths.
    pub(crate) fn sample_rle(&self, index: usize) -> Result<NarrativeSample<Rle>> {
        self.narratives.sample_rle(self.places[index])
    }

    /// Hidden states `[L, T, D]` of the caption's tokens, without maps and without SAM.
    pub(crate) fn hidden(
        &self,
        grounder: &Grounder,
        sample: &NarrativeSample,
        caption: &Caption,
    ) -> Result<Tensor> {
        let name = picture(sample);
        let turns = [Turn::user(GROUNDING_INSTRUCTION)];
        let read = || self.pictures.read(&name);
        self.last.with(grounder, &name, read, |session| grounder.hidden_in(session, &turns, caption))
    }

    /// Reads a narrative as if the model had said it.
    pub(crate) fn observe(
        &self,
        grounder: &Grounder,
        sample: &NarrativeSample,
        caption: &Caption,
    ) -> Result<flmm::grounder::Observation> {
        let name = picture(sample);
        let turns = [Turn::user(GROUNDING_INSTRUCTION)];
        self.last.observe(grounder, &name, || self.pictures.read(&name), &turns, caption)
    }
}

/// The picture of a narrative.
pub fn picture<M>(sample: &NarrativeSample<M>) -> String {
    format!("coco/{SPLIT}/{}", sample.file_name)
}

/// The caption of a narrative: every utterance is encoded by itself.
pub fn caption(grounder: &Grounder, sample: &NarrativeSample) -> Result<Caption> {
    let segments = sample.utterances.iter().map(|(text, phrase)| (text.as_str(), *phrase));
    Caption::from_segments(grounder.lmm().tokenizer(), segments)
}

/// A number that depends on the seed and the narrative only (SplitMix64).
fn draw(seed: u64, index: usize) -> usize {
    let value = seed ^ (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (value >> 33) as usize
}

/// The words of every phrase.
fn texts<M>(sample: &NarrativeSample<M>) -> impl Iterator<Item = &str> {
    sample.utterances.iter().filter(|(_, phrase)| phrase.is_some()).map(|(text, _)| text.trim())
}

impl Samples for PngSamples {
    fn ids(&self) -> &[String] {
        &self.ids
    }

    fn settings(&self) -> Value {
        json!({ "replace_empty": self.protocol.replace_empty })
    }

    fn template(&self, index: usize) -> Result<Value> {
        let sample = self.sample_rle(index)?;
        let phrases: Vec<Value> = texts(&sample).map(|text| json!({ "text": text })).collect();
        Ok(json!({
            "id": self.ids[index], "image_id": sample.image_id.to_string(), "image": picture(&sample),
            "size": sample.size, "answer": narrative(&sample), "phrases": phrases,
        }))
    }

    fn truth(&self, index: usize) -> Result<Option<Truth>> {
        let sample = self.sample_rle(index)?;
        let texts: Vec<String> = texts(&sample).map(str::to_owned).collect();
        let masks = sample.phrases.into_iter().map(|phrase| Runs::from(phrase.mask));
        Ok(Some(Truth { phrases: texts.into_iter().zip(masks).collect(), given: true }))
    }

    fn predict(&self, index: usize, grounder: &Grounder, rows: Rows) -> Result<Predicted> {
        let sample = self.sample(index)?;
        let caption = caption(grounder, &sample)?;
        let observation = self.observe(grounder, &sample, &caption)?;
        let truth = |at: usize| Ok(Some(Mask::from(&sample.phrases[at].mask)));
        let marks = Marks::of(grounder, &observation, rows, &truth)?;
        let prediction = Prediction {
            id: self.ids[index].clone(),
            image_id: Some(sample.image_id.to_string()),
            prompt: GROUNDING_INSTRUCTION.to_owned(),
            answer: narrative(&sample),
            ..Prediction::default()
        };
        Ok(marks.predicted(prediction, texts(&sample)))
    }

    fn score(&self, index: usize, prediction: &Prediction) -> Result<Value> {
        let sample = self.sample_rle(index)?;
        prediction.check_picture(&sample.image_id.to_string())?;
        let pixels = u64::from(sample.size[0]) * u64::from(sample.size[1]);
        let masks = prediction.masks(sample.phrases.len(), sample.size)?;
        let mut score = Score::default();
        for (mask, phrase) in masks.iter().zip(sample.phrases) {
            let overlap = mask.overlap(&Runs::from(phrase.mask))?;
            score.push(overlap, pixels, phrase.is_thing, phrase.plural);
        }
        Ok(json!(score))
    }
}

/// The whole text.
pub(crate) fn narrative<M>(sample: &NarrativeSample<M>) -> String {
    sample.utterances.iter().map(|(text, _)| text.as_str()).collect()
}
