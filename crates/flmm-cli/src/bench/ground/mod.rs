//! `flmm bench ground`: grounding a given text, stage by stage, beside what the machine can do at most.

mod memory;
mod pass;
mod report;
mod work;

use std::path::PathBuf;

use clap::Args;
use flmm::grounder::{Caption, GroundOptions};
use flmm::phrases::{PhraseChoice, find_phrases, noun_phrases};

use crate::args::ModelArgs;
use crate::failure::{Failure, Result};
use crate::talk::Talk;
use crate::{model, picture};
use pass::{Pass, Question, Times, Watch};
use work::Machine;

#[derive(Debug, Args)]
pub(crate) struct GroundBenchArgs {
    /// The picture.
    image: PathBuf,
    /// The text, read as if the model had said it.
    #[arg(long)]
    text: String,
    /// Part of the text to ground, may be repeated; without it, the noun phrases of the text.
    #[arg(long, value_name = "SUBSTRING")]
    phrase: Vec<String>,
    /// Rounds to measure, in each of which everything has its turn.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Rounds before that do not count.
    #[arg(long, value_name = "N", default_value_t = 1)]
    warmup: u32,
    /// Tokens to generate behind the text; 0 leaves generating out.
    #[arg(long, value_name = "N", default_value_t = 16)]
    decode: u32,
    /// Only the pass: reading without keeping attention rows is left out.
    #[arg(long)]
    pass_only: bool,
    #[command(flatten)]
    model: ModelArgs,
    /// Print JSON, with the tokens that were read and the masks.
    #[arg(long)]
    json: bool,
}

/// What was measured.
#[derive(Default)]
struct Rounds {
    machine: Vec<Machine>,
    /// Of every stage.
    stages: Vec<Vec<Times>>,
    /// All stages, one after the other, as [`flmm::Grounder::ground`] takes them.
    whole: Vec<Times>,
    /// Reading the text without and with attention rows kept.
    captured: Vec<(Times, Times)>,
    /// Generating all tokens.
    decode: Vec<Times>,
    generated: Vec<u32>,
    opening_peak: Option<u64>,
    peak: Option<u64>,
}

pub(crate) fn run(args: &GroundBenchArgs, talk: &Talk) -> Result<()> {
    let choice = match crate::ground::choice(&args.text, &args.phrase)? {
        PhraseChoice::Keywords => PhraseChoice::NounPhrases,
        given => given,
    };
    let ranges = match &choice {
        PhraseChoice::Given(phrases) => find_phrases(&args.text, phrases)?,
        _ => noun_phrases(&args.text),
    };
    let image = picture::read(&args.image)?;
    if ranges.is_empty() {
        return Err(Failure::usage("no noun phrase was found in the text", "name phrases with --phrase"));
    }
    let model = model::open(&args.model, talk)?;
    let mut rounds = Rounds { opening_peak: memory::peak(), ..Rounds::default() };
    let grounder = &model.grounder;
    let caption = Caption::from_ranges(grounder.lmm().tokenizer(), &args.text, &ranges)?;
    let question = Question { grounder, picture: &image, caption };

    let spinner = talk.during("grounding");
    let mut last = None;
    for number in 0..args.warmup + args.rounds {
        let counts = number >= args.warmup;
        let machine = Machine::measure(&Machine::data());
        let (pass, state) = question.pass()?;
        if !args.pass_only {
            // Who comes first takes turns.
            let first = question.prefill(&pass.read, &state, number % 2 == 0)?;
            let second = question.prefill(&pass.read, &state, number % 2 == 1)?;
            if counts {
                rounds.captured.push(if number % 2 == 0 { (second, first) } else { (first, second) });
            }
        }
        if args.decode > 0 {
            let (ids, times) = question.continue_greedily(state, args.decode as usize)?;
            rounds.generated = ids;
            if counts {
                rounds.decode.push(times);
            }
        } else {
            drop(state);
        }
        // What was read above is gone, and so is the machine's data.
        let since_opening = memory::reset();
        let mut watch = Watch::start(grounder.lmm().decoder().device());
        grounder.ground(&image, &args.text, &choice, &GroundOptions::default())?;
        let whole = watch.lap()?;
        rounds.peak = memory::peak().filter(|_| since_opening).max(rounds.peak);
        if counts {
            talk.detail(format_args!("{:.3} s", whole.wall));
            rounds.machine.push(machine);
            rounds.stages.push(pass.stages.clone());
            rounds.whole.push(whole);
        }
        last = Some(pass);
    }
    drop(spinner);
    let Some(pass) = last else { return Ok(()) };
    talk.print(&report::of(args, &model, &rounds, &pass)?)
}

/// The middle of `values`, the upper one of two.
fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Median, least and most wall seconds and median processor seconds.
#[derive(Debug, Clone, Copy, serde::Serialize)]
struct Spread {
    median: f64,
    best: f64,
    worst: f64,
    cpu: f64,
}

impl Spread {
    fn of(times: &[Times]) -> Self {
        let walls: Vec<f64> = times.iter().map(|times| times.wall).collect();
        Self {
            median: median(&walls),
            best: walls.iter().copied().fold(f64::INFINITY, f64::min),
            worst: walls.iter().copied().fold(0.0, f64::max),
            cpu: median(&times.iter().map(|times| times.cpu).collect::<Vec<_>>()),
        }
    }
}
