//! What was measured, as a table and as JSON.

use serde_json::{Value, json};

use super::pass::STAGES;
use super::work::{self, Machine, Work};
use super::{GroundBenchArgs, Pass, Rounds, Spread, median};
use crate::failure::Result;
use crate::model::Model;

/// A line of the table.
struct Line {
    name: &'static str,
    spread: Spread,
    work: Option<Work>,
    /// Processor seconds.
    floor: Option<f64>,
}

pub(super) fn of(args: &GroundBenchArgs, model: &Model, rounds: &Rounds, pass: &Pass) -> Result<String> {
    let machine = Machine::median(&rounds.machine);
    let (works, token) = work::of(model, &args.model, pass)?;
    // What was measured of the machine is its processor.
    let on_processor = model.grounder.lmm().decoder().device().is_cpu();
    let floor = |work: &Work| on_processor.then(|| machine.floor(work));
    let mut lines: Vec<Line> = STAGES
        .into_iter()
        .zip(works)
        .enumerate()
        .map(|(stage, (name, work))| {
            let times: Vec<_> = rounds.stages.iter().map(|stages| stages[stage]).collect();
            let floor = work.as_ref().and_then(floor);
            Line { name, spread: Spread::of(&times), work, floor }
        })
        .collect();
    let least = on_processor.then(|| lines.iter().filter_map(|line| line.floor).sum());
    lines.push(Line { name: "whole", spread: Spread::of(&rounds.whole), work: None, floor: least });
    if !rounds.decode.is_empty() {
        let all = Spread::of(&rounds.decode);
        let each = |seconds: f64| seconds / f64::from(args.decode);
        let spread = Spread {
            median: each(all.median),
            best: each(all.best),
            worst: each(all.worst),
            cpu: each(all.cpu),
        };
        let floor = floor(&token);
        lines.push(Line { name: "one more token", spread, work: Some(token), floor });
    }
    match args.json {
        true => as_json(args, model, rounds, pass, machine, &lines),
        false => Ok(as_table(rounds, pass, machine, &lines)),
    }
}

/// How much longer reading takes when attention rows are kept, in the median of the rounds: by the clock, and by processor
/// time.
fn capture_cost(rounds: &Rounds) -> Option<(f64, f64)> {
    let cost = |part: fn(&super::Times) -> f64| {
        let ratios = rounds.captured.iter().map(|(off, on)| part(on) / part(off) - 1.0);
        median(&ratios.collect::<Vec<_>>())
    };
    (!rounds.captured.is_empty()).then(|| (cost(|times| times.wall), cost(|times| times.cpu)))
}

fn as_table(rounds: &Rounds, pass: &Pass, machine: Machine, lines: &[Line]) -> String {
    let head = ["median", "best", "worst", "processor", "GFLOP/s", "GB/s", "floor", "of floor"];
    let mut text = format!("{:<15}", "");
    head.iter().for_each(|name| text += &format!("{name:>11}"));
    text += "\n";
    for Line { name, spread, work, floor } in lines {
        text += &format!("{name:<15}");
        for seconds in [spread.median, spread.best, spread.worst, spread.cpu] {
            text += &format!("{:>8.1} ms", 1e3 * seconds);
        }
        let rate = |amount: Option<f64>| match amount.filter(|amount| *amount > 0.0) {
            Some(amount) => format!("{:>11.1}", amount / spread.cpu / 1e9),
            None => format!("{:>11}", ""),
        };
        text += &rate(work.map(|work| work.flops));
        text += &rate(work.map(|work| work.bytes));
        if let Some(floor) = floor {
            text += &format!("{:>8.1} ms{:>9.0} %", 1e3 * floor, 100.0 * floor / spread.cpu);
        }
        text.truncate(text.trim_end().len());
        text += "\n";
    }
    let tokens = pass.read.ids.len();
    let seconds = |name| lines.iter().find(|line| line.name == name).map(|line| line.spread.median);
    if let (Some(prefill), Some(whole)) = (seconds("prefill"), seconds("whole")) {
        let (prefill, whole) = (tokens as f64 / prefill, tokens as f64 / whole);
        text += &format!("{tokens} tokens: prefill {prefill:.1} tokens/s, the whole {whole:.1} tokens/s");
    }
    if let Some(each) = seconds("one more token") {
        text += &format!(", then {:.1} tokens/s", 1.0 / each);
    }
    if let Some((wall, cpu)) = capture_cost(rounds) {
        let (wall, cpu) = (100.0 * wall, 100.0 * cpu);
        text +=
            &format!("\nkeeping attention rows: {wall:+.1} % of the prefill, by processor time {cpu:+.1} %");
    }
    let kept = pass.read.captured as f64;
    text += &format!("\nkept of the rows of the text: {:.1} MiB", kept / 2f64.powi(20));
    if let Some(prefill) = lines.iter().find(|line| line.name == "prefill").and_then(|line| line.work) {
        text += &format!(", {:.2} % of the decoder's weights", 100.0 * kept / prefill.bytes);
    }
    let gib = |bytes: Option<u64>| {
        bytes.map_or("unknown".into(), |b| format!("{:.2} GiB", b as f64 / 2f64.powi(30)))
    };
    text += &format!("\npeak memory: opening {}, grounding {}", gib(rounds.opening_peak), gib(rounds.peak));
    let maybe = |rate: Option<f64>| rate.map_or("–".into(), |rate| format!("{rate:.0}"));
    text + &format!(
        "\nthe machine per processor second: f32 / bf16 / int8 {:.0} / {} / {} GFLOP/s, reading {:.1} GB/s\n{} threads; \
         median of {} rounds; rates and floor by processor time; SAM looks at the picture after the LMM",
        machine.f32,
        maybe(machine.bf16),
        maybe(machine.int8),
        machine.read,
        rayon::current_num_threads(),
        rounds.whole.len()
    )
}

fn as_json(
    args: &GroundBenchArgs,
    model: &Model,
    rounds: &Rounds,
    pass: &Pass,
    machine: Machine,
    lines: &[Line],
) -> Result<String> {
    let stages = lines.iter().map(|Line { name, spread, work, floor }| {
        json!({ "name": name, "seconds": spread, "gflop": work.map(|work| work.flops / 1e9),
                "gb": work.map(|work| work.bytes / 1e9), "floor": floor })
    });
    let stages: Vec<Value> = stages.collect();
    let masks = pass.masks.iter().map(|(refined, coarse)| {
        Ok::<_, flmm::Error>(json!({ "refined": refined.to_coco()?, "coarse": coarse.to_coco()? }))
    });
    let masks = masks.collect::<flmm::Result<Vec<Value>>>()?;
    let capture = capture_cost(rounds).map(|(wall, cpu)| json!({ "wall": wall, "cpu": cpu }));
    let read = &pass.read;
    let (rows, columns) = read.image.size();
    let json = json!({
        "model": model.name,
        "threads": rayon::current_num_threads(),
        "machine": machine,
        "stages": stages,
        "rounds": { "stages": rounds.stages, "whole": rounds.whole, "captured": rounds.captured,
                    "decode": rounds.decode },
        "capture_cost": capture,
        "captured_bytes": read.captured,
        "peak_memory": { "opening": rounds.opening_peak, "grounding": rounds.peak },
        "read": { "token_ids": read.ids, "caption_start": read.caption_start,
                  "image_start": read.image.start, "image_tokens": read.image.tokens, "grid": [rows, columns],
                  "phrases": pass.observation.phrases, "geometry": pass.observation.geometry,
                  "sam_geometry": pass.observation.sam_geometry },
        "generated": rounds.generated,
        "masks": masks,
        "sizes": { "rounds": args.rounds, "warmup": args.warmup, "decode": args.decode },
    });
    Ok(json.to_string())
}
