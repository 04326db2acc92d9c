//! `flmm bench kernels`: the products a frozen model is made of, beside what the machine can do at most.

use std::time::Instant;

use clap::Args;
use cpu_time::ProcessTime;
use flmm_kernels::{
    AttentionSizes, Heads, Int4Weight, Int8Weight, Scores, Sizes, attention_bf16, linear_bf16, peak,
};
use half::bf16;
use serde::Serialize;
use serde_json::json;

use crate::failure::Result;
use crate::talk::Talk;

#[derive(Debug, Args)]
pub(crate) struct KernelsArgs {
    /// Tokens of a prompt.
    #[arg(long, value_name = "N", default_value_t = 640, value_parser = clap::value_parser!(u32).range(1..=65536))]
    tokens: u32,
    /// Columns of the weight.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=65536))]
    inputs: u32,
    /// Rows of the weight.
    #[arg(long, value_name = "N", default_value_t = 11008, value_parser = clap::value_parser!(u32).range(1..=65536))]
    outputs: u32,
    /// Rounds to measure, in each of which everything has its turn.
    #[arg(long, value_name = "N", default_value_t = 11, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Turns of the loops that measure the machine, each some ten milliseconds.
const TURNS: usize = 1 << 21;
/// Heads of the attention that is measured, and their size.
const HEADS: usize = 32;
const HEAD_DIM: usize = 128;

pub(crate) fn run(args: &KernelsArgs, talk: &Talk) -> Result<()> {
    let mut cases = {
        let _spinner = talk.during("kernels");
        measure(args)
    };
    // The first round only warms up.
    cases.iter_mut().for_each(|case| {
        case.rounds.remove(0);
    });
    let results: Vec<Summary> = cases.iter().map(|case| Summary::of(case, &cases)).collect();
    let threads = rayon::current_num_threads();
    if args.json {
        let KernelsArgs { tokens, inputs, outputs, rounds, .. } = args;
        let sizes = json!({ "tokens": tokens, "inputs": inputs, "outputs": outputs, "rounds": rounds });
        return talk.print(&json!({ "threads": threads, "sizes": sizes, "cases": results }).to_string());
    }
    let mut table = format!(
        "{:<22}{:>10}{:>10}{:>12}{:>10}{:>11}\n",
        "", "median", "best", "cpu-second", "of peak", "bf16 / own"
    );
    for result in &results {
        let Summary { name, unit, median, best, per_cpu_second, of_peak, faster, .. } = result;
        let share = of_peak.map_or(String::new(), |share| format!("{:.0} %", share * 100.0));
        let faster = faster.map_or(String::new(), |faster| format!("{faster:.2}"));
        let figures = format!("{median:>10.1}{best:>10.1}{per_cpu_second:>12.1}{share:>10}{faster:>11}");
        table += &format!("{name:<22}{figures}  {unit}\n");
    }
    talk.print(&format!("{table}{threads} threads; of peak, and time in bf16 / own time: by processor time"))
}

/// Something that is measured.
struct Case {
    name: &'static str,
    /// What a second is measured in.
    unit: &'static str,
    /// Of one round, in that unit.
    work: f64,
    /// The cases that say what is possible: the first that the processor has.
    peaks: &'static [&'static str],
    /// Wall and processor seconds.
    rounds: Vec<(f64, f64)>,
}

/// Cases in turns, so that whatever else the machine does hits all.
fn measure(args: &KernelsArgs) -> Vec<Case> {
    let (tokens, inputs, outputs) = (args.tokens as usize, args.inputs as usize, args.outputs as usize);
    let (x, weight) = (numbers(tokens * inputs), numbers(outputs * inputs));
    let (int8, int4) = (Int8Weight::quantise(&weight, inputs), Int4Weight::quantise(&weight, inputs));
    let mut y = vec![bf16::ZERO; tokens * outputs];
    let sizes = AttentionSizes {
        batch: 1,
        heads: HEADS,
        kv_heads: HEADS,
        rows: tokens,
        keys: tokens,
        head_dim: HEAD_DIM,
    };
    let width = tokens * HEADS * HEAD_DIM;
    let (q, k, v) = (numbers(width), numbers(width), numbers(width));
    let (mut mixed, mut lse) = (vec![bf16::ZERO; width], vec![0f32; HEADS * tokens]);

    let mut cases: Vec<Case> = Vec::new();
    for _ in 0..=args.rounds {
        let mut time = |name, unit, peaks, work: &mut dyn FnMut() -> Option<f64>| {
            let (cpu, clock) = (ProcessTime::now(), Instant::now());
            let Some(work) = work() else { return };
            let times = (clock.elapsed().as_secs_f64(), cpu.elapsed().as_secs_f64());
            match cases.iter_mut().find(|case| case.name == name) {
                Some(case) => case.rounds.push(times),
                None => cases.push(Case { name, unit, work: work / 1e9, peaks, rounds: vec![times] }),
            }
        };
        let flops = (2 * tokens * inputs * outputs) as f64;
        time("peak f32", "GFLOP/s", &[], &mut || Some(peak::multiply_add_f32(TURNS)));
        time("peak bf16", "GFLOP/s", &[], &mut || peak::multiply_add_bf16(TURNS));
        time("peak int8", "GOP/s", &[], &mut || peak::multiply_add_int8(TURNS));
        time("peak read", "GB/s", &[], &mut || Some(peak::read(&weight)));
        let all = Sizes { rows: tokens, inputs, outputs };
        time("prompt bf16", "GFLOP/s", &["peak bf16", "peak f32"], &mut || {
            linear_bf16(&x, &weight, None, all, &mut y);
            Some(flops)
        });
        time("prompt int8", "GOP/s", &["peak int8", "peak f32"], &mut || {
            int8.multiply(&x, None, &mut y);
            Some(flops)
        });
        time("prompt int4", "GOP/s", &["peak int8", "peak f32"], &mut || {
            int4.multiply(&x, None, &mut y);
            Some(flops)
        });
        time("decode bf16", "GB/s", &["peak read"], &mut || {
            linear_bf16(&x[..inputs], &weight, None, Sizes { rows: 1, ..all }, &mut y[..outputs]);
            Some(size_of_val(&weight[..]) as f64)
        });
        time("decode int8", "GB/s", &["peak read"], &mut || {
            int8.multiply(&x[..inputs], None, &mut y[..outputs]);
            Some(int8.bytes() as f64)
        });
        time("decode int4", "GB/s", &["peak read"], &mut || {
            int4.multiply(&x[..inputs], None, &mut y[..outputs]);
            Some(int4.bytes() as f64)
        });
        time("causal attention bf16", "GFLOP/s", &["peak bf16", "peak f32"], &mut || {
            let heads = [&k, &v].map(|data| Heads { data, stride: tokens * HEAD_DIM });
            attention_bf16(&q, heads, sizes, Scores::Causal, &mut mixed, &mut lse);
            // Half of the scores are masked.
            Some((2 * tokens * tokens * HEADS * HEAD_DIM) as f64)
        });
    }
    cases
}

/// Numbers between −1 and 1 that repeat after a prime count.
fn numbers(count: usize) -> Vec<bf16> {
    (0..count).map(|i| bf16::from_f32((i % 8191) as f32 / 4095.0 - 1.0)).collect()
}

/// A case in figures.
#[derive(Debug, Serialize)]
struct Summary {
    name: &'static str,
    unit: &'static str,
    /// Of one round, in billions.
    work: f64,
    /// Per second of the median round.
    median: f64,
    /// Per second of the fastest and the slowest round.
    best: f64,
    worst: f64,
    /// Per processor second of the median round: what counts on a machine that others use too.
    per_cpu_second: f64,
    /// The part of what the machine can do, by processor time, in the median of the rounds.
    of_peak: Option<f64>,
    /// How many times the processor time of the same product in bf16 it needs less, in the median of the rounds.
    faster: Option<f64>,
}

impl Summary {
    fn of(case: &Case, cases: &[Case]) -> Self {
        let sorted = |values: Vec<f64>| {
            let mut values = values;
            values.sort_by(f64::total_cmp);
            values
        };
        let middle = |values: Vec<f64>| {
            let values = sorted(values);
            values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
        };
        let walls = sorted(case.rounds.iter().map(|round| round.0).collect());
        let named = |name: &str| cases.iter().find(|case| case.name == name);
        let peak = case.peaks.iter().find_map(|name| named(name));
        let narrow = ["int8", "int4"].into_iter().find_map(|narrow| case.name.strip_suffix(narrow));
        let plain = narrow.filter(|_| peak.is_some()).and_then(|kind| named(&format!("{kind}bf16")));
        let faster = plain.map(|plain| {
            middle(case.rounds.iter().zip(&plain.rounds).map(|(own, plain)| plain.1 / own.1).collect())
        });
        let of_peak = peak.map(|peak| {
            let rounds = case.rounds.iter().zip(&peak.rounds);
            middle(rounds.map(|(own, peak_round)| (case.work / own.1) / (peak.work / peak_round.1)).collect())
        });
        Self {
            name: case.name,
            unit: case.unit,
            work: case.work,
            median: case.work / middle(walls.clone()),
            best: case.work / walls.first().copied().unwrap_or(f64::NAN),
            worst: case.work / walls.last().copied().unwrap_or(f64::NAN),
            per_cpu_second: case.work / middle(case.rounds.iter().map(|round| round.1).collect()),
            of_peak,
            faster,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_is_measured_in_every_round() {
        let args = KernelsArgs { tokens: 9, inputs: 64, outputs: 32, rounds: 2, json: false };
        let cases = measure(&args);
        assert!(cases.iter().all(|case| case.rounds.len() == 3 && case.work > 0.0));
        let summary =
            |name| cases.iter().find(|case| case.name == name).map(|case| Summary::of(case, &cases));
        let decode = summary("decode bf16").unwrap();
        assert!(
            decode.of_peak.unwrap() > 0.0 && decode.best >= decode.median && decode.median >= decode.worst
        );
        assert_eq!(summary("peak read").unwrap().of_peak, None);
        assert!(summary("decode int4").unwrap().faster.is_some_and(|faster| faster > 0.0));
        assert!(decode.faster.is_none() && summary("peak int8").is_none_or(|peak| peak.faster.is_none()));
    }
}
