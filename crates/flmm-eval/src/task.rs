//! What a task is.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use flmm::{Error, Grounder, Result};
use flmm_data::coco::RunLengths;
use flmm_data::images::ImageStore;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::record::{Metrics, Prediction};
use crate::runs::Runs;

/// A benchmark: which data it needs, and how scores of its samples become metrics.
///
/// To add one: implement this trait and [`Samples`] in a module of its own, and add it to
/// [`crate::registry::registry`]. Running, resuming, sharding, scoring of others' predictions, results and tables
/// then work as for all tasks.
pub trait Task: Send + Sync {
    /// Its name on the command line and in file names, for example `refcoco_val`.
    fn name(&self) -> &str;

    /// One line for the list of tasks.
    fn about(&self) -> String;

    /// The files it needs below the data root.
    fn needs(&self) -> Vec<Need>;

    /// An error if no sample can be predicted with `grounder`, for example for want of a part of its head.
    fn fits(&self, _grounder: &Grounder) -> Result<()> {
        Ok(())
    }

    /// Opens its data. An error names the file that is missing or malformed.
    fn open(&self, settings: &Settings) -> Result<Box<dyn Samples>>;

    /// Metrics from the scores of all samples ([`Samples::score`]), which come in the order of their ids, each id once.
    /// An error if a score is not what this task writes.
    fn aggregate(&self, scores: &[Value]) -> Result<Aggregate>;
}

/// The opened data of a task.
pub trait Samples: Send + Sync {
    /// Ids of the samples, in the order of the data; each once.
    fn ids(&self) -> &[String];

    /// What the samples are, besides model and data, for example the protocol: an object, or null. Kept with the
    /// results; a run cannot be resumed under other settings, nor a report made of it.
    fn settings(&self) -> Value {
        Value::Null
    }

    /// What scores depend on besides the samples, for example a judge: an object, or null. Kept as the settings are;
    /// a report does not depend on it.
    fn scoring(&self) -> Value {
        Value::Null
    }

    /// Why no more samples can be scored, for example a judge that refuses every question. Asked after every sample.
    fn halted(&self) -> Option<Error> {
        None
    }

    /// What a system is given for sample `index`, as a line of a predictions file that only lacks what it predicts: id,
    /// picture, phrases.
    fn template(&self, index: usize) -> Result<Value> {
        Ok(json!({ "id": self.ids()[index] }))
    }

    /// What should have been marked in sample `index`, for looking at failures. `None` for tasks without masks.
    fn truth(&self, _index: usize) -> Result<Option<Truth>> {
        Ok(None)
    }

    /// What the model says and marks for sample `index`.
    fn predict(&self, index: usize, grounder: &Grounder, rows: Rows) -> Result<Predicted>;

    /// Small numbers (and short texts) from which [`Task::aggregate`] makes metrics. Bad predictions are errors that
    /// say which phrase is wrong and how.
    fn score(&self, index: usize, prediction: &Prediction) -> Result<Value>;
}

/// The true phrases and masks of a sample.
#[derive(Debug, Clone, PartialEq)]
pub struct Truth {
    /// Phrases and their masks.
    pub phrases: Vec<(String, Runs)>,
    /// Whether a prediction has these phrases, in this order; otherwise it has phrases of its own.
    pub given: bool,
}

/// What everybody may set.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// The data root.
    pub data: PathBuf,
    /// The pictures below it; all tasks share them ([`Settings::pictures`]).
    pub store: Pictures,
    /// Who grades free answers, if anyone.
    pub judge: Option<Arc<crate::judge::Judge>>,
    /// Visual chain of thought.
    pub cot: crate::viscot::Protocol,
    /// RefCOCO, RefCOCO+, RefCOCOg.
    pub res: crate::res::Protocol,
    /// gRefCOCO.
    pub abstention: crate::grefcoco::Abstention,
    /// Panoptic narratives.
    pub png: crate::png::Protocol,
    /// Grounded captions.
    pub gcg: crate::gcg::Protocol,
}

impl Settings {
    /// The pictures below the data root: opened once, so that archives are indexed once for all tasks.
    ///
    /// # Errors
    /// If the data root is no folder.
    pub fn pictures(&self) -> Result<Arc<ImageStore>> {
        let mut store = self.store.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(store) = store.as_ref().filter(|store| store.root() == self.data) {
            return Ok(store.clone());
        }
        let opened = Arc::new(ImageStore::open(&self.data)?);
        *store = Some(opened.clone());
        Ok(opened)
    }
}

/// Pictures that are opened when they are first asked for. Clones share them.
#[derive(Clone, Default)]
pub struct Pictures(Arc<Mutex<Option<Arc<ImageStore>>>>);

impl std::fmt::Debug for Pictures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pictures")
    }
}

/// Scores as the task that wrote them knows them.
///
/// # Errors
/// If a score is of another form: the samples file was written by another task or version.
pub fn parse_scores<T: DeserializeOwned>(scores: &[Value]) -> Result<Vec<T>> {
    let parse = |score: &Value| {
        T::deserialize(score).map_err(|error| {
            Error::request(
                format!("the scores `{score}` are not of this task: {error}"),
                "make the samples anew in another --out folder",
            )
        })
    };
    scores.iter().map(parse).collect()
}

/// Masks to be scored besides the refined ones.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rows {
    /// The mask head's, before the refiner.
    pub coarse: bool,
    /// The better of the two K-means clusters of the attention: no training at all.
    pub kmeans: bool,
}

impl Rows {
    /// The names of the wanted rows.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        let all = [("kmeans", self.kmeans), ("coarse", self.coarse)];
        all.into_iter().filter_map(|(name, wanted)| wanted.then_some(name))
    }
}

/// A prediction, and other masks for the same phrases.
#[derive(Debug, Clone)]
pub struct Predicted {
    /// The prediction proper.
    pub prediction: Prediction,
    /// Name of a row of the table (`coarse`, `kmeans`) and its mask of every phrase.
    pub rows: Vec<(&'static str, Vec<RunLengths>)>,
}

impl From<Prediction> for Predicted {
    fn from(prediction: Prediction) -> Self {
        Self { prediction, rows: Vec::new() }
    }
}

/// What comes out of a task.
#[derive(Debug, Clone, PartialEq)]
pub struct Aggregate {
    /// The numbers, in the units of the paper's tables (percent unless said otherwise).
    pub metrics: Metrics,
    /// Anything else worth keeping, for example a curve; null if there is nothing.
    pub details: Value,
}

impl From<Metrics> for Aggregate {
    fn from(metrics: Metrics) -> Self {
        Self { metrics, details: Value::Null }
    }
}

/// Files that a task needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    /// Path of a file or folder relative to the data root.
    pub path: String,
    /// What it is and where it comes from.
    pub source: &'static str,
    /// Whether only a model needs it: predictions of other systems are scored without.
    pub for_model: bool,
}

impl Need {
    /// A need.
    pub fn new(path: impl Into<String>, source: &'static str) -> Self {
        Self { path: path.into(), source, for_model: false }
    }

    /// A folder of pictures, which scoring can do without.
    pub fn pictures(path: impl Into<String>, source: &'static str) -> Self {
        Self { path: path.into(), source, for_model: true }
    }

    /// Whether it is there, below the root of `store`.
    pub fn is_present(&self, store: &ImageStore) -> bool {
        store.has(&self.path)
    }
}
