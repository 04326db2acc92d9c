//! `flmm features`: a feature cache, built without training; and how `flmm train` is told of one.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use clap::{Args, ValueEnum};
use flmm::Error;
use flmm_data::Part;
use flmm_train::Watch;
use flmm_train::cache::{MapValues, Values};
use flmm_train::features::{FeatureOptions, build_features};
use indicatif::ProgressBar;

use crate::failure::{Failure, Result};
use crate::talk::Talk;
use crate::train::{ModelsArgs, WorkArgs, stop_on_signal};

#[derive(Debug, Args)]
pub(crate) struct FeaturesArgs {
    #[command(flatten)]
    work: WorkArgs,
    /// Folder of the cache, new, or of one that goes on.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Make part I of N only, so that several machines share the work.
    #[arg(long, value_name = "I/N", default_value = "1/1", hide_default_value = true)]
    shard: Part,
    #[command(flatten)]
    stored: StoredArgs,
    #[command(flatten)]
    models: ModelsArgs,
}

/// How numbers are stored in a cache.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct StoredArgs {
    /// Numbers of a feature cache; f32 changes no bit of the training.
    #[arg(long, value_name = "TYPE", value_enum, default_value_t)]
    feature_type: StoredType,
    /// Store attention maps in one byte per value.
    #[arg(long)]
    feature_maps_int8: bool,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum StoredType {
    F32,
    #[default]
    F16,
    Bf16,
}

impl StoredArgs {
    /// The cache in `dir`.
    pub(crate) fn options(self, dir: PathBuf) -> FeatureOptions {
        let values = match self.feature_type {
            StoredType::F32 => Values::F32,
            StoredType::F16 => Values::F16,
            StoredType::Bf16 => Values::Bf16,
        };
        let maps = if self.feature_maps_int8 { MapValues::Int8 } else { MapValues::Same };
        FeatureOptions { dir, values, maps }
    }
}

pub(crate) fn run(args: &FeaturesArgs, talk: &Talk) -> Result<()> {
    let config = args.work.config(args.models.setting())?;
    let models = args.models.bring(&config, &args.models.device()?, talk)?;
    let options = args.stored.options(args.out.clone());
    let stop = stop_on_signal()?;
    let bar = talk.bar(0);
    let on_sample = |done: usize, of: usize| {
        bar.set_length(of as u64);
        bar.set_position(done as u64);
        if stop.load(Ordering::SeqCst) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let mut told = Told { talk, bar: &bar };
    let built = build_features(&config, &models, &args.work.data, &options, args.shard, &mut told, on_sample);
    bar.finish_and_clear();
    let built = built?;
    if built.broken > 0 {
        talk.note(format_args!("{} samples could not be made; `flmm data check` tells why", built.broken));
    }
    match built.complete {
        true => talk.print(&format!("{} samples added to {}", built.added, args.out.display())),
        false => Err(Failure::Library(Error::request(
            format!("stopped; {} samples were added and stay", built.added),
            "give the same command again to go on",
        ))),
    }
}

/// Notes above the bar.
struct Told<'a> {
    talk: &'a Talk,
    bar: &'a ProgressBar,
}

impl Watch for Told<'_> {
    fn note(&mut self, text: &str) {
        self.bar.suspend(|| self.talk.note(text));
    }
}
