//! The keyword selector on panoptic narratives (`spec/training.md` §8.2): does it find the words that are grounded?

use std::ops::Range;

use flmm::grounder::Caption;
use flmm::lmm::GROUNDING_INSTRUCTION;
use flmm::masks::Mask;
use flmm::phrases::{LAMBDA, select_keywords};
use flmm::{Error, Grounder, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::marks::Marks;
use crate::png::{self, AverageRecall, PngSamples, caption, narrative, picture};
use crate::record::{Metrics, Prediction};
use crate::runs::Runs;
use crate::task::{Aggregate, Need, Predicted, Rows, Samples, Settings, Task, parse_scores};

/// The selector on the validation narratives.
pub struct Keywords;

/// The task.
pub fn tasks() -> impl Iterator<Item = Box<dyn Task>> {
    std::iter::once(Box::new(Keywords) as Box<dyn Task>)
}

impl Task for Keywords {
    fn name(&self) -> &str {
        "png_keywords"
    }

    fn about(&self) -> String {
        "the keyword selector on panoptic narratives, val: token and phrase F1, average precision, recall of masks".into()
    }

    fn needs(&self) -> Vec<Need> {
        png::needs()
    }

    fn open(&self, settings: &Settings) -> Result<Box<dyn Samples>> {
        let protocol = png::Protocol { replace_empty: None };
        Ok(Box::new(KeywordSamples(PngSamples::open(&Settings { png: protocol, ..settings.clone() })?)))
    }

    fn aggregate(&self, scores: &[Value]) -> Result<Aggregate> {
        Ok(metrics(&parse_scores::<Score>(scores)?))
    }
}

/// What a prediction's `extra` says of the narrative's tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tokens {
    /// Keyword probability of every token.
    pub probs: Vec<f32>,
    /// True phrase of every token, counted from 0; −1 where it belongs to none.
    pub phrases: Vec<i32>,
    /// First token, and the one behind the last, of every predicted phrase.
    pub found: Vec<[usize; 2]>,
}

/// The score of a narrative.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Keyword probabilities of tokens that belong to a phrase.
    pub positive: Vec<f32>,
    /// Those of all other tokens.
    pub negative: Vec<f32>,
    /// Predicted phrases that are exactly a true one, predicted phrases, true phrases.
    pub phrases: [u64; 3],
    /// IoU of every true phrase with the predicted one whose tokens overlap it by more than half; 0 without one.
    pub iou: Vec<f64>,
    /// Whether the true phrase means things.
    pub thing: Vec<bool>,
}

/// Token precision, recall and F1 at λ = 0.3, average precision, phrase precision, recall and F1 (exact tokens), and the
/// average recall of the masks of true phrases: percent.
pub fn metrics(scores: &[Score]) -> Aggregate {
    let positive = || scores.iter().flat_map(|score| &score.positive).copied();
    let negative = || scores.iter().flat_map(|score| &score.negative).copied();
    let count = |probs: &mut dyn Iterator<Item = f32>| probs.filter(|p| *p > LAMBDA).count() as u64;
    let right = count(&mut positive());
    let tokens = [right, right + count(&mut negative()), positive().count() as u64];
    let phrases = scores.iter().fold([0; 3], |sum: [u64; 3], score| {
        [sum[0] + score.phrases[0], sum[1] + score.phrases[1], sum[2] + score.phrases[2]]
    });
    let mut metrics = Metrics::default();
    for (name, [right, predicted, truth]) in [("token", tokens), ("phrase", phrases)] {
        let share = |part: u64, whole: u64| 100.0 * part as f64 / whole.max(1) as f64;
        metrics.push(format!("{name} precision"), share(right, predicted));
        metrics.push(format!("{name} recall"), share(right, truth));
        metrics.push(format!("{name} F1"), share(2 * right, predicted + truth));
    }
    let labelled = positive().map(|p| (p, true)).chain(negative().map(|p| (p, false)));
    metrics.push("token AP", 100.0 * average_precision(labelled.collect()));
    for (name, wanted) in [("AR all", None), ("AR thing", Some(true)), ("AR stuff", Some(false))] {
        let mut recall = AverageRecall::default();
        let masks = scores.iter().flat_map(|score| score.iou.iter().zip(&score.thing));
        masks.filter(|(_, thing)| wanted.is_none_or(|w| w == **thing)).for_each(|(iou, _)| recall.add(*iou));
        metrics.push(name, 100.0 * recall.value());
    }
    Aggregate { metrics, details: json!({ "tokens": tokens, "phrases": phrases, "threshold": LAMBDA }) }
}

/// Σ (recall step · precision) over falling thresholds; equal probabilities are one step. 0 without a positive.
pub fn average_precision(mut labelled: Vec<(f32, bool)>) -> f64 {
    labelled.sort_by(|a, b| b.0.total_cmp(&a.0));
    let all = labelled.iter().filter(|(_, positive)| *positive).count();
    let (mut sum, mut seen, mut right) = (0.0, 0usize, 0usize);
    for step in labelled.chunk_by(|a, b| a.0 == b.0) {
        let new = step.iter().filter(|(_, positive)| *positive).count();
        (seen, right) = (seen + step.len(), right + new);
        sum += new as f64 * right as f64 / seen as f64;
    }
    sum / all.max(1) as f64
}

struct KeywordSamples(PngSamples);

impl Samples for KeywordSamples {
    fn ids(&self) -> &[String] {
        &self.0.ids
    }

    fn settings(&self) -> Value {
        json!({ "keyword_threshold": LAMBDA })
    }

    fn template(&self, index: usize) -> Result<Value> {
        let sample = self.0.sample(index)?;
        Ok(json!({
            "id": self.ids()[index], "image_id": sample.image_id.to_string(), "image": picture(&sample),
            "size": sample.size, "answer": narrative(&sample),
        }))
    }

    fn predict(&self, index: usize, grounder: &Grounder, rows: Rows) -> Result<Predicted> {
        let sample = self.0.sample(index)?;
        let told = caption(grounder, &sample)?;
        let seen = self.0.observe(grounder, &sample, &told)?;
        let probs = grounder.head().keyword_probs(&seen.hidden)?.ok_or_else(|| {
            Error::request("the head has no keyword selector", "train one, or leave this task out")
        })?;
        let tokenizer = grounder.lmm().tokenizer();
        let words: Vec<String> =
            told.token_ids.iter().map(|&id| tokenizer.token(id).unwrap_or_default()).collect();
        // A model that cuts texts off has seen fewer tokens than the caption has.
        let found = select_keywords(&probs, &words, LAMBDA);
        let mut prediction = Prediction {
            id: self.ids()[index].clone(),
            image_id: Some(sample.image_id.to_string()),
            prompt: GROUNDING_INSTRUCTION.to_owned(),
            answer: narrative(&sample),
            ..Prediction::default()
        };
        let mask_ids = told.mask_ids[..probs.len().min(told.mask_ids.len())].to_vec();
        let ranges = found.iter().map(|range| [range.start, range.end]).collect();
        prediction.extra = extra(&Tokens { probs, phrases: mask_ids, found: ranges })?;
        if found.is_empty() {
            let rows = rows.names().map(|name| (name, Vec::new())).collect();
            return Ok(Predicted { prediction, rows });
        }
        let mut marked = Caption { mask_ids: vec![-1; told.token_ids.len()], token_ids: told.token_ids };
        for (number, range) in found.iter().enumerate() {
            marked.mask_ids[range.clone()].fill(number as i32);
        }
        let observation = self.0.observe(grounder, &sample, &marked)?;
        let true_ranges = ranges_of(&told.mask_ids);
        let truth = |at: usize| {
            let matched = matching(&found[at], &true_ranges);
            Ok(matched.map(|phrase| Mask::from(&sample.phrases[phrase].mask)))
        };
        let marks = Marks::of(grounder, &observation, rows, &truth)?;
        let texts = found.iter().map(|range| tokenizer.decode(&marked.token_ids[range.clone()], false));
        Ok(marks.predicted(prediction, texts))
    }

    fn score(&self, index: usize, prediction: &Prediction) -> Result<Value> {
        let sample = self.0.sample(index)?;
        prediction.check_picture(&sample.image_id.to_string())?;
        let tokens = Tokens::deserialize(Value::Object(prediction.extra.clone())).map_err(|error| {
            Error::request(
                format!("`extra` does not describe the narrative's tokens: {error}"),
                "this task needs `probs`, `phrases` and `found` in `extra`: see docs/evaluation.md",
            )
        })?;
        let masks = prediction.masks(tokens.found.len(), sample.size)?;
        let mut score = Score::default();
        for (prob, phrase) in tokens.probs.iter().zip(&tokens.phrases) {
            if *phrase >= 0 { &mut score.positive } else { &mut score.negative }.push(*prob);
        }
        let truth = ranges_of(&tokens.phrases);
        let found: Vec<Range<usize>> = tokens.found.iter().map(|[start, end]| *start..*end).collect();
        let exact = found.iter().filter(|range| truth.contains(range)).count();
        score.phrases = [exact as u64, found.len() as u64, truth.len() as u64];
        for (number, phrase) in sample.phrases.iter().enumerate() {
            let range = truth.get(number);
            let matched = range.and_then(|range| found.iter().position(|other| overlap(range, other) > 0.5));
            let iou = match matched {
                Some(at) => masks[at].overlap(&Runs::from(&phrase.mask))?.iou(),
                None => 0.0,
            };
            score.iou.push(iou);
            score.thing.push(phrase.is_thing);
        }
        Ok(json!(score))
    }
}

fn extra(tokens: &Tokens) -> Result<Map<String, Value>> {
    match serde_json::to_value(tokens) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Ok(Map::new()),
        Err(error) => Err(crate::results::not_json(error)),
    }
}

/// The tokens of every phrase, from the first to the last one.
fn ranges_of(mask_ids: &[i32]) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for (token, &phrase) in mask_ids.iter().enumerate() {
        let Ok(phrase) = usize::try_from(phrase) else { continue };
        if ranges.len() <= phrase {
            ranges.resize(phrase + 1, 0..0);
        }
        let start = if ranges[phrase].is_empty() { token } else { ranges[phrase].start };
        ranges[phrase] = start..token + 1;
    }
    ranges
}

/// Tokens in both ranges over tokens in either.
fn overlap(a: &Range<usize>, b: &Range<usize>) -> f64 {
    let both = a.end.min(b.end).saturating_sub(a.start.max(b.start));
    both as f64 / (a.len() + b.len() - both).max(1) as f64
}

/// The true phrase that a predicted one overlaps by more than half.
fn matching(found: &Range<usize>, truth: &[Range<usize>]) -> Option<usize> {
    truth.iter().position(|range| overlap(range, found) > 0.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn average_precision_counts_ties_as_one_step() {
        assert_eq!(average_precision(vec![(0.9, true), (0.8, false), (0.7, true)]), (1.0 + 2.0 / 3.0) / 2.0);
        assert_eq!(average_precision(vec![(0.5, true), (0.5, false)]), 0.5);
        assert_eq!(average_precision(vec![(0.5, false), (0.5, true)]), 0.5);
        assert_eq!(average_precision(vec![(0.5, false)]), 0.0);
    }

    #[test]
    fn adjacent_phrases_stay_apart() {
        assert_eq!(ranges_of(&[-1, 0, 0, 1, -1, 2]), [1..3, 3..4, 5..6]);
        assert_eq!((overlap(&(0..2), &(1..3)), overlap(&(0..4), &(1..4))), (1.0 / 3.0, 0.75));
        assert_eq!(matching(&(1..4), &[0..1, 1..5]), Some(1));
        assert_eq!(matching(&(1..3), &[0..1, 1..5]), None);
    }
}
