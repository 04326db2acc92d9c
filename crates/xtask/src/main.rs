//! Chores of this repository, run as `cargo run --release -p xtask -- COMMAND`.

mod cuda_toolkit;
mod docs;
mod measure;
mod random_model;
mod recipes;
mod tokenizer;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Chores of this repository.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write the generated tables of the documents anew.
    Docs {
        /// Only check that they are up to date.
        #[arg(long)]
        check: bool,
    },
    /// Write a full-size model with random weights as a bundle (lmm, sam, head) that `flmm --model` opens.
    RandomModel {
        /// Which model; its published sizes are used.
        #[arg(value_parser = recipes::names())]
        name: String,
        /// Folder of the bundle; up to 15 GB are written.
        #[arg(long)]
        out: PathBuf,
        /// Only so many decoder layers, of the published width: what a pass takes beside the weights, on a machine
        /// that is too small or too slow for the whole.
        #[arg(long)]
        layers: Option<usize>,
    },
    /// Make a CUDA compiler in `target/cuda` from PyPI's packages, and print what to export to build with it.
    CudaToolkit,
    /// Run a command and print its wall time, CPU time and peak memory (Linux).
    Measure {
        /// The command and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Docs { check } => docs::run(check),
        Command::RandomModel { name, out, layers } => random_model::write(&name, &out, layers),
        Command::CudaToolkit => cuda_toolkit::run(),
        Command::Measure { command } => measure::run(&command),
    }
}
