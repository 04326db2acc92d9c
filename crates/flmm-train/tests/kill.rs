//! Killed at any moment, out of disk space, damaged: a run loses at most the steps since its last checkpoint.
//!
//! The tests start this very program again to have something to kill.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use candle_core::{Device, Tensor, Var};
use flmm::Result;
use flmm_train::optim::Vars;
use flmm_train::{After, Losses, Metric, RunOptions, Step, Task, TrainConfig, Trainer, Watch};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

/// Where the child trains, and the milliseconds between its checkpoints.
const PLACE: &str = "FLMM_TEST_RUN";
const CHECKPOINT_MS: &str = "FLMM_TEST_CHECKPOINT_MS";
const EPOCHS: &str = "FLMM_TEST_EPOCHS";

/// Values of the trained tensor: large enough that a checkpoint takes a moment.
const SIZE: usize = 6000;
/// Kills.
const KILLS: usize = 60;

/// Draws a tensor to its targets.
struct Pull(Tensor);

impl Task for Pull {
    type Sample = Tensor;

    fn weights(&self, _: &Tensor) -> Vec<f64> {
        vec![1.0]
    }

    fn losses(&self, target: &Tensor) -> Result<Losses> {
        let loss = (&self.0 - target)?.sqr()?.mean_all()?;
        let value = f64::from(loss.to_scalar::<f32>()?);
        Ok(Losses { terms: vec![loss], metrics: vec![Metric { name: "distance", value, weight: 1.0 }] })
    }
}

fn samples() -> Vec<Tensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let mut sample = || (0..SIZE).map(|_| rng.random_range(-1.0..1.0f32)).collect::<Vec<_>>();
    (0..10).map(|_| Tensor::from_vec(sample(), SIZE, &Device::Cpu).unwrap()).collect()
}

/// Tells the parent what happens.
struct Tell;

impl Watch for Tell {
    fn begin(&mut self, step: u64, _: u64, _: u64) {
        tell(format_args!("begin {step}"));
    }

    fn after_step(&mut self, step: &Step) -> Result<After> {
        tell(format_args!("step {}", step.step));
        Ok(After::default())
    }

    fn line(&mut self, _: &Map<String, Value>) -> Result<()> {
        Ok(())
    }

    fn saved(&mut self, step: u64) {
        tell(format_args!("saved {step}"));
    }
}

fn tell(text: std::fmt::Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "> {text}").and_then(|()| out.flush());
}

/// Bits of the trained tensor.
fn run(dir: &Path, epochs: u64, checkpoint_every: Duration, watch: &mut dyn Watch) -> Result<Vec<u32>> {
    let var = Var::zeros(SIZE, candle_core::DType::F32, &Device::Cpu)?;
    let task = Pull(var.as_tensor().clone());
    let vars: Vars = BTreeMap::from([("w".to_owned(), var.clone())]);
    let config =
        TrainConfig { seed: 2, epochs, batch_size: 2, learning_rate: 1e-2, ..TrainConfig::default() };
    let options = RunOptions { checkpoint_every, keep: 2, log_every: 3, ..RunOptions::new(dir) };
    let mut trainer = Trainer::new(&task, vars, config, json!({"task": "pull"}), options)?;
    trainer.run_watched(&samples(), watch)?;
    Ok(var.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
}

/// The lines of the log without the time they took.
fn log(dir: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let line = |line: &str| {
        let mut line: Value = serde_json::from_str(line).unwrap();
        line.as_object_mut().unwrap().remove("seconds");
        line
    };
    text.lines().map(line).collect()
}

struct Silent;
impl Watch for Silent {}

/// Not a test by itself: what the others start and kill.
#[test]
fn child() {
    let Some(place) = std::env::var_os(PLACE) else { return };
    let number = |name: &str| std::env::var(name).unwrap().parse::<u64>().unwrap();
    let every = Duration::from_millis(number(CHECKPOINT_MS));
    if let Err(error) = run(Path::new(&place), number(EPOCHS), every, &mut Tell) {
        tell(format_args!("error {error}"));
    }
}

fn spawn(mut command: Command, dir: &Path, epochs: u64, checkpoint_ms: u64) -> Child {
    command.env(PLACE, dir).env(CHECKPOINT_MS, checkpoint_ms.to_string()).env(EPOCHS, epochs.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
}

fn myself() -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["child", "--exact", "--nocapture", "--test-threads=1"]);
    command
}

/// What a child told, as `(word, rest)`.
fn parsed(lines: impl IntoIterator<Item = String>) -> Vec<(String, String)> {
    let word = |line: String| {
        // The test harness may have written something in front of it.
        let (word, rest) = line.split_once("> ")?.1.split_once(' ')?;
        Some((word.to_owned(), rest.to_owned()))
    };
    lines.into_iter().filter_map(word).collect()
}

fn last(told: &[(String, String)], word: &str) -> Option<u64> {
    told.iter().rev().find(|(found, _)| found == word).and_then(|(_, rest)| rest.parse().ok())
}

#[test]
fn killed_sixty_times_it_ends_where_an_uninterrupted_run_does() {
    let (whole, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let epochs = 2000;
    let hour = Duration::from_secs(3600);
    let mut rng = ChaCha8Rng::seed_from_u64(rand::random());
    let (mut kills, mut saved, mut lives_with_steps, mut torn) = (0, 0, 0, 0);
    while kills < KILLS {
        let mut child = spawn(myself(), killed.path(), epochs, 0);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(|line| line.ok());
        // Most are killed after the run began, some while it is still being resumed.
        let mut told = Vec::new();
        if kills % 5 > 0 {
            told.extend(lines.by_ref().find(|line| line.contains("> begin")));
        }
        std::thread::sleep(Duration::from_micros(rng.random_range(500..150_000)));
        child.kill().unwrap();
        told.extend(lines);
        let told = parsed(told);
        child.wait().unwrap();
        kills += 1;
        if let Some(begin) = last(&told, "begin") {
            // What was said to be saved is there; the process may have been killed between saving and saying so.
            assert!((saved..=saved + 1).contains(&begin), "saved {saved}, begins after {begin}: {told:?}");
            saved = begin;
        }
        lives_with_steps += usize::from(last(&told, "step").is_some());
        saved = last(&told, "saved").unwrap_or(saved);
        let checkpoints = std::fs::read_dir(killed.path().join("checkpoints"));
        let unfinished = |name: &str| name.ends_with(".tmp");
        let names =
            checkpoints.into_iter().flatten().map(|e| e.unwrap().file_name().to_string_lossy().into_owned());
        torn += usize::from(names.into_iter().any(|name| unfinished(&name)));
    }
    println!(
        "{kills} kills, {lives_with_steps} after a step, {torn} while a checkpoint was written, {saved} steps saved"
    );
    assert!(lives_with_steps > KILLS / 3, "the machine is too slow for this test's delays");
    assert!(saved < epochs * 5, "the run ended before it was killed often enough");
    let resumed = run(killed.path(), epochs, hour, &mut Silent).unwrap();
    let expected = run(whole.path(), epochs, hour, &mut Silent).unwrap();
    assert!(resumed == expected, "the resumed run differs from the uninterrupted one");
    assert_eq!(log(killed.path()), log(whole.path()));
    let left = std::fs::read_dir(killed.path().join("checkpoints")).unwrap();
    assert!(
        left.map(|entry| entry.unwrap().file_name()).all(|name| name.to_string_lossy().starts_with("step-"))
    );
}

/// The process may write files of 8 blocks at most, and is told so by an error instead of a signal.
#[cfg(unix)]
#[test]
fn a_full_disk_ends_the_run_with_a_message_and_loses_nothing() {
    let (whole, full) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (epochs, hour) = (4, Duration::from_secs(3600));
    // A few steps with room, as a run that was stopped.
    struct StopAt(u64);
    impl Watch for StopAt {
        fn after_step(&mut self, step: &Step) -> Result<After> {
            Ok(After { stop: step.step == self.0, values: Vec::new() })
        }
    }
    run(full.path(), epochs, hour, &mut StopAt(7)).unwrap();
    let checkpoint = full.path().join("checkpoints/step-0000007/head.safetensors");
    let before = std::fs::read(&checkpoint).unwrap();

    let mut shell = Command::new("sh");
    let script = r#"trap '' XFSZ; ulimit -f 8; exec "$0" "$@""#;
    shell.args(["-c", script]).arg(std::env::current_exe().unwrap());
    shell.args(["child", "--exact", "--nocapture", "--test-threads=1"]);
    let mut child = spawn(shell, full.path(), epochs, 0);
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let told = parsed(lines.map_while(|line| line.ok()));
    child.wait().unwrap();
    let error = told.iter().find(|(word, _)| word == "error").unwrap_or_else(|| panic!("{told:?}"));
    assert!(error.1.contains("head.safetensors") && error.1.contains("File too large"), "{error:?}");
    assert_eq!(std::fs::read(&checkpoint).unwrap(), before);
    let left: Vec<_> =
        std::fs::read_dir(full.path().join("checkpoints")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["step-0000007"], "nothing half-written is left");

    let resumed = run(full.path(), epochs, hour, &mut Silent).unwrap();
    assert!(resumed == run(whole.path(), epochs, hour, &mut Silent).unwrap());
    assert_eq!(log(full.path()), log(whole.path()));
}
