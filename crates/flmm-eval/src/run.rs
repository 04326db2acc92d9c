//! A model through a task: one line per sample, resumable at any moment.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use flmm::grounder::Revision;
use flmm::{Error, Grounder, Result, atomic};
use flmm_data::Part;
use serde_json::{Map, Value, json};

use crate::lines::write_failures;
use crate::record::{Prediction, Record, Row};
use crate::results::{Header, Scores, header_file, not_json, read_header, read_samples, samples_files};
use crate::task::{Predicted, Rows, Samples};

/// How a task is run.
#[derive(Debug, Clone)]
pub struct RunOptions {
    /// The run folder; made if it is not there.
    pub out: PathBuf,
    /// Only so many samples, the first ones.
    pub limit: Option<usize>,
    /// Which part of them.
    pub shard: Part,
    /// Masks to be scored besides the refined ones.
    pub rows: Rows,
}

/// Who predicts.
#[derive(Clone, Copy)]
pub struct Model<'a> {
    /// What tables call it.
    pub name: &'a str,
    /// Its files: a run goes on with the same ones only.
    pub revision: &'a Revision,
    /// The opened model.
    pub grounder: &'a Grounder,
}

/// Is told how a run goes on.
pub trait Watch {
    /// A task begins: `done` of `total` samples are there from an earlier run.
    fn begin(&mut self, task: &str, done: usize, total: usize);
    /// A sample is done.
    fn done(&mut self, id: &str);
    /// A sample has no result; the run goes on.
    fn failed(&mut self, id: &str, error: &Error);
}

/// What a run did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ran {
    /// Samples computed.
    pub done: usize,
    /// Samples found from an earlier run.
    pub found: usize,
    /// Samples without a result.
    pub failed: usize,
}

/// Lets `model` predict the samples of `task` and appends a line for each to the samples file of the shard. Samples that
/// are there from an earlier run are not computed again; a last line that was torn off is.
///
/// A sample that cannot be computed is told to `watch`, listed in `failed_<task>.jsonl`, and tried again by the next run.
///
/// # Errors
/// If the folder holds samples of another model (or of the same one with other files) or other settings, if another
/// process is at work on the same shard, if a file cannot be read or written, or if no more samples can be scored
/// ([`Samples::halted`]); the answer at which that was found out is kept.
pub fn run(
    task: &str,
    samples: &dyn Samples,
    model: Model,
    options: &RunOptions,
    watch: &mut dyn Watch,
) -> Result<Ran> {
    let out = &options.out;
    std::fs::create_dir_all(out).map_err(|e| Error::io(out, e))?;
    let key = claim(
        out,
        Header {
            task: task.to_owned(),
            model: model.name.to_owned(),
            revision: Some(model.revision.clone()),
            settings: settings(samples, options.rows),
            of: samples.ids().len(),
        },
    )?
    .key()?;
    let path = shard_file(options, &format!("samples_{task}"));
    let mut file = open_to_append(&path)?;
    let mut known = Scores::default();
    for file in samples_files(out, task)? {
        read_samples(&file, &key, &mut known)?;
    }

    let total = options.limit.unwrap_or(usize::MAX).min(samples.ids().len());
    let ids = samples.ids();
    let (found, todo): (Vec<usize>, Vec<usize>) =
        options.shard.range(total).partition(|&index| known.contains(&ids[index]));
    drop(known);
    watch.begin(task, found.len(), found.len() + todo.len());
    let mut ran = Ran { found: found.len(), ..Ran::default() };
    let mut failures = Vec::new();
    let mut halted = None;
    for index in todo {
        let id = &ids[index];
        let record = samples
            .predict(index, model.grounder, options.rows)
            .and_then(|predicted| record(samples, index, predicted));
        match record {
            Ok(record) => {
                let record = Record { run: Some(key.clone()), ..record };
                let mut line = serde_json::to_vec(&record).map_err(not_json)?;
                line.push(b'\n');
                // One call: a line is there whole, or torn at the end of the file.
                file.write_all(&line).map_err(|e| Error::io(&path, e))?;
                ran.done += 1;
                watch.done(id);
            }
            Err(error) => {
                ran.failed += 1;
                failures.push(json!({ "id": id, "error": error.to_string(), "hint": error.hint() }));
                watch.failed(id, &error);
            }
        }
        halted = samples.halted();
        if halted.is_some() {
            break;
        }
    }
    file.sync_all().map_err(|e| Error::io(&path, e))?;
    write_failures(&shard_file(options, &format!("failed_{task}")), &failures)?;
    halted.map_or(Ok(ran), Err)
}

/// `<start>.jsonl` of the run, with the shard in its name if there are several.
fn shard_file(options: &RunOptions, start: &str) -> PathBuf {
    options.out.join(match options.shard {
        Part { count: 1, .. } => format!("{start}.jsonl"),
        shard => format!("{start}.{shard}.jsonl"),
    })
}

/// The record of a prediction: the prediction's scores, and those of its other masks.
pub fn record(samples: &dyn Samples, index: usize, predicted: Predicted) -> Result<Record> {
    let Predicted { prediction, rows } = predicted;
    let scores = samples.score(index, &prediction)?;
    let mut others = std::collections::BTreeMap::new();
    for (name, segmentations) in rows {
        let phrases = prediction.phrases.iter().zip(&segmentations);
        let phrases = phrases
            .map(|(phrase, mask)| crate::Phrase { segmentation: Some(mask.clone()), ..phrase.clone() });
        let other = Prediction { phrases: phrases.collect(), ..prediction.clone() };
        let scores = samples.score(index, &other)?;
        others.insert(name.to_owned(), Row { segmentations, scores });
    }
    Ok(Record { prediction, run: None, scores, rows: others })
}

/// What the numbers depend on: how samples are made and scored, and the rows if any.
pub(crate) fn settings(samples: &dyn Samples, rows: Rows) -> Value {
    let mut all = Map::new();
    for part in [samples.settings(), samples.scoring()] {
        if let Value::Object(part) = part {
            all.extend(part);
        }
    }
    let names: Vec<&str> = rows.names().collect();
    if !names.is_empty() {
        all.insert("rows".to_owned(), json!(names));
    }
    if all.is_empty() { Value::Null } else { Value::Object(all) }
}

/// Writes the header of a task, or checks it against the one that is there. The header that is there then.
pub(crate) fn claim(out: &Path, header: Header) -> Result<Header> {
    if let Some(found) = check_claim(out, &header)? {
        return Ok(found);
    }
    let json = serde_json::to_vec_pretty(&header).map_err(not_json)?;
    atomic::write(header_file(out, &header.task), |file| file.write_all(&json))?;
    Ok(header)
}

/// The header of the same task that is there, if any. An error if it is another one than `header`.
pub(crate) fn check_claim(out: &Path, header: &Header) -> Result<Option<Header>> {
    let Some(found) = read_header(out, &header.task)? else { return Ok(None) };
    if found == *header {
        return Ok(Some(found));
    }
    let differences = found.differences(header).join("; ");
    Err(Error::request(
        format!("{} holds other samples of {}: {differences}", out.display(), header.task),
        "choose another --out folder, or repeat the first command",
    ))
}

/// Opens a samples file for appending and cuts a torn last line off. An error if another process has it open.
fn open_to_append(path: &Path) -> Result<File> {
    let io = |error| Error::io(path, error);
    let mut file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
    if !atomic::try_lock(&file) {
        return Err(Error::request(
            format!("{} is being written by another process", path.display()),
            "wait for it, or give every process a --shard of its own",
        ));
    }
    let length = file.seek(SeekFrom::End(0)).map_err(io)?;
    let mut end = length;
    let mut block = vec![0; 1 << 16];
    // Backwards, block by block, to the last line end.
    while end > 0 {
        let start = end.saturating_sub(block.len() as u64);
        let size = (end - start) as usize;
        file.seek(SeekFrom::Start(start)).map_err(io)?;
        file.read_exact(&mut block[..size]).map_err(io)?;
        if let Some(at) = block[..size].iter().rposition(|&byte| byte == b'\n') {
            end = start + at as u64 + 1;
            break;
        }
        end = start;
    }
    if end != length {
        file.set_len(end).map_err(io)?;
    }
    file.seek(SeekFrom::Start(end)).map_err(io)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_line_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        for (before, after) in [("", ""), ("abc", ""), ("a\nb", "a\n"), ("a\nb\n", "a\nb\n")] {
            std::fs::write(&path, before).unwrap();
            let mut file = open_to_append(&path).unwrap();
            assert!(open_to_append(&path).unwrap_err().to_string().contains("another process"));
            file.write_all(b"c\n").unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{after}c\n"));
        }
        let long = format!("a\n{}", "b".repeat(200_000));
        std::fs::write(&path, &long).unwrap();
        drop(open_to_append(&path).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "a\n");
    }
}
