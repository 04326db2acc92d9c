//! `flmm bench`: how fast parts of the program are on this machine.

mod ground;
mod kernels;

use clap::{Args, Subcommand};
use flmm_train::bench::{StepConfig, StepTimes, train_step};
use serde_json::json;

use crate::args::DeviceArgs;
use crate::failure::Result;
use crate::talk::Talk;

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    what: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// Measure one training step of a grounding head: forward, backward, optimiser.
    TrainStep(TrainStepArgs),
    /// Measure matrix products and attention of frozen models, and what this machine can do at most.
    Kernels(kernels::KernelsArgs),
    /// Measure the grounding of a given text stage by stage, beside what this machine can do at most.
    Ground(Box<ground::GroundBenchArgs>),
}

#[derive(Debug, Args)]
struct TrainStepArgs {
    /// Attention maps per phrase: layers × heads of the LMM.
    #[arg(long, value_name = "N", default_value_t = StepConfig::default().channels as u32, value_parser = clap::value_parser!(u32).range(1..=65536))]
    channels: u32,
    /// Phrases of the picture.
    #[arg(long, value_name = "N", default_value_t = StepConfig::default().phrases as u32, value_parser = clap::value_parser!(u32).range(1..=1024))]
    phrases: u32,
    /// Width of the mask head's first stage.
    #[arg(long, value_name = "N", default_value_t = StepConfig::default().base_channels as u32, value_parser = clap::value_parser!(u32).range(1..=1024))]
    base_channels: u32,
    /// Leave SAM's decoder out.
    #[arg(long)]
    no_refiner: bool,
    /// Steps to measure.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Steps before that do not count.
    #[arg(long, value_name = "N", default_value_t = 1)]
    warmup: u32,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &BenchArgs, talk: &Talk) -> Result<()> {
    match &args.what {
        Bench::TrainStep(args) => step(args, talk),
        Bench::Kernels(args) => kernels::run(args, talk),
        Bench::Ground(args) => ground::run(args, talk),
    }
}

fn step(args: &TrainStepArgs, talk: &Talk) -> Result<()> {
    let config = StepConfig {
        channels: args.channels as usize,
        phrases: args.phrases as usize,
        base_channels: args.base_channels as usize,
        refiner: !args.no_refiner,
        ..StepConfig::default()
    };
    crate::memory::keep();
    let rounds = {
        let _spinner = talk.during("training steps");
        train_step(&config, &args.device.open()?, args.warmup as usize, args.rounds as usize, |round| {
            talk.detail(format!("{:.3} s", round.total()));
        })?
    };
    let median = StepTimes::median(&rounds);
    let speed = config.flops() / median.total() / 1e9;
    if args.json {
        let json =
            json!({ "config": config, "gflop": config.flops() / 1e9, "rounds": rounds, "median": median });
        return talk.print(&json.to_string());
    }
    let line = |name: &str, seconds: f64| format!("{name:<10}{:>9.1} ms\n", seconds * 1e3);
    talk.print(&format!(
        "{}{}{}{}{}{speed:.0} GFLOP/s ({:.1} GFLOP a step, median of {})",
        line("forward", median.forward),
        line("backward", median.backward),
        line("optimiser", median.optimizer),
        line("step", median.total()),
        line("processor", median.cpu),
        config.flops() / 1e9,
        rounds.len()
    ))
}
