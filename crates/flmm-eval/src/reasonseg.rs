//! Reasoning segmentation (`spec/evaluation.md` §3).

use std::path::PathBuf;
use std::sync::Arc;

use flmm::grounder::AnswerOptions;
use flmm::lmm::Turn;
use flmm::masks::Mask;
use flmm::{Error, Grounder, Result};
use flmm_data::images::ImageStore;
use flmm_data::reasonseg::{GroundTruth, Reasoning, list};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::marks::{LastSession, Marks, observe_reply};
use crate::record::{Metrics, Phrase, Prediction};
use crate::runs::Runs;
use crate::task::{Aggregate, Need, Predicted, Rows, Samples, Settings, Task, Truth, parse_scores};

/// What the answer is made to begin with.
const OPENING: &str = "It is";
/// Most tokens of an answer.
const MOST_TOKENS: usize = 16;

/// One split.
pub struct ReasonSeg {
    split: &'static str,
    name: String,
}

/// Both splits with published results.
pub fn tasks() -> impl Iterator<Item = Box<dyn Task>> {
    ["val", "test"]
        .into_iter()
        .map(|split| Box::new(ReasonSeg { split, name: format!("reasonseg_{split}") }) as Box<dyn Task>)
}

impl Task for ReasonSeg {
    fn name(&self) -> &str {
        &self.name
    }

    fn about(&self) -> String {
        format!("reasoning segmentation, ReasonSeg {}: gIoU and cIoU, short and long questions", self.split)
    }

    fn needs(&self) -> Vec<Need> {
        vec![Need::new(
            format!("ReasonSeg/{}", self.split),
            "ReasonSeg of the LISA release: pictures and JSON",
        )]
    }

    fn open(&self, settings: &Settings) -> Result<Box<dyn Samples>> {
        let folder = format!("ReasonSeg/{}", self.split);
        let files = list(&settings.data.join(&folder))?;
        if files.is_empty() {
            return Err(Error::request(
                format!("{} holds no annotation", settings.data.join(&folder).display()),
                "expected pairs x.jpg, x.json",
            ));
        }
        let stem = |path: &PathBuf| path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let ids = files.iter().map(stem).collect();
        let pictures = settings.pictures()?;
        Ok(Box::new(ReasonSegSamples { folder, ids, files, pictures, last: LastSession::default() }))
    }

    fn aggregate(&self, scores: &[Value]) -> Result<Aggregate> {
        Ok(metrics(&parse_scores::<Score>(scores)?))
    }
}

/// The score of one question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Score {
    /// Pixels in prediction and truth, ignored ones left out.
    pub intersection: u64,
    /// Pixels in either, ignored ones left out.
    pub union: u64,
    /// Pixels of the picture.
    pub pixels: u64,
    /// Whether the question is a whole sentence.
    pub long: bool,
}

impl Score {
    /// Compares a prediction with the truth; pixels to be ignored count in neither.
    ///
    /// An error if the sizes differ.
    pub fn new(predicted: &Runs, foreground: &Runs, ignore: &Runs, long: bool) -> Result<Self> {
        // Painting makes foreground and ignored pixels disjoint, so only the prediction loses any.
        let intersection = predicted.intersection(foreground)?;
        let counted = predicted.area() - predicted.intersection(ignore)?;
        let [height, width] = predicted.size();
        let pixels = u64::from(height) * u64::from(width);
        Ok(Self { intersection, union: counted + foreground.area() - intersection, pixels, long })
    }
}

/// gIoU and cIoU of all, of short and of long questions, percent: first as LISA defines them, then (`ref …`) as the
/// reference does, which divides every picture's pixels by its size and gives an empty union 0 instead of 1.
pub fn metrics(scores: &[Score]) -> Aggregate {
    type Belongs = fn(&Score) -> bool;
    let kinds: [(&str, Belongs); 3] =
        [("", |_| true), (" short", |score| !score.long), (" long", |score| score.long)];
    let mut metrics = Metrics::default();
    let mut counts = serde_json::Map::new();
    for (variant, of) in [("", lisa as fn(&[&Score]) -> (f64, f64)), ("ref ", reference)] {
        for (kind, belongs) in kinds {
            let chosen: Vec<&Score> = scores.iter().filter(|score| belongs(score)).collect();
            let (giou, ciou) = of(&chosen);
            metrics.push(format!("{variant}gIoU{kind}"), 100.0 * giou);
            metrics.push(format!("{variant}cIoU{kind}"), 100.0 * ciou);
            counts.insert(format!("all{kind}"), json!(chosen.len()));
        }
    }
    Aggregate { metrics, details: json!({ "samples": counts }) }
}

fn mean(sum: f64, count: usize) -> f64 {
    sum / count.max(1) as f64
}

fn lisa(scores: &[&Score]) -> (f64, f64) {
    let one = |score: &&Score| match score.union {
        0 => 1.0,
        union => score.intersection as f64 / (union as f64 + 1e-5),
    };
    let giou = mean(scores.iter().map(one).sum(), scores.len());
    let total = |pixels: fn(&Score) -> u64| scores.iter().map(|score| pixels(score)).sum::<u64>() as f64;
    (giou, total(|score| score.intersection) / (total(|score| score.union) + 1e-10))
}

fn reference(scores: &[&Score]) -> (f64, f64) {
    let share = |pixels: u64, score: &Score| pixels as f64 / score.pixels.max(1) as f64;
    let one = |score: &&Score| share(score.intersection, score) / (share(score.union, score) + 1e-12);
    let giou = mean(scores.iter().map(one).sum(), scores.len());
    let intersection: f64 = scores.iter().map(|score| share(score.intersection, score)).sum();
    let union: f64 = scores.iter().map(|score| share(score.union, score)).sum();
    (giou, intersection / (union + 1e-12))
}

/// The question put to the model.
pub fn question(reasoning: &Reasoning) -> String {
    let instruction = reasoning.instruction();
    let asked = match reasoning.is_sentence {
        true => instruction.to_owned(),
        false => format!("What is {instruction} in this image? "),
    };
    asked + "Briefly answer the question in a single sentence."
}

struct ReasonSegSamples {
    folder: String,
    ids: Vec<String>,
    files: Vec<PathBuf>,
    pictures: Arc<ImageStore>,
    last: LastSession,
}

impl ReasonSegSamples {
    fn picture(&self, index: usize) -> String {
        format!("{}/{}.jpg", self.folder, self.ids[index])
    }

    fn ground_truth(&self, index: usize, reasoning: &Reasoning) -> Result<GroundTruth> {
        let (width, height) = self.pictures.dimensions(&self.picture(index))?;
        Ok(reasoning.ground_truth(height, width))
    }
}

impl Samples for ReasonSegSamples {
    fn ids(&self) -> &[String] {
        &self.ids
    }

    fn template(&self, index: usize) -> Result<Value> {
        let reasoning = Reasoning::read(&self.files[index])?;
        let picture = self.picture(index);
        let (width, height) = self.pictures.dimensions(&picture)?;
        Ok(json!({
            "id": self.ids[index], "image": picture, "size": [height, width],
            "prompt": question(&reasoning), "phrases": [{}],
        }))
    }

    fn truth(&self, index: usize) -> Result<Option<Truth>> {
        let reasoning = Reasoning::read(&self.files[index])?;
        let mask = Runs::from(&self.ground_truth(index, &reasoning)?.foreground);
        Ok(Some(Truth { phrases: vec![(question(&reasoning), mask)], given: true }))
    }

    /// All generated tokens that have an attention row are one phrase. An answer without any has an empty mask.
    fn predict(&self, index: usize, grounder: &Grounder, rows: Rows) -> Result<Predicted> {
        let reasoning = Reasoning::read(&self.files[index])?;
        let prompt = question(&reasoning);
        let picture = self.picture(index);
        let turns = [Turn::user(&prompt), Turn::opening(OPENING)];
        let options =
            AnswerOptions { phrases: None, max_new_tokens: MOST_TOKENS, ..AnswerOptions::default() };
        let read = || self.pictures.read(&picture);
        let (answer, observation) = self
            .last
            .with(grounder, &picture, read, |session| observe_reply(grounder, session, &turns, &options))?;
        // Tokenizers that write a blank as part of the next word lose it at the beginning of a text.
        let between = if answer.starts_with(char::is_alphanumeric) { " " } else { "" };
        let said = format!("{OPENING}{between}{answer}");
        let prediction =
            Prediction { id: self.ids[index].clone(), prompt, answer: said, ..Prediction::default() };
        let Some(observation) = observation else {
            let (width, height) = self.pictures.dimensions(&picture)?;
            let empty = Runs::empty(height, width).to_coco();
            let rows = rows.names().map(|name| (name, vec![empty.clone()])).collect();
            let phrase = Phrase { segmentation: Some(empty), ..Phrase::default() };
            return Ok(Predicted { prediction: Prediction { phrases: vec![phrase], ..prediction }, rows });
        };
        let truth = |_| Ok(Some(Mask::from(&self.ground_truth(index, &reasoning)?.foreground)));
        let marks = Marks::of(grounder, &observation, rows, &truth)?;
        Ok(marks.predicted(prediction, [answer.trim()]))
    }

    fn score(&self, index: usize, prediction: &Prediction) -> Result<Value> {
        let reasoning = Reasoning::read(&self.files[index])?;
        let truth = self.ground_truth(index, &reasoning)?;
        let size = [truth.foreground.height, truth.foreground.width];
        let predicted = prediction.masks(1, size)?.remove(0);
        let (foreground, ignore) = (Runs::from(&truth.foreground), Runs::from(&truth.ignore));
        Ok(json!(Score::new(&predicted, &foreground, &ignore, reasoning.is_sentence)?))
    }
}
