//! From samples files to metrics: what a run folder holds.
//!
//! ```text
//! OUT/samples_<task>.jsonl             one line per sample, or samples_<task>.<i>-of-<n>.jsonl of a shard
//! OUT/task_<task>.json                 what the samples were made with ([`Header`])
//! OUT/failed_<task>.jsonl              samples without a result in the last run, and why
//! OUT/results.json, OUT/results.md     made from all of the above
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use flmm::grounder::Revision;
use flmm::{Error, Result, atomic};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::lines::Lines;
use crate::record::Metrics;
use crate::registry::find;
use crate::table;
use crate::task::Task;

/// What the samples of a task were made with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// The task.
    pub task: String,
    /// Who predicted: a model's name, or that of a predictions file.
    pub model: String,
    /// Which files that model was made of; none for predictions of other systems.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<Revision>,
    /// What the numbers depend on ([`crate::Samples::settings`]).
    #[serde(default)]
    pub settings: Value,
    /// Samples in the data.
    pub of: usize,
}

impl Header {
    /// A short name, which every line of its samples files carries ([`crate::Record::run`]).
    pub fn key(&self) -> Result<String> {
        let hash = Sha256::digest(serde_json::to_vec(self).map_err(not_json)?);
        Ok(flmm::hex(&hash[..6]))
    }

    /// What `now` has another value of: `model "a" there, "b" now`.
    pub fn differences(&self, now: &Self) -> Vec<String> {
        let revision = |header: &Self| header.revision.as_ref().map_or(json!({}), |revision| json!(revision));
        let mut differences = vec![differs("model", &json!(self.model), &json!(now.model))];
        let (there, here) = (revision(self), revision(now));
        let parts = [&there, &here].into_iter().filter_map(Value::as_object).flat_map(|parts| parts.keys());
        let parts: BTreeSet<&String> = parts.collect();
        let part = |part: &String| differs(&format!("model's {part}"), &there[part], &here[part]);
        differences.extend(parts.into_iter().map(part));
        differences.push(differs("settings", &self.settings, &now.settings));
        differences.push(differs("number of samples", &json!(self.of), &json!(now.of)));
        differences.into_iter().flatten().collect()
    }
}

fn differs(name: &str, old: &Value, new: &Value) -> Option<String> {
    (old != new).then(|| format!("{name} {old} there, {new} now"))
}

/// All tasks of a run folder.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Results {
    /// By task.
    pub tasks: BTreeMap<String, TaskResult>,
}

/// One task of a run folder.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TaskResult {
    /// Who predicted.
    pub model: String,
    /// What the numbers depend on.
    #[serde(skip_serializing_if = "Value::is_null")]
    pub settings: Value,
    /// Samples counted.
    pub samples: usize,
    /// Samples in the data.
    pub of: usize,
    /// Whether every sample is counted.
    pub complete: bool,
    /// The numbers.
    pub metrics: Metrics,
    /// Whatever else the task keeps.
    #[serde(skip_serializing_if = "Value::is_null")]
    pub details: Value,
    /// The numbers of other masks for the same phrases.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rows: BTreeMap<String, Metrics>,
}

/// Scores by row of the table (the empty name is the prediction proper) and by sample id.
///
/// Only ids and scores are held, never masks. A sample that comes twice (from shards that overlap) counts once.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Scores(BTreeMap<String, BTreeMap<String, Value>>);

impl Scores {
    /// Adds the scores of a sample.
    pub fn add(&mut self, row: &str, id: &str, scores: Value) {
        self.0.entry(row.to_owned()).or_default().entry(id.to_owned()).or_insert(scores);
    }

    /// Whether the sample is there.
    pub fn contains(&self, id: &str) -> bool {
        self.0.get("").is_some_and(|samples| samples.contains_key(id))
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.0.get("").map_or(0, BTreeMap::len)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The metrics, from the samples in the order of their ids.
    pub fn result(&self, task: &dyn Task, header: &Header) -> Result<TaskResult> {
        let values = |row: &str| -> Vec<Value> {
            self.0.get(row).map(|samples| samples.values().cloned().collect()).unwrap_or_default()
        };
        let aggregate = task.aggregate(&values(""))?;
        let mut rows = BTreeMap::new();
        for row in self.0.keys().filter(|row| !row.is_empty()) {
            rows.insert(row.clone(), task.aggregate(&values(row))?.metrics);
        }
        Ok(TaskResult {
            model: header.model.clone(),
            settings: header.settings.clone(),
            samples: self.len(),
            of: header.of,
            complete: self.len() == header.of,
            metrics: aggregate.metrics,
            details: aggregate.details,
            rows,
        })
    }
}

/// What is kept in memory of a line.
#[derive(Deserialize)]
struct Scored {
    id: String,
    #[serde(default)]
    run: Option<String>,
    scores: Value,
    #[serde(default)]
    rows: BTreeMap<String, RowScores>,
}

#[derive(Deserialize)]
struct RowScores {
    scores: Value,
}

/// Reads the scores of a samples file into `scores`. A torn last line does not count.
///
/// # Errors
/// Any other damage, and a line of another run than that of this `key` ([`Header::key`]), by its number.
pub fn read_samples(path: &Path, key: &str, scores: &mut Scores) -> Result<()> {
    let mut lines = Lines::open(path)?;
    while let Some(line) = lines.next()?.filter(|line| !line.is_torn()) {
        let scored: Scored = serde_json::from_slice(&line.text).map_err(|error| {
            Error::config(
                path,
                format!("line {} is damaged: {error}", line.number),
                "remove the line; its sample is then computed again",
            )
        })?;
        check_run(path, line.number, scored.run.as_deref(), key)?;
        for (row, other) in scored.rows {
            scores.add(&row, &scored.id, other.scores);
        }
        scores.add("", &scored.id, scored.scores);
    }
    Ok(())
}

/// An error if line `number` was made by another run than that of `key`. Lines that tell nothing pass.
pub(crate) fn check_run(path: &Path, number: usize, run: Option<&str>, key: &str) -> Result<()> {
    match run {
        Some(run) if run != key => Err(Error::config(
            path,
            format!("line {number} was made with another model or other settings than `task_*.json` says"),
            "keep samples files with the task_*.json of their run, and every run in a folder of its own",
        )),
        _ => Ok(()),
    }
}

/// The samples files of `task` in a run folder, by name.
pub fn samples_files(out: &Path, task: &str) -> Result<Vec<PathBuf>> {
    let (whole, shard) = (format!("samples_{task}.jsonl"), format!("samples_{task}."));
    files(out, |name| {
        let part = name.strip_prefix(&shard).and_then(|rest| rest.strip_suffix(".jsonl"));
        name == whole || part.is_some_and(|part| part.split_once("-of-").is_some())
    })
}

/// Where the header of `task` is kept.
pub fn header_file(out: &Path, task: &str) -> PathBuf {
    out.join(format!("task_{task}.json"))
}

/// Reads the header of a task, if there is one.
pub fn read_header(out: &Path, task: &str) -> Result<Option<Header>> {
    let path = header_file(out, task);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(&path, error)),
    };
    let header = serde_json::from_slice(&bytes).map_err(|error| {
        Error::config(&path, format!("not what a run writes: {error}"), "choose another --out folder")
    })?;
    Ok(Some(header))
}

/// Makes the results of all tasks in a run folder from its samples files, and writes `results.json` and `results.md`.
///
/// # Errors
/// If there are no samples, a file is damaged, or what lies there was not made by one model of that name with one choice
/// of settings per task.
pub fn build(out: &Path) -> Result<Results> {
    let mut results = Results { tasks: BTreeMap::new() };
    let mut headers: Vec<Header> = Vec::new();
    for path in files(out, |name| name.starts_with("task_") && name.ends_with(".json"))? {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let name = name.strip_prefix("task_").unwrap_or(&name);
        let task = find(name)?;
        let Some(header) = read_header(out, name)? else { continue };
        let (mut scores, key) = (Scores::default(), header.key()?);
        for file in samples_files(out, name)? {
            read_samples(&file, &key, &mut scores)?;
        }
        if !scores.is_empty() {
            one_revision(out, &headers, &header)?;
            results.tasks.insert(name.to_owned(), scores.result(task.as_ref(), &header)?);
            headers.push(header);
        }
    }
    if results.tasks.is_empty() {
        return Err(Error::request(
            format!("{} holds no samples", out.display()),
            "name the --out folder of `flmm eval`",
        ));
    }
    let json = serde_json::to_vec_pretty(&results).map_err(not_json)?;
    atomic::write(out.join("results.json"), |file| file.write_all(&json))?;
    let markdown = table::markdown(&results)?;
    atomic::write(out.join("results.md"), |file| file.write_all(markdown.as_bytes()))?;
    Ok(results)
}

/// An error if `header` is of another state of a model that is among `others`: both would stand in one row of a table.
fn one_revision(out: &Path, others: &[Header], header: &Header) -> Result<()> {
    let same_name = |other: &&Header| other.model == header.model && other.revision != header.revision;
    let Some(other) = others.iter().find(same_name) else { return Ok(()) };
    Err(Error::request(
        format!(
            "{} holds samples of two models called {}: {} and {} were not made of the same files",
            out.display(),
            header.model,
            other.task,
            header.task
        ),
        "keep every model's samples in a folder of their own",
    ))
}

/// Something that JSON cannot say.
pub(crate) fn not_json(error: serde_json::Error) -> Error {
    Error::request(format!("cannot be written as JSON: {error}"), "this is a bug")
}

/// Files of a folder whose name is `wanted`, by name.
fn files(folder: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
        let path = entry.map_err(|e| Error::io(folder, e))?.path();
        if path.file_name().and_then(|name| name.to_str()).is_some_and(&wanted) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}
