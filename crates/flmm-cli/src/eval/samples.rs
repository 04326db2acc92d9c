//! `flmm eval samples`: what other systems have to predict.

use clap::Args;

use super::{DataArgs, tasks};
use crate::failure::{Failure, Result};
use crate::talk::Talk;

#[derive(Debug, Args)]
pub(crate) struct SamplesArgs {
    /// The task.
    #[arg(long, value_name = "NAME")]
    task: String,
    #[command(flatten)]
    data: DataArgs,
}

pub(crate) fn run(args: &SamplesArgs, talk: &Talk) -> Result<()> {
    let settings = args.data.settings()?;
    for task in tasks(std::slice::from_ref(&args.task), &settings, false)? {
        let samples = task.open(&settings)?;
        for index in 0..samples.ids().len() {
            let line = samples.template(index)?;
            let line = serde_json::to_string(&line)
                .map_err(|error| Failure::other(format!("cannot be written as JSON: {error}")))?;
            talk.print(&line)?;
        }
    }
    Ok(())
}
