//! Makes flmm-tiny, the model embedded in `flmm`: a recipe of phases, or single stages, resumable by running them again.

mod ablations;
mod alignment;
mod block;
mod bundle;
mod config;
mod decoder;
mod evaluate;
mod gates;
mod grow;
mod lmm;
mod make;
mod measure;
mod objects;
mod pack;
mod parallel;
#[cfg(test)]
mod parity;
mod precision;
mod progress;
mod recipe;
mod stage_head;
mod stage_lmm;
mod stage_sam;
mod stage_tower;
mod store;
mod symbolic;
mod text;
mod tower;
mod workshop;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use flmm_data::world::{Level, WorldConfig};

use config::LmmSizes;
use recipe::Recipe;
use workshop::{Stage, Workshop};

// Training allocates and frees the same large buffers at every step; the system allocator gives each back to the
// kernel and takes it again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Seed of everything that is fixed before training: code book and initial tensors.
const MODEL_SEED: u64 = 20;

/// Makes flmm-tiny. Run it with `RAYON_NUM_THREADS=1`; everything resumes where it stopped.
#[derive(Parser)]
struct Cli {
    /// Folder of the run: one sub-folder per phase or stage.
    #[arg(long, default_value = "runs/flmm-tiny", global = true)]
    out: PathBuf,
    /// Folder of the bundle that is written and read; `bundle` in the run's folder unless given.
    #[arg(long, global = true)]
    bundle: Option<PathBuf>,
    /// Level of the world, for single stages: a recipe has its own.
    #[arg(long, default_value_t = 1, global = true, value_parser = clap::value_parser!(u8).range(1..=2))]
    level: u8,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Carry out a recipe: every phase that is not finished, in order, until a gate is missed.
    Make {
        /// The recipe, a TOML file.
        recipe: PathBuf,
    },
    /// Measure what fewer bits cost the bundle, on unseen scenes.
    Precision(precision::PrecisionArgs),
    #[command(flatten)]
    Stage(Box<Stage>),
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    std::fs::create_dir_all(&cli.out).with_context(|| format!("cannot create {}", cli.out.display()))?;
    let level = if cli.level == 1 { Level::One } else { Level::Two };
    match &cli.command {
        Command::Make { recipe } => {
            let recipe = Recipe::read(recipe, &cli.out)?;
            let workshop = Workshop::open(&cli.out, cli.bundle, recipe.level, recipe.sizes)?;
            make::make(&recipe.phases, &cli.out, |phase, folder| workshop.run(&phase.stage, folder))
        }
        Command::Precision(args) => {
            let bundle = cli.bundle.unwrap_or_else(|| cli.out.join("bundle"));
            let figures = precision::run(args, &bundle, &WorldConfig::new(level))?;
            println!("{}", serde_json::to_string_pretty(&figures)?);
            Ok(())
        }
        Command::Stage(stage) => {
            let sizes = LmmSizes::default();
            let workshop = match (stage.as_ref(), &cli.bundle) {
                (Stage::Evaluate(_), Some(bundle)) => Workshop::of_bundle(&cli.out, bundle, level, sizes)?,
                _ => Workshop::open(&cli.out, cli.bundle, level, sizes)?,
            };
            workshop.run(stage, &cli.out.join(stage.name()))
        }
    }
}
