//! The keyword selector on panoptic narratives (`spec/training.md` §8.2): does it find the words that are grounded?

use std::ops::Range;

use flmm::grounder::Caption;
use flmm::lmm::GROUNDING_INSTRUCTION;
use flmm::masks::Mask;
use flmm::phrases::{LAMBDA, average_precision, select_keywords, token_texts, true_ranges};
use flmm::{Error, Grounder, Result};
use flmm_data::narratives::NarrativeSample;
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

    fn fits(&self, grounder: &Grounder) -> Result<()> {
        if grounder.head().keyword_selector.is_some() { Ok(()) } else { Err(no_selector()) }
    }

    fn open(&self, settings: &Settings) -> Result<Box<dyn Samples>> {
        let protocol = png::Protocol { replace_empty: None };
        Ok(Box::new(KeywordSamples(PngSamples::open(&Settings { png: protocol, ..settings.clone() })?)))
    }

    fn aggregate(&self, scores: &[Value]) -> Result<Aggregate> {
        Ok(metrics(&parse_scores::<Score>(scores)?))
    }
}

/// What a prediction's `extra` says of the narrative's tokens. Which of them belong to a phrase is the narrative's to say.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tokens {
    /// Keyword probability of every token, 0 to 1.
    pub probs: Vec<f32>,
    /// Number of tokens of every utterance of the narrative, which are cut into tokens one by one.
    pub tokens: Vec<usize>,
    /// First token, and the one behind the last, of every predicted phrase, in order.
    pub found: Vec<[usize; 2]>,
}

impl Tokens {
    /// Those of a prediction for `sample`.
    ///
    /// # Errors
    /// If they do not belong to the narrative, a number is out of its range, or a true phrase has no token.
    fn of<M>(prediction: &Prediction, sample: &NarrativeSample<M>) -> Result<Self> {
        let wrong = |what: String| Error::request(format!("`extra`: {what}"), FORMAT);
        let extra = Value::Object(prediction.extra.clone());
        let tokens = Self::deserialize(extra)
            .map_err(|error| wrong(format!("does not describe the narrative's tokens: {error}")))?;
        let (told, utterances) = (tokens.tokens.len(), sample.utterances.len());
        if told != utterances {
            return Err(wrong(format!("`tokens` has {told} numbers, the narrative {utterances} utterances")));
        }
        let all = tokens.tokens.iter().try_fold(0usize, |sum, &count| sum.checked_add(count));
        let count = tokens.probs.len();
        if all != Some(count) {
            let all = all.map_or("too many".to_owned(), |all| all.to_string());
            return Err(wrong(format!("`probs` has {count} numbers for {all} tokens")));
        }
        if let Some(at) = tokens.probs.iter().position(|p| !(0.0..=1.0).contains(p)) {
            return Err(wrong(format!("`probs` {} is {}, expected 0 to 1", at + 1, tokens.probs[at])));
        }
        let empty =
            |((_, phrase), tokens): &(&(String, Option<usize>), &usize)| phrase.is_some() && **tokens == 0;
        if let Some(((text, _), _)) = sample.utterances.iter().zip(&tokens.tokens).find(empty) {
            return Err(wrong(format!("`tokens`: the phrase `{}` has none", text.trim())));
        }
        let mut before = 0;
        for &[start, end] in &tokens.found {
            if start < before || end <= start || end > count {
                let what =
                    format!("`found` [{start}, {end}] is empty, out of order, or behind the {count} tokens");
                return Err(wrong(what));
            }
            before = end;
        }
        Ok(tokens)
    }

    /// Number of the true phrase of every token, −1 where it belongs to none.
    fn labels<M>(&self, sample: &NarrativeSample<M>) -> Vec<i32> {
        let number = |phrase: &Option<usize>| phrase.map_or(-1, |phrase| phrase as i32);
        let utterances = sample.utterances.iter().zip(&self.tokens);
        utterances.flat_map(|((_, phrase), &count)| std::iter::repeat_n(number(phrase), count)).collect()
    }

    /// The tokens of every predicted phrase.
    fn found(&self) -> Vec<Range<usize>> {
        self.found.iter().map(|&[start, end]| start..end).collect()
    }
}

const FORMAT: &str = "this task needs `probs`, `tokens` and `found` in `extra`: see docs/evaluation.md";

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
    metrics.push("token AP", 100.0 * average_precision(&labelled.collect::<Vec<_>>()));
    for (name, wanted) in [("AR all", None), ("AR thing", Some(true)), ("AR stuff", Some(false))] {
        let mut recall = AverageRecall::default();
        let masks = scores.iter().flat_map(|score| score.iou.iter().zip(&score.thing));
        masks.filter(|(_, thing)| wanted.is_none_or(|w| w == **thing)).for_each(|(iou, _)| recall.add(*iou));
        metrics.push(name, 100.0 * recall.value());
    }
    Aggregate { metrics, details: json!({ "tokens": tokens, "phrases": phrases, "threshold": LAMBDA }) }
}

fn no_selector() -> Error {
    Error::request("png_keywords: the head has no keyword selector", "train one, or leave this task out")
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
        let sample = self.0.sample_rle(index)?;
        let utterances: Vec<&str> = sample.utterances.iter().map(|(text, _)| text.as_str()).collect();
        Ok(json!({
            "id": self.ids()[index], "image_id": sample.image_id.to_string(), "image": picture(&sample),
            "size": sample.size, "answer": narrative(&sample), "utterances": utterances,
        }))
    }

    fn predict(&self, index: usize, grounder: &Grounder, rows: Rows) -> Result<Predicted> {
        let sample = self.0.sample(index)?;
        let told = caption(grounder, &sample)?;
        let tokenizer = grounder.lmm().tokenizer();
        // Without labels: a model may cut off a text with true phrases at its end.
        let mut marked = Caption { mask_ids: vec![-1; told.token_ids.len()], token_ids: told.token_ids };
        let hidden = self.0.hidden(grounder, &sample, &marked)?;
        let mut probs = grounder.head().keyword_probs(&hidden)?.ok_or_else(no_selector)?;
        // A model that cuts texts off says nothing about the tokens behind: it does not find them.
        probs.resize(marked.token_ids.len(), 0.0);
        let found = select_keywords(&probs, &token_texts(tokenizer, &marked.token_ids), LAMBDA);
        let mut prediction = Prediction {
            id: self.ids()[index].clone(),
            image_id: Some(sample.image_id.to_string()),
            prompt: GROUNDING_INSTRUCTION.to_owned(),
            answer: narrative(&sample),
            ..Prediction::default()
        };
        let count = |(text, _): &(String, Option<usize>)| Ok(tokenizer.encode(text, false)?.len());
        let counts = sample.utterances.iter().map(count).collect::<Result<_>>()?;
        let ranges = found.iter().map(|range| [range.start, range.end]).collect();
        prediction.extra = extra(&Tokens { probs, tokens: counts, found: ranges })?;
        if found.is_empty() {
            let rows = rows.names().map(|name| (name, Vec::new())).collect();
            return Ok(Predicted { prediction, rows });
        }
        for (number, range) in found.iter().enumerate() {
            marked.mask_ids[range.clone()].fill(number as i32);
        }
        let observation = self.0.observe(grounder, &sample, &marked)?;
        let true_ranges = true_ranges(&told.mask_ids);
        let truth = |at: usize| {
            let matched = true_ranges.iter().position(|range| overlap(range, &found[at]) > 0.5);
            Ok(matched.map(|phrase| Mask::from(&sample.phrases[phrase].mask)))
        };
        let marks = Marks::of(grounder, &observation, rows, &truth)?;
        let texts = found.iter().map(|range| tokenizer.decode(&marked.token_ids[range.clone()], false));
        Ok(marks.predicted(prediction, texts))
    }

    fn score(&self, index: usize, prediction: &Prediction) -> Result<Value> {
        let sample = self.0.sample_rle(index)?;
        prediction.check_picture(&sample.image_id.to_string())?;
        let tokens = Tokens::of(prediction, &sample)?;
        let masks = prediction.masks(tokens.found.len(), sample.size)?;
        let labels = tokens.labels(&sample);
        let mut score = Score::default();
        for (prob, phrase) in tokens.probs.iter().zip(&labels) {
            if *phrase >= 0 { &mut score.positive } else { &mut score.negative }.push(*prob);
        }
        let (truth, found) = (true_ranges(&labels), tokens.found());
        let exact = found.iter().filter(|range| truth.contains(range)).count();
        score.phrases = [exact as u64, found.len() as u64, sample.phrases.len() as u64];
        for (range, phrase) in truth.iter().zip(sample.phrases) {
            let matched = found.iter().position(|other| overlap(range, other) > 0.5);
            let iou = match matched {
                Some(at) => masks[at].overlap(&Runs::from(phrase.mask))?.iou(),
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

/// Tokens in both ranges over tokens in either.
fn overlap(a: &Range<usize>, b: &Range<usize>) -> f64 {
    let both = a.end.min(b.end).saturating_sub(a.start.max(b.start));
    both as f64 / (a.len() + b.len() - both).max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> NarrativeSample<()> {
        let utterances = [("A ", None), ("red cat", Some(0)), ("", None), ("dog", Some(1))];
        let phrase = || flmm_data::narratives::NarrativePhrase { mask: (), plural: false, is_thing: true };
        NarrativeSample {
            image_id: 1,
            file_name: "1.jpg".into(),
            size: [1, 1],
            utterances: utterances.map(|(text, phrase)| (text.to_owned(), phrase)).to_vec(),
            phrases: vec![phrase(), phrase()],
        }
    }

    fn tokens(extra: Value) -> Result<Tokens> {
        let Value::Object(extra) = extra else { panic!("{extra} is not an object") };
        Tokens::of(&Prediction { extra, ..Prediction::default() }, &sample())
    }

    #[test]
    fn labels_are_the_narratives() {
        let tokens =
            tokens(json!({"probs": [0, 1, 0.5, 1], "tokens": [1, 2, 0, 1], "found": [[1, 3], [3, 4]]}));
        let tokens = tokens.unwrap();
        assert_eq!(tokens.labels(&sample()), [-1, 0, 0, 1]);
        assert_eq!(tokens.found(), true_ranges(&tokens.labels(&sample())));
        assert_eq!((overlap(&(0..2), &(1..3)), overlap(&(0..4), &(1..4))), (1.0 / 3.0, 0.75));
    }

    /// Numbers that do not belong to the narrative are refused before memory is taken for them.
    #[test]
    fn tokens_must_be_those_of_the_narrative() {
        let huge = usize::MAX;
        let good = [0.0, 1.0, 0.5, 1.0];
        for (extra, wanted) in [
            (json!({"probs": good, "tokens": [1, 2, 0, 1]}), "missing field `found`"),
            (
                json!({"probs": good, "tokens": [1, 2, 0, 1], "found": [], "phrases": [0, 0, 0, 0]}),
                "unknown field",
            ),
            (
                json!({"probs": good, "tokens": [1, 3], "found": []}),
                "`tokens` has 2 numbers, the narrative 4",
            ),
            (
                json!({"probs": good, "tokens": [1, 2, 0, 2], "found": []}),
                "`probs` has 4 numbers for 5 tokens",
            ),
            (json!({"probs": good, "tokens": [huge, 2, 0, 1], "found": []}), "for too many tokens"),
            (json!({"probs": good, "tokens": [1, 3, 0, 0], "found": []}), "the phrase `dog` has none"),
            (json!({"probs": [0, 1.5, 0, 0], "tokens": [1, 2, 0, 1], "found": []}), "`probs` 2 is 1.5"),
            (json!({"probs": good, "tokens": [1, 2, 0, 1], "found": [[0, huge]]}), "behind the 4 tokens"),
            (json!({"probs": good, "tokens": [1, 2, 0, 1], "found": [[2, 2]]}), "is empty"),
            (json!({"probs": good, "tokens": [1, 2, 0, 1], "found": [[2, 3], [0, 1]]}), "out of order"),
        ] {
            let error = tokens(extra).unwrap_err();
            assert!(error.to_string().contains(wanted), "{wanted}: {error}");
            assert!(error.hint().unwrap().contains("docs/evaluation.md"));
        }
    }
}
