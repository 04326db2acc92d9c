//! What went wrong in a run, as one page that can be looked at anywhere.

mod classify;
mod page;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use flmm::{Error, Result};
use serde::Deserialize;
use serde_json::Value;

use crate::lines::Lines;
use crate::record::Prediction;
use crate::results::{Header, TaskResult, check_run, read_header, samples_files};
use crate::runs::Runs;
use crate::task::{Samples, Truth};

pub use classify::{Kind, Verdict};
pub use page::page;

/// One failed phrase.
#[derive(Debug, Clone)]
pub struct Failure {
    /// The task.
    pub task: String,
    /// The sample.
    pub id: String,
    /// What went wrong.
    pub kind: Kind,
    /// IoU of the true and the predicted mask.
    pub iou: f64,
    /// The phrase that should have been marked.
    pub phrase: String,
    /// The phrase whose mask is shown as predicted, where the model found its own phrases.
    pub predicted_phrase: String,
    /// What was asked.
    pub prompt: String,
    /// What was answered.
    pub answer: String,
    /// The picture's name below the data root.
    pub picture: String,
    /// The predicted mask, if there is one.
    pub predicted: Option<Runs>,
    /// The true mask.
    pub truth: Runs,
}

/// All failures of the tasks of a run that were looked at.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Per task: phrases looked at, and how many failed in each way.
    pub counts: BTreeMap<String, (usize, BTreeMap<Kind, usize>)>,
    /// The worst ones of each task and kind.
    pub failures: Vec<Failure>,
    /// Metrics of the tasks, for the head of the page.
    pub results: BTreeMap<String, TaskResult>,
}

/// What is looked for.
#[derive(Debug, Clone, Copy)]
pub struct ReportOptions {
    /// A mask with a smaller IoU has failed.
    pub threshold: f64,
    /// Failures that are kept of every task and kind.
    pub most: usize,
}

/// A line of a samples file, without its scores.
#[derive(Deserialize)]
struct Made {
    #[serde(default)]
    run: Option<String>,
    #[serde(flatten)]
    prediction: Prediction,
}

impl Report {
    /// Adds the failures of one task in the run folder `out`. `false` if the task has no masks to look at.
    ///
    /// # Errors
    /// If the run was made with other data or another protocol than `samples`; a line that is damaged, of another run, or
    /// belongs to another sample, with its number.
    pub fn add(
        &mut self,
        out: &Path,
        task: &str,
        samples: &dyn Samples,
        options: ReportOptions,
    ) -> Result<bool> {
        if samples.ids().is_empty() || samples.truth(0)?.is_none() {
            return Ok(false);
        }
        let Some(header) = read_header(out, task)? else { return Ok(false) };
        same_samples(out, &header, samples)?;
        let key = header.key()?;
        let index: HashMap<&str, usize> = samples.ids().iter().map(String::as_str).zip(0..).collect();
        let mut seen = HashSet::new();
        let mut kept: BTreeMap<Kind, Vec<Failure>> = BTreeMap::new();
        for file in samples_files(out, task)? {
            let mut lines = Lines::open(&file)?;
            // A run that was stopped may leave a torn last line; its sample is computed again.
            while let Some(line) = lines.next()?.filter(|line| !line.is_torn()) {
                let named =
                    |what: String| Error::config(&file, format!("line {}: {what}", line.number), SAME_DATA);
                let Made { run, prediction } =
                    serde_json::from_slice(&line.text).map_err(|e| named(e.to_string()))?;
                check_run(&file, line.number, run.as_deref(), &key)?;
                let Some(&at) = index.get(prediction.id.as_str()) else {
                    return Err(named(format!("the data have no sample `{}`", prediction.id)));
                };
                let Some(truth) = samples.truth(at)? else { return Ok(false) };
                if seen.insert(at) {
                    self.look(task, prediction, (samples, at, truth), options, &mut kept)
                        .map_err(|e| named(e.to_string()))?;
                }
            }
        }
        self.failures.extend(kept.into_values().flat_map(|mut failures| {
            worst(&mut failures, options.most);
            failures
        }));
        Ok(true)
    }

    /// Sorts the phrases of one sample into right and wrong.
    fn look(
        &mut self,
        task: &str,
        prediction: Prediction,
        (samples, at, truth): (&dyn Samples, usize, Truth),
        options: ReportOptions,
        kept: &mut BTreeMap<Kind, Vec<Failure>>,
    ) -> Result<()> {
        let counts = self.counts.entry(task.to_owned()).or_default();
        let verdicts = classify::classify(&prediction, &truth, options.threshold)?;
        // Most samples have no failure, whose picture would have to be named.
        let mut named = None;
        for ((phrase, mask), verdict) in truth.phrases.into_iter().zip(verdicts) {
            counts.0 += 1;
            let Some(kind) = verdict.kind else { continue };
            *counts.1.entry(kind).or_default() += 1;
            let predicted_phrase = match verdict.predicted {
                Some((at, _)) if !truth.given => prediction.phrases[at].text.clone(),
                _ => String::new(),
            };
            let failures = kept.entry(kind).or_default();
            failures.push(Failure {
                task: task.to_owned(),
                id: prediction.id.clone(),
                kind,
                iou: verdict.iou,
                phrase,
                predicted_phrase,
                prompt: prediction.prompt.clone(),
                answer: prediction.answer.clone(),
                picture: match &named {
                    Some(name) => String::clone(name),
                    None => named.insert(picture(samples, at)?).clone(),
                },
                predicted: verdict.predicted.map(|(_, mask)| mask),
                truth: mask,
            });
            if failures.len() > 4 * options.most {
                worst(failures, options.most);
            }
        }
        Ok(())
    }
}

const SAME_DATA: &str = "make the report with the same data and protocol as the run";

/// An error if the run of `header` had other samples: another protocol, or another number of them.
fn same_samples(out: &Path, header: &Header, samples: &dyn Samples) -> Result<()> {
    let settings = samples.settings();
    let now = settings.as_object().into_iter().flatten();
    // What only scores depend on does not matter here, and stands in the header beside the settings.
    let there = |name: &str| header.settings.get(name).cloned().unwrap_or(Value::Null);
    let differs = |(name, now): (&String, &Value)| {
        (there(name) != *now).then(|| format!("{name} {} there, {now} now", there(name)))
    };
    let mut differences: Vec<String> = now.filter_map(differs).collect();
    if header.of != samples.ids().len() {
        differences.push(format!("number of samples {} there, {} now", header.of, samples.ids().len()));
    }
    match differences.is_empty() {
        true => Ok(()),
        false => Err(Error::request(
            format!("{} holds other samples of {}: {}", out.display(), header.task, differences.join("; ")),
            SAME_DATA,
        )),
    }
}

/// The name of a sample's picture.
fn picture(samples: &dyn Samples, index: usize) -> Result<String> {
    let template = samples.template(index)?;
    let name = template["image"].as_str().map(str::to_owned);
    name.ok_or_else(|| Error::request("the task names no picture", "choose tasks with pictures by --task"))
}

/// Keeps the `most` largest masks among those with the lowest IoU: a large object that is missed weighs more than a
/// few pixels.
fn worst(failures: &mut Vec<Failure>, most: usize) {
    let weight = |failure: &Failure| (1.0 - failure.iou) * (failure.truth.area() as f64).sqrt();
    failures.sort_by(|a, b| weight(b).total_cmp(&weight(a)).then_with(|| a.id.cmp(&b.id)));
    failures.truncate(most);
}
