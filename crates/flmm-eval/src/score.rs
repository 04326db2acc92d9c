//! Predictions of any system, scored as our own are.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use flmm::{Error, Result, atomic};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::record::{Prediction, Record};
use crate::results::{Header, Scores, TaskResult, not_json};
use crate::run::claim;
use crate::runs::Runs;
use crate::task::{Samples, Task};

/// A line that could not be counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
/// With `out`, the lines with their scores are written there as a samples file, as a run of a model would.
///
/// # Errors
/// If the file cannot be read, or has no line that counts; the first fault is then the error. Faults of single lines
/// are part of the result.
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
        settings: samples.settings(),
        of: samples.ids().len(),
    };
    let mut lines = Lines::new(samples, file)?;
    match out {
        None => while lines.next(progress, &mut |_| Ok(()))? {},
        Some(out) => {
            std::fs::create_dir_all(out).map_err(|e| Error::io(out, e))?;
            claim(out, &header)?;
            let mut stopped = None;
            let written = atomic::write(out.join(format!("samples_{}.jsonl", task.name())), |target| {
                let mut keep = |record: Record| {
                    serde_json::to_writer(&mut *target, &record)?;
                    target.write_all(b"\n")
                };
                loop {
                    match lines.next(progress, &mut keep) {
                        Ok(true) => {}
                        Ok(false) => return Ok(()),
                        Err(error) => {
                            stopped = Some(error);
                            return Err(std::io::Error::other("stopped"));
                        }
                    }
                }
            });
            written.map_err(|error| stopped.take().unwrap_or(error))?;
        }
    }
    let Lines { scores, faults, .. } = lines;
    if scores.is_empty() {
        let what = match faults.first() {
            Some(fault) => format!("{}: no prediction can be counted: {fault}", file.display()),
            None => format!("{} has no predictions", file.display()),
        };
        let hint = faults.first().map_or("expected one JSON object per line", |fault| fault.hint.as_str());
        return Err(Error::request(what, hint));
    }
    let result = scores.result(task, &header)?;
    if let Some(out) = out {
        write_faults(&out.join(format!("failed_{}.jsonl", task.name())), &faults)?;
    }
    Ok(Scored { result, faults })
}

fn write_faults(path: &Path, faults: &[Fault]) -> Result<()> {
    let lines: Result<Vec<String>, _> = faults.iter().map(serde_json::to_string).collect();
    let lines = lines.map_err(not_json)?;
    atomic::write(path, |file| lines.iter().try_for_each(|line| writeln!(file, "{line}")))
}

/// Lines that are scored at the same time.
const BATCH: usize = 256;

/// Reads a predictions file, a batch of lines at a time.
struct Lines<'a> {
    samples: &'a dyn Samples,
    file: &'a Path,
    reader: BufReader<File>,
    size: u64,
    read: u64,
    number: usize,
    index: HashMap<&'a str, usize>,
    /// Line on which a sample was counted.
    seen: HashMap<usize, usize>,
    scores: Scores,
    faults: Vec<Fault>,
}

/// A line that is not blank.
struct Line {
    number: usize,
    text: Vec<u8>,
}

impl<'a> Lines<'a> {
    fn new(samples: &'a dyn Samples, file: &'a Path) -> Result<Self> {
        let opened = File::open(file).map_err(|e| Error::io(file, e))?;
        let size = opened.metadata().map_err(|e| Error::io(file, e))?.len();
        Ok(Self {
            samples,
            file,
            reader: BufReader::with_capacity(1 << 20, opened),
            size,
            read: 0,
            number: 0,
            index: samples.ids().iter().enumerate().map(|(index, id)| (id.as_str(), index)).collect(),
            seen: HashMap::new(),
            scores: Scores::default(),
            faults: Vec::new(),
        })
    }

    /// Scores the next batch of lines and gives those that count to `keep`; `false` at the end of the file.
    fn next(
        &mut self,
        progress: &mut dyn FnMut(u64, u64),
        keep: &mut dyn FnMut(Record) -> std::io::Result<()>,
    ) -> Result<bool> {
        let batch = self.batch()?;
        progress(self.read, self.size);
        let scored: Vec<_> = batch.par_iter().map(|line| self.record(line)).collect();
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

    fn batch(&mut self) -> Result<Vec<Line>> {
        let mut batch = Vec::new();
        while batch.len() < BATCH {
            let mut text = Vec::new();
            let read = self.reader.read_until(b'\n', &mut text).map_err(|e| Error::io(self.file, e))?;
            if read == 0 {
                break;
            }
            self.number += 1;
            self.read += read as u64;
            if !text.iter().all(u8::is_ascii_whitespace) {
                batch.push(Line { number: self.number, text });
            }
        }
        Ok(batch)
    }

    /// The sample of a line, and the line with its scores; else the id as far as it can be told.
    fn record(&self, line: &Line) -> Result<(usize, Record), (Option<String>, Error)> {
        let prediction: Prediction = serde_json::from_slice(&line.text)
            .map_err(|error| (id_in(&line.text), not_a_line(&line.text, &error)))?;
        let scored = self.index.get(prediction.id.as_str()).copied().ok_or_else(|| {
            let example = self.samples.ids().first().map_or("", String::as_str);
            Error::request(
                format!("the data has no sample `{}`", prediction.id),
                format!("ids look like `{example}`: see docs/evaluation.md, and check task and --data"),
            )
        });
        let scored = scored.and_then(|index| Ok((index, self.samples.score(index, &prediction)?)));
        match scored {
            Ok((index, scores)) => Ok((index, Record { prediction, scores, rows: BTreeMap::new() })),
            Err(error) => Err((Some(prediction.id), error)),
        }
    }
}

/// Why a line cannot be read.
fn not_a_line(text: &[u8], error: &serde_json::Error) -> Error {
    let has = |word: &[u8]| text.windows(word.len()).any(|window| window == word);
    let (what, hint) = if text.last() != Some(&b'\n') && error.is_eof() {
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
