//! From samples files to metrics: what a run folder holds.
//!
//! ```text
//! OUT/samples_<task>.jsonl             one line per sample, or samples_<task>.<i>-of-<n>.jsonl of a shard
//! OUT/task_<task>.json                 what the samples were made with ([`Header`])
//! OUT/failed_<task>.jsonl              samples without a result in the last run, and why
//! OUT/results.json, OUT/results.md     made from all of the above
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use flmm::{Error, Result, atomic};
use serde::{Deserialize, Serialize};
use serde_json::Value;

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
    /// What the numbers depend on ([`crate::Samples::settings`]).
    #[serde(default)]
    pub settings: Value,
    /// Samples in the data.
    pub of: usize,
}

/// All tasks of a run folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// By task.
    pub tasks: BTreeMap<String, TaskResult>,
}

/// One task of a run folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskResult {
    /// Who predicted.
    pub model: String,
    /// What the numbers depend on.
    #[serde(default, skip_serializing_if = "Value::is_null")]
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
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub details: Value,
    /// The numbers of other masks for the same phrases.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
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
struct Line {
    id: String,
    scores: Value,
    #[serde(default)]
    rows: BTreeMap<String, RowScores>,
}

#[derive(Deserialize)]
struct RowScores {
    scores: Value,
}

/// Reads the scores of a samples file into `scores`. A torn last line does not count; any other damage is an error
/// that names the line.
pub fn read_samples(path: &Path, scores: &mut Scores) -> Result<()> {
    let mut reader = BufReader::with_capacity(1 << 20, File::open(path).map_err(|e| Error::io(path, e))?);
    let (mut text, mut number) = (Vec::new(), 0);
    loop {
        text.clear();
        number += 1;
        let read = reader.read_until(b'\n', &mut text).map_err(|e| Error::io(path, e))?;
        if read == 0 || text.last() != Some(&b'\n') {
            return Ok(());
        }
        let line: Line = serde_json::from_slice(&text).map_err(|error| {
            Error::config(
                path,
                format!("line {number} is damaged: {error}"),
                "remove the line; its sample is then computed again",
            )
        })?;
        for (row, other) in line.rows {
            scores.add(&row, &line.id, other.scores);
        }
        scores.add("", &line.id, line.scores);
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
pub fn build(out: &Path) -> Result<Results> {
    let mut results = Results { tasks: BTreeMap::new() };
    let headers = files(out, |name| name.starts_with("task_") && name.ends_with(".json"))?;
    for path in headers {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let name = name.trim_start_matches("task_");
        let task = find(name)?;
        let Some(header) = read_header(out, name)? else { continue };
        let mut scores = Scores::default();
        for file in samples_files(out, name)? {
            read_samples(&file, &mut scores)?;
        }
        if !scores.is_empty() {
            results.tasks.insert(name.to_owned(), scores.result(task.as_ref(), &header)?);
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
