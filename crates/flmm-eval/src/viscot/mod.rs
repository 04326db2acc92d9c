//! Visual chain of thought: the Visual-CoT benchmark, and POPE with and without the chain (`spec/evaluation.md` §5).

pub mod chain;
pub mod region;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flmm::masks::Mask;
use flmm::{Error, Grounder, Result};
use flmm_data::images::ImageStore;
use flmm_data::qa::Benchmark;
use flmm_data::viscot::{self, VisCotQuestion};
use image::RgbImage;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::judge::{Judge, Role, parse};
use crate::qa::QaSamples;
use crate::qa::prompts::SHORT;
use crate::qa::score::{Graded, push_offline};
use crate::record::{Metrics, Phrase, Prediction};
use crate::runs::Runs;
use crate::task::{Aggregate, Need, Predicted, Rows, Samples, Settings, Task, parse_scores};
use chain::{Chain, Variant};

pub use chain::Protocol;

/// Where the benchmark lies below the data root.
const FOLDER: &str = "viscot";
/// Most tokens of an answer of the Visual-CoT benchmark.
const MOST_TOKENS: usize = 32;

/// The benchmark through one variant of the chain.
struct VisCot {
    variant: Variant,
    name: &'static str,
}

/// POPE through one variant of the chain.
struct PopeCot {
    variant: Variant,
    name: &'static str,
}

/// Both benchmarks through all variants. The name alone means v1, the rows marked ✓ of the paper's table; v3 gives those
/// marked ✗.
pub fn tasks() -> impl Iterator<Item = Box<dyn Task>> {
    use Variant::{V1, V2, V3};
    let viscot = [("viscot", V1), ("viscot_v2", V2), ("viscot_v3", V3)];
    let pope = [("pope_cot", V1), ("pope_cot_v2", V2), ("pope_cot_v3", V3)];
    let viscot = viscot.map(|(name, variant)| Box::new(VisCot { variant, name }) as Box<dyn Task>);
    let pope = pope.map(|(name, variant)| Box::new(PopeCot { variant, name }) as Box<dyn Task>);
    viscot.into_iter().chain(pope)
}

/// What the variant does, for the list of tasks.
fn way(variant: Variant) -> &'static str {
    match variant {
        Variant::V1 => "describe, ground, look again (v1)",
        Variant::V2 => "ground the question, look again (v2)",
        Variant::V3 => "without chain of thought (v3)",
    }
}

fn settings(variant: Variant, protocol: &Protocol) -> Value {
    match variant {
        Variant::V3 => Value::Null,
        _ => json!({ "sam": protocol.sam, "box_scale": protocol.box_scale }),
    }
}

/// A chain as a prediction: the thought is its only phrase. Without a chain there is no box to speak of.
fn predicted(id: &str, prompt: String, variant: Variant, chain: Chain) -> Predicted {
    let mut extra = Map::new();
    if variant != Variant::V3 {
        extra.insert("box".into(), json!(chain.box_in_image));
    }
    let coco = |mask: &Mask| Runs::from(mask).to_coco();
    let phrase = chain.mask.as_ref().map(|mask| Phrase {
        text: chain.thought.clone(),
        segmentation: Some(coco(mask)),
        score: None,
    });
    Prediction {
        id: id.to_owned(),
        prompt,
        answer: chain.answer,
        phrases: phrase.into_iter().collect(),
        extra,
        ..Prediction::default()
    }
    .into()
}

impl Task for VisCot {
    fn name(&self) -> &str {
        self.name
    }

    fn about(&self) -> String {
        format!("visual chain of thought, {}: graded by a judge (--judge-url)", way(self.variant))
    }

    fn needs(&self) -> Vec<Need> {
        vec![Need::new(
            FOLDER,
            "the Visual-CoT benchmark: its JSON files, here or in benchmark/, and the pictures in cot/",
        )]
    }

    fn open(&self, settings: &Settings) -> Result<Box<dyn Samples>> {
        let folder = settings.data.join(FOLDER);
        let mut questions = Vec::new();
        let mut ids = Vec::new();
        let mut stems: BTreeMap<String, PathBuf> = BTreeMap::new();
        for path in files(&folder)? {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            if let Some(other) = stems.insert(stem.clone(), path.clone()) {
                let what = format!("`{}` is a file of the same dataset", other.display());
                return Err(Error::config(path, what, "keep one of the two"));
            }
            for (number, question) in viscot::read(&path)?.into_iter().enumerate() {
                ids.push(format!("{stem}-{number}"));
                questions.push((stem.clone(), question));
            }
        }
        if ids.is_empty() {
            let what = format!("{} holds no benchmark files", folder.display());
            return Err(Error::request(what, "put docvqa.json, textvqa.json and the others there"));
        }
        let pictures = settings.pictures()?;
        let (variant, protocol, judge) = (self.variant, settings.cot, settings.judge.clone());
        Ok(Box::new(VisCotSamples { pictures, questions, ids, variant, protocol, judge }))
    }

    fn aggregate(&self, scores: &[Value]) -> Result<Aggregate> {
        Ok(metrics(&parse_scores(scores)?))
    }
}

/// The benchmark's JSON files.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for folder in [folder.to_owned(), folder.join("benchmark")] {
        if !folder.is_dir() {
            continue;
        }
        for entry in std::fs::read_dir(&folder).map_err(|error| Error::io(&folder, error))? {
            let path = entry.map_err(|error| Error::io(&folder, error))?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// The score of one question.
#[derive(Debug, Serialize, Deserialize)]
struct Score {
    dataset: String,
    /// Overlap of the box with the annotated one; none without a chain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    box_iou: Option<f64>,
    #[serde(flatten)]
    graded: Graded,
}

/// By dataset, percent: the judge's mean score under the dataset's name; what needs no judge; and how well the box agrees
/// with the annotated one.
fn metrics(scores: &[Score]) -> Aggregate {
    let mut datasets: BTreeMap<&str, Vec<&Score>> = BTreeMap::new();
    for score in scores {
        datasets.entry(&score.dataset).or_default().push(score);
    }
    let mut metrics = Metrics::default();
    let mut failures = Map::new();
    for (&name, scores) in &datasets {
        let graded: Vec<&Graded> = scores.iter().map(|score| &score.graded).collect();
        let judged: Option<f64> = graded.iter().map(|graded| graded.judge).sum();
        if let Some(sum) = judged {
            metrics.push(name, 100.0 * sum / graded.len() as f64);
        }
        push_offline(&mut metrics, name, &graded);
        let boxes: Option<f64> = scores.iter().map(|score| score.box_iou).sum();
        if let Some(sum) = boxes {
            metrics.push(format!("box IoU {name}"), 100.0 * sum / scores.len() as f64);
        }
        let failed = graded.iter().filter(|graded| graded.failed.is_some()).count();
        failures.insert(name.to_owned(), json!(failed));
    }
    Aggregate { metrics, details: json!({ "judge failures": failures }) }
}

struct VisCotSamples {
    pictures: Arc<ImageStore>,
    /// With the name of their dataset.
    questions: Vec<(String, VisCotQuestion)>,
    ids: Vec<String>,
    variant: Variant,
    protocol: Protocol,
    judge: Option<Arc<Judge>>,
}

impl VisCotSamples {
    fn picture(&self, question: &VisCotQuestion) -> Result<RgbImage> {
        self.pictures.read(&format!("{FOLDER}/{}", question.image.trim_start_matches('/')))
    }
}

impl Samples for VisCotSamples {
    fn ids(&self) -> &[String] {
        &self.ids
    }

    fn settings(&self) -> Value {
        settings(self.variant, &self.protocol)
    }

    fn scoring(&self) -> Value {
        self.judge.as_ref().map_or(Value::Null, |judge| json!({ "judge": judge.describe(Role::VisCot) }))
    }

    fn halted(&self) -> Option<Error> {
        self.judge.as_ref()?.halted()
    }

    fn template(&self, index: usize) -> Result<Value> {
        let (_, question) = &self.questions[index];
        let image = format!("{FOLDER}/{}", question.image);
        Ok(json!({ "id": self.ids[index], "image": image, "prompt": question.question }))
    }

    fn predict(&self, index: usize, grounder: &Grounder, _rows: Rows) -> Result<Predicted> {
        let (_, question) = &self.questions[index];
        let picture = self.picture(question)?;
        let asked = (question.question.as_str(), SHORT);
        let chain = chain::answer(grounder, &picture, asked, self.variant, &self.protocol, MOST_TOKENS)?;
        Ok(predicted(&self.ids[index], question.question.clone(), self.variant, chain))
    }

    fn score(&self, index: usize, prediction: &Prediction) -> Result<Value> {
        let (dataset, question) = &self.questions[index];
        let mut graded = Graded::offline(&prediction.answer, &question.answer);
        if let Some(judge) = &self.judge {
            let values = [
                ("question", question.question.as_str()),
                ("reference", question.answer.as_str()),
                ("answer", prediction.answer.as_str()),
            ];
            let read = |reply: &str| Some((None, parse::viscot_score(reply)));
            graded = graded.ask(judge, Role::VisCot, &values, 1, read)?;
        }
        let boxed = match prediction.extra.get("box") {
            None => None,
            Some(found) => Some(<[f64; 4]>::deserialize(found).map_err(|error| {
                Error::request(format!("`box` is {found}: {error}"), "expected [x0, y0, x1, y1] in pixels")
            })?),
        };
        let box_iou = boxed.map(|found| region::box_iou(found, question.box_in_image));
        Ok(json!(Score { dataset: dataset.clone(), box_iou, graded }))
    }
}

impl Task for PopeCot {
    fn name(&self) -> &str {
        self.name
    }

    fn about(&self) -> String {
        format!("POPE, {}", way(self.variant))
    }

    fn needs(&self) -> Vec<Need> {
        vec![Need::new(Benchmark::Pope.folder(), Benchmark::Pope.source())]
    }

    fn open(&self, settings: &Settings) -> Result<Box<dyn Samples>> {
        let pope = QaSamples::open(Benchmark::Pope, settings)?;
        Ok(Box::new(PopeCotSamples { pope, variant: self.variant, protocol: settings.cot }))
    }

    fn aggregate(&self, scores: &[Value]) -> Result<Aggregate> {
        crate::qa::score::aggregate(Benchmark::Pope, scores)
    }
}

struct PopeCotSamples {
    pope: QaSamples,
    variant: Variant,
    protocol: Protocol,
}

impl Samples for PopeCotSamples {
    fn ids(&self) -> &[String] {
        self.pope.ids()
    }

    fn settings(&self) -> Value {
        settings(self.variant, &self.protocol)
    }

    fn template(&self, index: usize) -> Result<Value> {
        self.pope.template(index)
    }

    /// The benchmark's own prompt is the question; nothing is added to it.
    fn predict(&self, index: usize, grounder: &Grounder, _rows: Rows) -> Result<Predicted> {
        let (prompt, most_tokens) = self.pope.prompt(index);
        let picture = self.pope.picture(index)?;
        let asked = (prompt.as_str(), "");
        let chain = chain::answer(grounder, &picture, asked, self.variant, &self.protocol, most_tokens)?;
        Ok(predicted(&self.ids()[index], prompt, self.variant, chain))
    }

    fn score(&self, index: usize, prediction: &Prediction) -> Result<Value> {
        self.pope.score(index, prediction)
    }
}
