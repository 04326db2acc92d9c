//! How fast predictions are scored: 10,000 masks of 640 × 480, from lines of JSON to cIoU, and from pixels.
//!
//! `cargo run --release -p flmm-eval --example bench_score` prints medians of five on one thread. The masks are ellipses
//! with ragged borders, a run per column, as most of COCO's objects have.

use std::time::{Duration, Instant};

use flmm_eval::runs::{Overlap, Runs};
use flmm_eval::{Phrase, Prediction, res};

const MASKS: u32 = 10_000;
const HEIGHT: u32 = 480;
const WIDTH: u32 = 640;
/// Masks that are different; the others repeat them.
const KINDS: u32 = 200;
const ROUNDS: usize = 5;

/// An ellipse around a place that depends on `number`, its border ragged.
fn mask(number: u32, shift: i64) -> Runs {
    let (cx, cy) = (i64::from(100 + number * 37 % 440) + shift, i64::from(80 + number * 53 % 320));
    let (rx, ry) = (i64::from(40 + number * 29 % 160), i64::from(30 + number * 31 % 120));
    Runs::from_fn(HEIGHT, WIDTH, |x, y| {
        let (dx, dy) = (i64::from(x) - cx, i64::from(y) - cy);
        let ragged = i64::from((x * 2_654_435 + number) % 97) - 48;
        dx * dx * ry * ry + dy * dy * rx * rx < rx * rx * ry * ry * (1000 + 2 * ragged) / 1000
    })
}

fn median(what: &str, mut act: impl FnMut() -> f64) {
    let mut times: Vec<(Duration, f64)> = (0..ROUNDS)
        .map(|_| {
            let clock = Instant::now();
            let result = act();
            (clock.elapsed(), result)
        })
        .collect();
    times.sort_by_key(|(time, _)| *time);
    let (time, result) = times[ROUNDS / 2];
    println!("{what}: {:.3} s ({result:.3})", time.as_secs_f64());
}

fn main() -> flmm::Result<()> {
    let truth: Vec<Runs> = (0..KINDS).map(|number| mask(number, 0)).collect();
    let line = |number: u32| {
        let segmentation = Some(mask(number, 5).to_coco());
        let phrases = vec![Phrase { segmentation, ..Phrase::default() }];
        let prediction = Prediction { id: number.to_string(), phrases, ..Prediction::default() };
        serde_json::to_vec(&prediction).map_err(|error| flmm::Error::request(error.to_string(), "a bug"))
    };
    let lines: Vec<Vec<u8>> = (0..KINDS).map(line).collect::<flmm::Result<_>>()?;
    let bytes = lines.iter().map(Vec::len).sum::<usize>() / lines.len();
    println!("{MASKS} masks of {WIDTH} x {HEIGHT}, {bytes} bytes of JSON each");
    median("JSON lines to cIoU", || {
        let overlaps = (0..MASKS).map(|at| -> flmm::Result<Overlap> {
            let at = (at % KINDS) as usize;
            let prediction: Prediction = serde_json::from_slice(&lines[at])
                .map_err(|error| flmm::Error::request(error.to_string(), "a bug"))?;
            prediction.masks(1, [HEIGHT, WIDTH])?[0].overlap(&truth[at])
        });
        let overlaps: Vec<Overlap> = overlaps.filter_map(Result::ok).collect();
        res::metrics(overlaps.into_iter()).metrics.get("cIoU").unwrap_or_default()
    });
    median("overlaps of run lengths alone", || {
        let overlaps = (0..MASKS).filter_map(|at| {
            let at = (at % KINDS) as usize;
            truth[at].overlap(&truth[(at * 7 + 1) % truth.len()]).ok()
        });
        res::metrics(overlaps).metrics.get("cIoU").unwrap_or_default()
    });
    Ok(())
}
