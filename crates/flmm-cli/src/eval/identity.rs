//! `flmm eval identity`: answers are the same with grounding on and off.

use std::path::PathBuf;

use clap::Args;
use flmm::grounder::Sampling;
use flmm_data::qa::Benchmark;
use flmm_eval::identity::{Compared, compare};
use flmm_eval::qa::QaSamples;
use flmm_eval::{Samples, Settings};

use super::tasks;
use crate::args::{ModelArgs, count, temperature};
use crate::failure::{Failure, Result};
use crate::model;
use crate::talk::Talk;

#[derive(Debug, Args)]
pub(crate) struct IdentityArgs {
    /// Question-answering tasks, separated by commas: mme, mmbench, mmvet, llavabench, pope, gqa, vqav2, ai2d.
    #[arg(long, value_name = "NAMES", value_delimiter = ',', required = true, value_parser = benchmark)]
    task: Vec<Benchmark>,
    /// Data root, laid out as `flmm eval tasks` lists it.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Only the first N questions of each task.
    #[arg(long, value_name = "N", value_parser = count)]
    limit: Option<usize>,
    /// Temperature of the sampled answers; greedy ones are compared too.
    #[arg(long, value_name = "T", default_value_t = 0.7, value_parser = temperature)]
    temperature: f64,
    /// Seed of the sampled answers.
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    model: ModelArgs,
}

fn benchmark(name: &str) -> Result<Benchmark, String> {
    let known = || Benchmark::ALL.map(Benchmark::name).join(", ");
    let found = Benchmark::ALL.into_iter().find(|benchmark| benchmark.name() == name);
    found.ok_or_else(|| format!("expected one of {}", known()))
}

pub(crate) fn run(args: &IdentityArgs, talk: &Talk) -> Result<()> {
    let settings = Settings { data: args.data.clone(), ..Settings::default() };
    let names: Vec<String> = args.task.iter().map(|benchmark| benchmark.name().to_owned()).collect();
    tasks(&names, &settings, true)?;
    let model = model::open(&args.model, talk)?;
    let mut sampling = vec![Sampling::Greedy];
    if args.temperature > 0.0 {
        sampling.push(Sampling::Seeded { temperature: args.temperature, top_p: 1.0, seed: args.seed });
    }
    for &benchmark in &args.task {
        let spinner = talk.during("reading the data");
        let samples = QaSamples::open(benchmark, &settings)?;
        drop(spinner);
        let total = args.limit.unwrap_or(usize::MAX).min(samples.ids().len());
        let bar = talk.bar(total as u64);
        let mut compared = Compared::default();
        for index in 0..total {
            let difference = compare(&samples, index, &model.grounder, &sampling, &mut compared);
            if let Some(difference) = difference? {
                bar.finish_and_clear();
                let kind = match difference.sampling {
                    Sampling::Greedy => "greedy".to_owned(),
                    Sampling::Seeded { temperature, seed, .. } => {
                        format!("temperature {temperature}, seed {seed}")
                    }
                };
                return Err(Failure::other(format!(
                    "{}, sample {}, {kind}: the answers differ from token {} on\n  question: {:?}\n  without grounding: \
                     {:?}\n  with grounding: {:?}",
                    benchmark.name(),
                    difference.id,
                    difference.token,
                    difference.prompt,
                    difference.plain,
                    difference.grounded,
                )));
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        talk.print(&format!(
            "{}: {} answers to {total} questions are identical with grounding on and off ({} phrases were grounded)",
            benchmark.name(),
            compared.answers,
            compared.phrases
        ))?;
    }
    Ok(())
}
