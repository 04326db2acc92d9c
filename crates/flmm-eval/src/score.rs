//! Predictions of any system, scored as our own are.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use flmm::{Error, Result, atomic};
use rayon::prelude::*;
use serde::Serialize;

use crate::lines::{Line, Lines, write_failures};
use crate::record::{Prediction, Record};
use crate::results::{Header, Scores, TaskResult};
use crate::run::{check_claim, claim, settings};
use crate::runs::Runs;
use crate::task::{Rows, Samples, Task};

/// A line that could not be counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// Its number, from 1.
    pub line: usize,
    /// The sample it names, as far as that can be told.
    pub id: Option<String>,
    /// What is wrong.
    pub what: String,
    /// What to do.
    pub hint: String,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.id {
            Some(id) => write!(f, "line {}, sample {id}: {}", self.line, self.what),
            None => write!(f, "line {}: {}", self.line, self.what),
        }
    }
}

/// What scoring a file gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// The numbers, of all lines without a fault.
    pub result: TaskResult,
    /// Lines that are not counted.
    pub faults: Vec<Fault>,
}

/// Scores the predictions in `file`, one JSON object per line, as the samples of `task`; `model` is what results call
/// their author. `progress` is told the bytes read and the file's size.
///
/// With `out`, the lines with their scores are written there as a samples file, as a run of a model would. A samples file
/// that is there stays as it is until the new one is complete.
///
/// # Errors
/// If the file cannot be read, or has no line that counts (the first fault is then the error), or no more samples can be
/// scored ([`Samples::halted`]): nothing is written then. Faults of single lines are part of the result.
pub fn score(
    task: &dyn Task,
    samples: &dyn Samples,
    (model, file): (&str, &Path),
    out: Option<&Path>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Scored> {
    let header = Header {
        task: task.name().to_owned(),
        model: model.to_owned(),
        revision: None,
        settings: settings(samples, Rows::default()),
        of: samples.ids().len(),
    };
    let mut scoring = Scoring::new(samples, file)?;
    match out {
        None => scoring.all(progress, &mut |_| Ok(()))?,
        Some(out) => {
            std::fs::create_dir_all(out).map_err(|e| Error::io(out, e))?;
            let key = check_claim(out, &header)?.as_ref().unwrap_or(&header).key()?;
            let mut stopped = None;
            let written = atomic::write(out.join(format!("samples_{}.jsonl", task.name())), |target| {
                let mut keep = |record: Record| {
                    serde_json::to_writer(&mut *target, &Record { run: Some(key.clone()), ..record })?;
                    target.write_all(b"\n")
                };
                let scored = scoring.all(progress, &mut keep).and_then(|()| claim(out, header.clone()));
                scored.map(drop).map_err(|error| {
                    stopped = Some(error);
                    std::io::Error::other("stopped")
                })
            });
            written.map_err(|error| stopped.take().unwrap_or(error))?;
        }
    }
    let Scoring { scores, faults, .. } = scoring;
    let result = scores.result(task, &header)?;
    if let Some(out) = out {
        write_failures(&out.join(format!("failed_{}.jsonl", task.name())), &faults)?;
    }
    Ok(Scored { result, faults })
}

/// Lines that are scored at the same time.
const BATCH: usize = 256;

/// Scores a predictions file, a batch of lines at a time.
struct Scoring<'a> {
    samples: &'a dyn Samples,
    file: &'a Path,
    lines: Lines<'a>,
    index: HashMap<&'a str, usize>,
    /// Line on which a sample was counted.
    seen: HashMap<usize, usize>,
    scores: Scores,
    faults: Vec<Fault>,
}

impl<'a> Scoring<'a> {
    fn new(samples: &'a dyn Samples, file: &'a Path) -> Result<Self> {
        Ok(Self {
            samples,
            file,
            lines: Lines::open(file)?,
            index: samples.ids().iter().enumerate().map(|(index, id)| (id.as_str(), index)).collect(),
            seen: HashMap::new(),
            scores: Scores::default(),
            faults: Vec::new(),
        })
    }

    /// Scores all lines and gives those that count to `keep`. An error if none does.
    fn all(
        &mut self,
        progress: &mut dyn FnMut(u64, u64),
        keep: &mut dyn FnMut(Record) -> std::io::Result<()>,
    ) -> Result<()> {
        while self.next(progress, keep)? {}
        if !self.scores.is_empty() {
            return Ok(());
        }
        let file = self.file.display();
        Err(match self.faults.first() {
            Some(fault) => {
                Error::request(format!("{file}: no prediction can be counted: {fault}"), fault.hint.as_str())
            }
            None => Error::request(format!("{file} has no predictions"), "expected one JSON object per line"),
        })
    }

    /// Scores the next batch of lines and gives those that count to `keep`; `false` at the end of the file.
    fn next(
        &mut self,
        progress: &mut dyn FnMut(u64, u64),
        keep: &mut dyn FnMut(Record) -> std::io::Result<()>,
    ) -> Result<bool> {
        let mut batch = Vec::new();
        while batch.len() < BATCH
            && let Some(line) = self.lines.next()?
        {
            batch.push(line);
        }
        progress(self.lines.read, self.lines.size);
        let scored: Vec<_> = batch.par_iter().map(|line| self.record(line)).collect();
        if let Some(error) = self.samples.halted() {
            return Err(error);
        }
        for (Line { number, .. }, scored) in batch.iter().zip(scored) {
            let counted = scored.and_then(|(index, record)| match self.seen.insert(index, *number) {
                None => Ok(record),
                Some(first) => {
                    self.seen.insert(index, first);
                    let what = format!("the sample was already on line {first}, which counts");
                    Err((Some(record.prediction.id), Error::request(what, "give one line per sample")))
                }
            });
            match counted {
                Ok(record) => {
                    self.scores.add("", &record.prediction.id, record.scores.clone());
                    keep(record).map_err(|e| Error::io(self.file, e))?;
                }
                Err((id, error)) => self.faults.push(Fault {
                    line: *number,
                    id,
                    what: error.to_string(),
                    hint: error.hint().unwrap_or("check the line").to_owned(),
                }),
            }
        }
        Ok(!batch.is_empty())
    }

    /// The sample of a line, and the line with its scores; else the id as far as it can be told.
    fn record(&self, line: &Line) -> Result<(usize, Record), (Option<String>, Error)> {
        let prediction: Prediction = serde_json::from_slice(&line.text)
            .map_err(|error| (id_in(&line.text), not_a_line(line, &error)))?;
        let scored = self.index.get(prediction.id.as_str()).copied().ok_or_else(|| {
            let example = self.samples.ids().first().map_or("", String::as_str);
            Error::request(
                format!("the data has no sample `{}`", prediction.id),
                format!("ids look like `{example}`: see docs/evaluation.md, and check task and --data"),
            )
        });
        let scored = scored.and_then(|index| Ok((index, self.samples.score(index, &prediction)?)));
        match scored {
            Ok((index, scores)) => {
                Ok((index, Record { prediction, run: None, scores, rows: BTreeMap::new() }))
            }
            Err(error) => Err((Some(prediction.id), error)),
        }
    }
}

/// Why a line cannot be read.
fn not_a_line(line: &Line, error: &serde_json::Error) -> Error {
    let has = |word: &[u8]| line.text.windows(word.len()).any(|window| window == word);
    let (what, hint) = if line.is_torn() && error.is_eof() {
        ("the line is torn off".to_owned(), "the file was not written to its end")
    } else if error.is_syntax() && (has(b"NaN") || has(b"Infinity")) {
        (format!("not JSON: {error}"), "NaN and Infinity are not JSON numbers: leave the field out")
    } else if error.is_data() {
        (format!("not a prediction: {error}"), "docs/evaluation.md has the format")
    } else {
        (format!("not JSON: {error}"), "expected one JSON object per line")
    };
    Error::request(what.replace(" at line 1 column", ", column"), hint)
}

/// The value of `"id"` in a line that is not valid as a whole.
fn id_in(line: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(line);
    let rest = text.split_once("\"id\"")?.1.trim_start().strip_prefix(':')?.trim_start();
    let end = match rest.strip_prefix('"') {
        Some(inner) => return inner.split_once('"').map(|(id, _)| id.to_owned()),
        None => rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len()),
    };
    (end > 0).then(|| rest[..end].to_owned())
}

impl Prediction {
    /// The masks of a sample with `phrases` phrases in a picture of `[height, width]` pixels.
    ///
    /// An error, naming the phrase, if their number is another, or if a mask is missing, broken, or of another size.
    pub fn masks(&self, phrases: usize, size: [u32; 2]) -> Result<Vec<Runs>> {
        if self.phrases.len() != phrases {
            return Err(Error::request(
                format!("{} masks for {phrases} phrases", self.phrases.len()),
                "give one mask per phrase of the sample, in its order; an empty mask where nothing was found",
            ));
        }
        (0..phrases).map(|at| self.mask(at, size)).collect()
    }

    /// The mask of phrase `at`; see [`Prediction::masks`].
    pub fn mask(&self, at: usize, size: [u32; 2]) -> Result<Runs> {
        let phrase = &self.phrases[at];
        let named = |what: String, hint: &str| {
            let text = if phrase.text.is_empty() { String::new() } else { format!(" (`{}`)", phrase.text) };
            Error::request(format!("phrase {}{text}: {what}", at + 1), hint)
        };
        let Some(mask) = &phrase.segmentation else {
            return Err(named("no mask".into(), "add `segmentation` in COCO run lengths"));
        };
        if mask.size != size {
            let ([h, w], [height, width]) = (mask.size, size);
            return Err(named(
                format!("the mask is {h} x {w}, the picture {height} x {width} (height x width)"),
                "masks have the height and width of the picture itself",
            ));
        }
        Runs::from_coco(mask).map_err(|error| named(error.to_string(), error.hint().unwrap_or_default()))
    }

    /// An error if the prediction names another picture than `image_id`.
    pub fn check_picture(&self, image_id: &str) -> Result<()> {
        match &self.image_id {
            Some(named) if named != image_id => Err(Error::request(
                format!("picture {named} is given, the sample belongs to picture {image_id}"),
                "check that predictions and data are of the same split",
            )),
            _ => Ok(()),
        }
    }
}
