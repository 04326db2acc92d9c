//! `flmm eval`: the tables of the paper, for a model or for anyone's predictions.

mod atlas;
mod gcg;
mod identity;
mod judge;
mod merge;
mod panels;
mod ranks;
mod report;
mod run;
mod samples;
mod score;
mod tasks;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use flmm_eval::results::Results;
use flmm_eval::task::Pictures;
use flmm_eval::{Settings, Task, grefcoco, png, res, viscot};

use crate::failure::{Failure, Result};
use crate::talk::Talk;

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct EvalArgs {
    #[command(subcommand)]
    what: Option<Eval>,
    #[command(flatten)]
    run: run::RunArgs,
}

/// What `flmm eval` can do besides running a model. Each has a file of its own, with its arguments.
#[derive(Debug, Subcommand)]
enum Eval {
    /// Score predictions of any system; no model is needed.
    Score(score::ScoreArgs),
    /// Print the samples of a task as lines that only lack what a system predicts.
    Samples(samples::SamplesArgs),
    /// Make results.json and results.md anew from the samples files of a run, all shards together.
    Merge(merge::MergeArgs),
    /// Show that answers are the same with grounding on and off; the first that is not is printed, with exit status 1.
    Identity(identity::IdentityArgs),
    /// List the tasks, the data each needs, and whether it is there.
    Tasks(tasks::TasksArgs),
    /// Make one page of what went wrong in a run: phrase missed, mask empty, wrong object, low IoU.
    Report(report::ReportArgs),
    /// Draw attention clusters, coarse masks, refined masks and ground truth side by side.
    Panels(panels::PanelsArgs),
    /// Measure for every attention head how often it looks at what is spoken of.
    Atlas(atlas::AtlasArgs),
    /// Average ranks of models in chat and in grounding, and how the two go together.
    Ranks(ranks::RanksArgs),
}

pub(crate) fn run(args: &EvalArgs, talk: &Talk) -> Result<()> {
    match &args.what {
        None => run::run(&args.run, talk),
        Some(Eval::Score(args)) => score::run(args, talk),
        Some(Eval::Samples(args)) => samples::run(args, talk),
        Some(Eval::Merge(args)) => merge::run(args, talk),
        Some(Eval::Identity(args)) => identity::run(args, talk),
        Some(Eval::Tasks(args)) => tasks::run(args, talk),
        Some(Eval::Report(args)) => report::run(args, talk),
        Some(Eval::Panels(args)) => panels::run(args, talk),
        Some(Eval::Atlas(args)) => atlas::run(args, talk),
        Some(Eval::Ranks(args)) => ranks::run(args, talk),
    }
}

/// Data and protocol.
#[derive(Debug, Args)]
#[command(next_help_heading = "Data and protocol")]
struct DataArgs {
    /// Data root, laid out as `flmm eval tasks` lists it.
    #[arg(long, value_name = "DIR", required = true)]
    data: Option<PathBuf>,
    /// RefCOCO, RefCOCO+, RefCOCOg: one pass per object instead of one per picture.
    #[arg(long)]
    split_objects: bool,
    /// RefCOCO, RefCOCO+, RefCOCOg: score every expression of an object, not only its first one.
    #[arg(long)]
    all_sentences: bool,
    /// gRefCOCO: masks whose score is below S count as "not in the picture" [default: only empty masks do].
    #[arg(long, value_name = "S")]
    abstain_below: Option<f64>,
    /// PNG: as the reference, put a random other narrative in the place of each without a grounded phrase.
    #[arg(long, value_name = "SEED")]
    replace_empty: Option<u64>,
    #[command(flatten)]
    gcg: gcg::GcgArgs,
    /// Visual chain of thought: refine masks with SAM before their boxes are taken.
    #[arg(long)]
    cot_sam: bool,
    /// Visual chain of thought: size of the box looked at again, relative to the mask's.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = factor)]
    cot_box_scale: f64,
    #[command(flatten)]
    judge: judge::JudgeArgs,
}

fn factor(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(factor) if factor > 0.0 && factor.is_finite() => Ok(factor),
        _ => Err("must be above 0".into()),
    }
}

impl DataArgs {
    fn settings(&self) -> Result<Settings> {
        Ok(Settings {
            data: self.data.clone().unwrap_or_default(),
            store: Pictures::default(),
            res: res::Protocol { split: self.split_objects, all_sentences: self.all_sentences },
            abstention: grefcoco::Abstention { below: self.abstain_below },
            png: png::Protocol { replace_empty: self.replace_empty },
            judge: self.judge.open()?,
            cot: viscot::Protocol { sam: self.cot_sam, box_scale: self.cot_box_scale },
            gcg: self.gcg.protocol(),
        })
    }
}

/// The tasks of these names, whose data must all be there before anything is computed. Without `for_model`, predictions
/// are only scored, which needs no pictures.
fn tasks(names: &[String], settings: &Settings, for_model: bool) -> Result<Vec<Box<dyn Task>>> {
    let root = &settings.data;
    if !root.is_dir() {
        return Err(Failure::usage(format!("`{}`: no such folder", root.display()), "give the data root"));
    }
    let store = settings.pictures()?;
    let mut found = Vec::new();
    for name in names {
        let task = flmm_eval::find(name)
            .map_err(|error| Failure::usage(error.to_string(), error.hint().unwrap_or_default()))?;
        let missing: Vec<String> = task
            .needs()
            .iter()
            .filter(|need| (for_model || !need.for_model) && !need.is_present(&store))
            .map(|need| format!("  {} ({})", need.path, need.source))
            .collect();
        if !missing.is_empty() {
            return Err(Failure::usage(
                format!("{name}: missing below `{}`:\n{}", root.display(), missing.join("\n")),
                "`flmm eval tasks --data DIR` shows what each task needs",
            ));
        }
        found.push(task);
    }
    Ok(found)
}

/// The numbers of a run as text: one line per task and row.
fn numbers(results: &Results) -> String {
    let mut text = String::new();
    for (name, task) in &results.tasks {
        let rows = std::iter::once((String::new(), &task.metrics));
        for (row, metrics) in rows.chain(task.rows.iter().map(|(row, m)| (format!(" ({row})"), m))) {
            text += &format!("{name}{row}: {} of {} samples\n", task.samples, task.of);
            metrics.0.iter().for_each(|(name, value)| text += &format!("  {name:<16} {value:>8.2}\n"));
        }
    }
    text
}
