//! `flmm eval --task …`: a model through tasks.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use flmm::Error;
use flmm_data::Part;
use flmm_eval::Rows;
use flmm_eval::results::build;
use flmm_eval::run::{Model, Ran, RunOptions, Watch, run as run_task};
use indicatif::ProgressBar;

use super::{DataArgs, numbers, tasks};
use crate::args::{ModelArgs, count};
use crate::failure::{Failure, Result};
use crate::model;
use crate::talk::Talk;

/// Failures that are printed; all of them are in the --out folder.
const MOST_FAILURES: usize = 10;

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Tasks, separated by commas: `flmm eval tasks` lists them.
    #[arg(long, value_name = "NAMES", value_delimiter = ',', required = true)]
    task: Vec<String>,
    /// Folder for samples and results. A run that was stopped goes on where it was.
    #[arg(long, value_name = "DIR", required = true)]
    out: Option<PathBuf>,
    /// Only the first N samples of each task.
    #[arg(long, value_name = "N", value_parser = count)]
    limit: Option<usize>,
    /// Part i of n, for several processes with the same --out.
    #[arg(long, value_name = "i/n", default_value = "1/1", hide_default_value = true)]
    shard: Part,
    /// Score these masks of the same phrases too.
    #[arg(long, value_name = "ROWS", value_delimiter = ',')]
    rows: Vec<Row>,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Row {
    /// The better of two K-means clusters of the attention, without any training.
    Kmeans,
    /// The mask head's masks, before the refiner.
    Coarse,
    /// The refined masks, which are always scored.
    Refined,
}

pub(crate) fn run(args: &RunArgs, talk: &Talk) -> Result<()> {
    let settings = args.data.settings()?;
    let mut names = args.task.clone();
    names.dedup();
    let tasks = tasks(&names, &settings, true)?;
    if let Some(judge) = &settings.judge {
        judge.check()?;
    }
    let model = model::open(&args.model, talk)?;
    for task in &tasks {
        task.fits(&model.grounder)?;
    }
    let revision = model.revision()?;
    // In a table the two must be told apart.
    let name = match revision.head {
        Some(_) => model.name.clone(),
        None => format!("{} without a head", model.name),
    };
    let out = args.out.clone().unwrap_or_default();
    let options = RunOptions {
        out: out.clone(),
        limit: args.limit,
        shard: args.shard,
        rows: Rows { coarse: args.rows.contains(&Row::Coarse), kmeans: args.rows.contains(&Row::Kmeans) },
    };
    let mut failed = 0;
    for task in &tasks {
        let spinner = talk.during("reading the data");
        let samples = task.open(&settings)?;
        drop(spinner);
        let mut watch = Progress { talk, bar: ProgressBar::hidden(), failures: 0 };
        let who = Model { name: &name, revision: &revision, grounder: &model.grounder };
        let ran = run_task(task.name(), samples.as_ref(), who, &options, &mut watch);
        watch.bar.finish_and_clear();
        let Ran { done, found, failed: without } = ran?;
        talk.note(format_args!(
            "{}: {done} samples computed, {found} from before, {without} failed",
            task.name()
        ));
        failed += without;
    }
    let results = build(&out)?;
    talk.note(format_args!("tables: {}", out.join("results.md").display()));
    talk.print(&numbers(&results))?;
    match failed {
        0 => Ok(()),
        _ => Err(Failure::other(format!(
            "{failed} samples have no result; they are listed in failed_*.jsonl and tried again by the next run"
        ))),
    }
}

/// A bar with the time left.
struct Progress<'a> {
    talk: &'a Talk,
    bar: ProgressBar,
    failures: usize,
}

impl Watch for Progress<'_> {
    fn begin(&mut self, task: &str, done: usize, total: usize) {
        self.bar = self.talk.bar(total as u64).with_position(done as u64);
        // The time left is told from what this run computes.
        self.bar.reset_eta();
        self.talk.detail(format_args!("{task}: {done} of {total} samples are there"));
    }

    fn done(&mut self, _id: &str) {
        self.bar.inc(1);
    }

    fn failed(&mut self, id: &str, error: &Error) {
        self.bar.inc(1);
        self.failures += 1;
        if self.failures <= MOST_FAILURES {
            self.bar.suspend(|| self.talk.note(format_args!("sample {id}: {error}")));
        }
    }
}
