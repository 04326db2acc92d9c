//! `flmm data`: the datasets on this disk.

use std::fmt::Write;
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use flmm_data::check::{CheckOptions, Part, Report, Status, check};

use crate::failure::{Failure, Result};
use crate::talk::Talk;

#[derive(Debug, Args)]
pub(crate) struct DataArgs {
    #[command(subcommand)]
    what: Data,
}

#[derive(Debug, Subcommand)]
enum Data {
    /// Look whether a download is complete, and say where to get what is missing.
    ///
    /// Exit status 0 if everything is there, 1 if something is missing or damaged.
    Check(CheckArgs),
}

#[derive(Debug, Args)]
struct CheckArgs {
    /// Folder with `coco/`.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Which parts are needed.
    #[arg(long = "for", value_enum, default_value_t)]
    purpose: Purpose,
    /// Decode every picture and mask instead of looking at headers: hours on the whole data.
    #[arg(long)]
    decode: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum Purpose {
    /// Training data only.
    Train,
    /// Validation data only.
    Val,
    /// Both.
    #[default]
    All,
}

pub(crate) fn run(args: &DataArgs, talk: &Talk) -> Result<()> {
    let Data::Check(args) = &args.what;
    let options = CheckOptions {
        train: !matches!(args.purpose, Purpose::Val),
        val: !matches!(args.purpose, Purpose::Train),
        decode: args.decode,
    };
    let bar = talk.bar(0);
    let report = check(&args.data, options, &|_, done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let report = report?;
    match args.json {
        true => {
            let text = serde_json::to_string_pretty(&report)
                .map_err(|error| Failure::other(format!("cannot write JSON: {error}")))?;
            talk.print(&text)?;
        }
        false => talk.print(&told(&report))?,
    }
    if report.is_usable() {
        return Ok(());
    }
    let wrong = |part: &&Part| !matches!(part.status, Status::Complete | Status::Different);
    let count = report.parts.iter().filter(wrong).count();
    Err(Failure::other(format!("{count} of {} parts are missing or damaged", report.parts.len())))
}

fn told(report: &Report) -> String {
    let mut text = String::new();
    for part in &report.parts {
        let status = match part.status {
            Status::Complete => "complete",
            Status::Different => "differs",
            Status::Incomplete => "DAMAGED",
            Status::Missing => "MISSING",
        };
        let of = match part.published {
            Some(published) if published != part.found => format!(" of {published}"),
            _ => String::new(),
        };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{status:<9} {:<24} {}{of} {}", part.name, part.found, part.unit);
        for problem in &part.problems {
            let _ = writeln!(text, "          {problem}");
        }
        let more = part.problem_count - part.problems.len() as u64;
        if more > 0 {
            let _ = writeln!(text, "          … and {more} more");
        }
        for fetch in &part.fetch {
            let _ = writeln!(text, "          fetch {}: {}", fetch.url, fetch.into);
        }
    }
    text
}
