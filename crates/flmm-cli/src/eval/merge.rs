//! `flmm eval merge`: results from the samples files of all shards.

use std::path::PathBuf;

use clap::Args;

use super::numbers;
use crate::failure::Result;
use crate::talk::Talk;

#[derive(Debug, Args)]
pub(crate) struct MergeArgs {
    /// The --out folder of the runs.
    #[arg(value_name = "DIR")]
    out: PathBuf,
}

pub(crate) fn run(args: &MergeArgs, talk: &Talk) -> Result<()> {
    let results = flmm_eval::results::build(&args.out)?;
    talk.print(&numbers(&results))
}
