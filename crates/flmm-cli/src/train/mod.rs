//! `flmm train`: a grounding head for a frozen LMM.

mod models;
mod view;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use candle_core::Device;
use clap::Args;
use flmm::Error;
use flmm_train::config::Config;
use flmm_train::distributed::{from_env, together};
use flmm_train::{Extras, Models};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::failure::{Failure, Result};
use crate::features::StoredArgs;
use crate::talk::Talk;

pub(crate) use models::ModelsArgs;
use view::View;

#[derive(Debug, Args)]
#[command(
    mut_arg("feature_type", |arg| arg.requires("feature_cache")),
    mut_arg("feature_maps_int8", |arg| arg.requires("feature_cache"))
)]
pub(crate) struct TrainArgs {
    #[command(flatten)]
    work: WorkArgs,
    /// Folder of the run, new, or of a run that was stopped and goes on.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Train the keyword selector alone, for the head given by --head.
    #[arg(long, requires = "head")]
    selector_only: bool,
    /// Keep what the frozen models see in this folder, and read it from there in later epochs and runs.
    #[arg(long, value_name = "DIR", conflicts_with = "selector_only")]
    feature_cache: Option<PathBuf>,
    #[command(flatten)]
    stored: StoredArgs,
    #[command(flatten)]
    models: ModelsArgs,
}

/// What is trained, and on which data.
#[derive(Debug, Args)]
pub(crate) struct WorkArgs {
    /// What to train and how: a TOML file, or the name of a built-in configuration such as llava-1.5-7b.
    #[arg(long, value_name = "FILE|NAME")]
    config: PathBuf,
    /// Folder with the datasets, `coco/` in it; see `flmm data check`.
    #[arg(long, value_name = "DIR")]
    pub(crate) data: PathBuf,
    /// Change one key of the configuration, may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl WorkArgs {
    /// The configuration, with what was typed and what other options stand for.
    pub(crate) fn config(&self, options: impl IntoIterator<Item = String>) -> Result<Config> {
        let settings: Vec<String> = self.set.iter().cloned().chain(options).collect();
        Config::load(&self.config, &settings).map_err(usage)
    }
}

pub(crate) fn run(args: &TrainArgs, talk: &Talk) -> Result<()> {
    let device = args.models.device()?;
    let communicator = from_env(&device)?;
    let ranks = communicator.as_ref();
    let silent = Talk::new(true, false);
    // One rank tells for all; errors are told by whoever has them.
    let talk = if ranks.rank() == 0 { talk } else { &silent };
    let begun = begin(args, &device, talk);
    let others = together(ranks, begun.as_ref().map(drop).map_err(retold));
    let (config, models, stop) = begun?;
    others?;
    let mut view = View::new(&config, stop, talk);
    let features = args.feature_cache.clone().map(|dir| args.stored.options(dir));
    let extras = Extras { features, communicator: ranks };
    let outcome = flmm_train::run(&config, &models, &args.work.data, &args.out, &extras, &mut view);
    view.clear();
    let outcome = outcome?;
    if ranks.rank() != 0 {
        return Ok(());
    }
    if outcome.skipped > 0 {
        let list = args.out.join(flmm_train::SKIPPED);
        talk.note(format_args!("{} samples could not be used: {}", outcome.skipped, list.display()));
    }
    match outcome.head {
        Some(head) => {
            talk.note(format_args!("{} steps done; the head, for `flmm chat --head`:", outcome.steps));
            talk.print(&head.display().to_string())
        }
        None => Err(Failure::Library(Error::request(
            format!("stopped after step {} of {}; a checkpoint is written", outcome.steps, outcome.total),
            "give the same command again to go on",
        ))),
    }
}

/// What a run needs before the library takes over.
fn begin(args: &TrainArgs, device: &Device, talk: &Talk) -> Result<(Config, Models, Arc<AtomicBool>)> {
    let mode = args.selector_only.then(|| "mode=selector".to_owned());
    let config = args.work.config(mode.into_iter().chain(args.models.setting()))?;
    let models = args.models.bring(&config, device, talk)?;
    Ok((config, models, stop_on_signal()?))
}

/// A failure for the other ranks; this one keeps its own.
fn retold(failure: &Failure) -> Error {
    Error::request(failure.to_string(), failure.hint().unwrap_or_default())
}

/// What was typed wrong, in a file or on the command line.
fn usage(error: Error) -> Failure {
    match error {
        Error::Request { what, hint } => Failure::usage(what, hint),
        other => other.into(),
    }
}

/// A flag that is raised by an interrupt or a request to terminate; a second one ends the program at once.
pub(crate) fn stop_on_signal() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // In this order: the first signal finds the flag down and raises it, the second finds it up.
        flag::register_conditional_shutdown(signal, 1, stop.clone())
            .and_then(|_| flag::register(signal, stop.clone()))
            .map_err(|e| Failure::other(format!("cannot listen to signals: {e}")))?;
    }
    Ok(stop)
}
