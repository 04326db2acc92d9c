//! `flmm eval report`: what went wrong in a run, as one page.

use std::path::PathBuf;

use clap::Args;
use flmm_eval::report::{Report, ReportOptions, page};
use flmm_eval::results::build;

use super::{DataArgs, tasks};
use crate::args::count;
use crate::failure::{Failure, Result};
use crate::picture::check_place;
use crate::talk::Talk;

#[derive(Debug, Args)]
pub(crate) struct ReportArgs {
    /// Folder of a run: the --out of `flmm eval` or `flmm eval score`.
    run: PathBuf,
    /// Only these tasks of the run, separated by commas.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    task: Vec<String>,
    /// The page [default: report.html in the folder of the run].
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Phrases whose mask has a smaller IoU than this have failed.
    #[arg(long, value_name = "IOU", default_value_t = 0.5, value_parser = iou)]
    threshold: f64,
    /// Most failures that are shown of each task and kind.
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = count)]
    most: usize,
    #[command(flatten)]
    data: DataArgs,
}

pub(crate) fn run(args: &ReportArgs, talk: &Talk) -> Result<()> {
    if !args.run.is_dir() {
        return Err(Failure::usage(
            format!("`{}`: no such folder", args.run.display()),
            "give the --out folder of a run",
        ));
    }
    let out = args.out.clone().unwrap_or_else(|| args.run.join("report.html"));
    check_place(&out)?;
    let results = build(&args.run)?.tasks;
    let names: Vec<String> = match args.task.is_empty() {
        true => results.keys().cloned().collect(),
        false => args.task.clone(),
    };
    if let Some(absent) = names.iter().find(|name| !results.contains_key(*name)) {
        let known: Vec<&str> = results.keys().map(String::as_str).collect();
        return Err(Failure::usage(
            format!("the run has no samples of `{absent}`"),
            format!("it has: {}", known.join(", ")),
        ));
    }
    let settings = args.data.settings()?;
    let options = ReportOptions { threshold: args.threshold, most: args.most };
    let mut report = Report { results, ..Report::default() };
    for task in tasks(&names, &settings, true)? {
        let _spinner = talk.during("looking at the samples");
        if !report.add(&args.run, task.name(), task.open(&settings)?.as_ref(), options)? {
            talk.note(format_args!("{}: has no masks, left out", task.name()));
        }
    }
    let mut models: Vec<&str> = report.results.values().map(|result| result.model.as_str()).collect();
    models.dedup();
    let bar = talk.bar(report.failures.len() as u64);
    let pictures = settings.pictures()?;
    let title = format!("Failures of {}", models.join(", "));
    let text = page(&report, &title, |name| pictures.read(name), || bar.inc(1))?;
    bar.finish_and_clear();
    flmm::atomic::write(&out, |file| file.write_all(text.as_bytes()))?;
    let phrases: usize = report.counts.values().map(|(phrases, _)| phrases).sum();
    let failed: usize = report.counts.values().flat_map(|(_, kinds)| kinds.values()).sum();
    talk.note(format_args!("report: {}, {:.1} MB", out.display(), text.len() as f64 / 1e6));
    talk.print(&format!("{failed} of {phrases} phrases failed, {} are shown", report.failures.len()))
}

fn iou(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(iou) if iou > 0.0 && iou <= 1.0 => Ok(iou),
        _ => Err("must be above 0 and at most 1".into()),
    }
}
