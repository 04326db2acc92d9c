//! `flmm eval score`: predictions of any system.

use std::path::PathBuf;

use clap::Args;
use flmm_eval::results::Results;

use super::{DataArgs, numbers, tasks};
use crate::failure::{Failure, Result};
use crate::talk::Talk;

/// Faults that are printed; all of them are in the --out folder.
const MOST_FAULTS: usize = 20;

#[derive(Debug, Args)]
pub(crate) struct ScoreArgs {
    /// The task.
    #[arg(long, value_name = "NAME")]
    task: String,
    /// Predictions: one JSON object per line, masks in COCO run lengths.
    #[arg(long, value_name = "FILE")]
    predictions: PathBuf,
    /// What the tables call their author [default: the file's name].
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Folder for results.json, results.md and the samples with their scores.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    data: DataArgs,
}

pub(crate) fn run(args: &ScoreArgs, talk: &Talk) -> Result<()> {
    let settings = args.data.settings()?;
    let file = &args.predictions;
    if !file.is_file() {
        return Err(Failure::usage(format!("`{}`: no such file", file.display()), "check the path"));
    }
    let stem = file.file_stem().unwrap_or(file.as_os_str()).to_string_lossy().into_owned();
    let name = args.name.clone().unwrap_or(stem);
    let found = tasks(std::slice::from_ref(&args.task), &settings, false)?;
    let Some(task) = found.first() else { return Ok(()) };
    let spinner = talk.during("reading the data");
    let samples = task.open(&settings)?;
    drop(spinner);
    let bar = talk.bytes_bar(0);
    let scored = flmm_eval::score::score(
        task.as_ref(),
        samples.as_ref(),
        (&name, file),
        args.out.as_deref(),
        &mut |read, size| {
            bar.set_length(size);
            bar.set_position(read);
        },
    );
    bar.finish_and_clear();
    let scored = scored?;
    if let Some(out) = &args.out {
        flmm_eval::results::build(out)?;
        talk.note(format_args!("tables: {}", out.join("results.md").display()));
    }
    let missing = scored.result.of - scored.result.samples;
    if missing > 0 {
        talk.note(format_args!("{missing} of {} samples have no prediction that counts", scored.result.of));
    }
    for fault in scored.faults.iter().take(MOST_FAULTS) {
        talk.note(format_args!("{}: {fault} ({})", file.display(), fault.hint));
    }
    if args.json {
        let json = serde_json::to_string_pretty(&scored.result)
            .map_err(|error| Failure::other(format!("cannot be written as JSON: {error}")))?;
        talk.print(&json)?;
    } else {
        let tasks = [(task.name().to_owned(), scored.result)].into_iter().collect();
        talk.print(&numbers(&Results { tasks }))?;
    }
    match scored.faults.len() {
        0 => Ok(()),
        1 => Err(Failure::other("1 line is not counted")),
        count => Err(Failure::other(format!("{count} lines are not counted"))),
    }
}
