//! Predictions of any system, scored as our own are.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use flmm::{Error, Result, atomic};
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
        None => while lines.next(progress)?.is_some() {},
        Some(out) => {
            std::fs::create_dir_all(out).map_err(|e| Error::io(out, e))?;
            claim(out, &header)?;
            let mut stopped = None;
            atomic::write(out.join(format!("samples_{}.jsonl", task.name())), |target| {
                loop {
                    match lines.next(progress) {
                        Ok(Some(record)) => {
                            serde_json::to_writer(&mut *target, &record)?;
                            target.write_all(b"\n")?;
                        }
                        Ok(None) => return Ok(()),
                        Err(error) => {
                            stopped = Some(error);
                            return Err(std::io::Error::other("stopped"));
                        }
                    }
                }
            })
            .map_err(|error| stopped.take().unwrap_or(error))?;
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

/// Reads a predictions file line by line.
struct Lines<'a> {
    samples: &'a dyn Samples,
    file: &'a Path,
    reader: BufReader<File>,
    size: u64,
    read: u64,
    number: usize,
    text: Vec<u8>,
    index: HashMap<&'a str, usize>,
    /// Line on which a sample came first.
    seen: HashMap<usize, usize>,
    scores: Scores,
    faults: Vec<Fault>,
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
            text: Vec::new(),
            index: samples.ids().iter().enumerate().map(|(index, id)| (id.as_str(), index)).collect(),
            seen: HashMap::new(),
            scores: Scores::default(),
            faults: Vec::new(),
        })
    }

    /// The next line that counts; `None` at the end of the file.
    fn next(&mut self, progress: &mut dyn FnMut(u64, u64)) -> Result<Option<Record>> {
        loop {
            self.text.clear();
            let read = self.reader.read_until(b'\n', &mut self.text).map_err(|e| Error::io(self.file, e))?;
            if read == 0 {
                return Ok(None);
            }
            self.number += 1;
            self.read += read as u64;
            progress(self.read, self.size);
            if self.text.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            match self.record() {
                Ok(record) => return Ok(Some(record)),
                Err((id, error)) => self.faults.push(Fault {
                    line: self.number,
                    id,
                    what: error.to_string(),
                    hint: error.hint().unwrap_or("check the line").to_owned(),
                }),
            }
        }
    }

    fn record(&mut self) -> Result<Record, (Option<String>, Error)> {
        let prediction: Prediction = serde_json::from_slice(&self.text)
            .map_err(|error| (id_in(&self.text), self.not_a_line(&error)))?;
        let id = prediction.id.clone();
        self.counted(prediction).map_err(|error| (Some(id), error))
    }

    fn counted(&mut self, prediction: Prediction) -> Result<Record> {
        let Some(&index) = self.index.get(prediction.id.as_str()) else {
            let example = self.samples.ids().first().map_or("", String::as_str);
            return Err(Error::request(
                format!("the data has no sample `{}`", prediction.id),
                format!("ids look like `{example}`: see docs/evaluation.md, and check task and --data"),
            ));
        };
        if let Some(first) = self.seen.get(&index) {
            return Err(Error::request(
                format!("the sample was already on line {first}, which counts"),
                "give one line per sample",
            ));
        }
        let scores = self.samples.score(index, &prediction)?;
        self.seen.insert(index, self.number);
        self.scores.add("", &prediction.id, scores.clone());
        Ok(Record { prediction, scores, rows: Default::default() })
    }

    fn not_a_line(&self, error: &serde_json::Error) -> Error {
        let has = |word: &[u8]| self.text.windows(word.len()).any(|window| window == word);
        let torn = self.read == self.size && self.text.last() != Some(&b'\n') && error.is_eof();
        let (what, hint) = if torn {
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
