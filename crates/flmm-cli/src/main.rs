//! `flmm`: ask about a picture and get an answer whose words carry masks.
//!
//! Results go to standard output, everything else to standard error. Exit status: 0 done, 1 failed, 2 wrong usage.

mod args;
mod bench;
mod chat;
mod convert;
mod credits;
mod data;
mod embedded;
mod eval;
mod failure;
mod features;
mod fetch;
mod ground;
mod inspect;
mod memory;
mod model;
mod picture;
mod report;
mod serve;
mod talk;
mod train;
mod world;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use args::{Cli, Command};
use failure::{Failure, Result};
use talk::Talk;

fn main() -> ExitCode {
    memory::set_up();
    let cli = Cli::parse();
    let talk = Talk::new(cli.global.quiet, cli.global.verbose);
    match run(&cli, &talk) {
        Ok(()) | Err(Failure::ReaderGone) => ExitCode::SUCCESS,
        Err(failure) => {
            talk.failure(&failure);
            ExitCode::from(failure.exit_status())
        }
    }
}

fn run(cli: &Cli, talk: &Talk) -> Result<()> {
    if let Some(threads) = cli.global.threads {
        // Before anything computes: the pool cannot be changed later.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build_global()
            .map_err(|e| Failure::usage(format!("cannot start {threads} threads: {e}"), "give fewer"))?;
    }
    match &cli.command {
        Command::Chat(args) => chat::run(args, talk),
        Command::Ground(args) => ground::run(args, talk),
        Command::Serve(args) => serve::run(args, talk),
        Command::Train(args) => train::run(args, talk),
        Command::Data(args) => data::run(args, talk),
        Command::Eval(args) => eval::run(args, talk),
        Command::World(args) => world::run(args, talk),
        Command::Inspect(args) => inspect::run(&args.what, talk),
        Command::Convert(args) => convert::run(&args.what, talk),
        Command::Features(args) => features::run(args, talk),
        Command::Bench(args) => bench::run(args, talk),
        Command::Credits => talk.print(&credits::text()),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "flmm", &mut script);
            talk.print(&String::from_utf8_lossy(&script))
        }
    }
}
