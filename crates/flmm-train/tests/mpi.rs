//! Ranks that are processes, started by mpirun. Needs an MPI library: `cargo test --features mpi --test mpi`.
#![cfg(feature = "mpi")]

#[path = "common/small_head.rs"]
mod small_head;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use flmm_train::distributed::from_env;
use flmm_train::samples::from_fn;
use flmm_train::{RunOptions, Trainer};
use serde_json::json;

const FOLDER: &str = "FLMM_TEST_MPI";
const WHAT: &str = "FLMM_TEST_MPI_WHAT";

/// Not a test of its own: what mpirun starts.
#[test]
fn rank() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    let what = std::env::var(WHAT).unwrap_or_default();
    let ranks = from_env(&candle_core::Device::Cpu).unwrap();
    assert_eq!(ranks.world(), 2);
    let one = ranks.rank() == 1;
    let samples = from_fn(8, |index, epoch| match (what.as_str(), one, epoch, index) {
        ("error", _, 1, 3) => Err(flmm::Error::request("picture 3 has vanished", "look for it")),
        ("die", true, 1, _) => std::process::abort(),
        ("panic", true, 1, _) => panic!("a mistake in the program"),
        _ => Ok(small_head::sample(index)),
    });
    let (task, vars) = small_head::task(true);
    let config = small_head::train_config(3, 4);
    let mut trainer =
        Trainer::new(&task, vars, config, json!({}), RunOptions::new(Path::new(&folder))).unwrap();
    trainer = trainer.with_communicator(ranks.as_ref()).unwrap();
    if let Err(error) = trainer.run(&samples, |_| ControlFlow::Continue(())) {
        println!("rank ended: {error}");
        return;
    }
    if !one {
        let tensors = serde_json::to_vec(&small_head::tensors(&trainer)).unwrap();
        std::fs::write(Path::new(&folder).join("tensors.json"), tensors).unwrap();
    }
}

/// `None` where there is no mpirun.
fn start(folder: &Path, what: &str) -> Option<Output> {
    let started = Instant::now();
    let output = Command::new("mpirun")
        .args(["-n", "2", "--allow-run-as-root", "--oversubscribe"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "rank", "--nocapture"])
        .env(FOLDER, folder)
        .env(WHAT, what)
        .output();
    match output {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            println!("skipped: there is no mpirun");
            None
        }
        output => {
            assert!(started.elapsed() < Duration::from_secs(300), "it hung");
            Some(output.unwrap())
        }
    }
}

#[test]
fn two_processes_make_the_head_that_one_makes_with_the_whole_batch() {
    let dir = tempfile::tempdir().unwrap();
    let Some(output) = start(dir.path(), "") else { return };
    assert!(output.status.success(), "{output:?}");
    let text = std::fs::read(dir.path().join("tensors.json")).unwrap();
    let together: BTreeMap<String, Vec<f32>> = serde_json::from_slice(&text).unwrap();

    let (task, vars) = small_head::task(true);
    let alone = tempfile::tempdir().unwrap();
    let config = small_head::train_config(3, 4);
    let mut trainer = Trainer::new(&task, vars, config, json!({}), RunOptions::new(alone.path())).unwrap();
    let samples = from_fn(8, |index, _| Ok(small_head::sample(index)));
    trainer.run(&samples, |_| ControlFlow::Continue(())).unwrap();
    let tensors = small_head::tensors(&trainer);
    for (name, values) in tensors.iter().filter(|(name, _)| !small_head::has_no_gradient(name)) {
        for (a, b) in values.iter().zip(&together[name]) {
            assert!((a - b).abs() <= 2e-4 * a.abs().max(0.1), "{name}: {a} and {b}");
        }
    }
}

#[test]
fn an_error_reaches_every_process() {
    let dir = tempfile::tempdir().unwrap();
    let Some(output) = start(dir.path(), "error") else { return };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let ended: Vec<&str> = text.lines().filter(|line| line.contains("rank ended")).collect();
    assert_eq!(ended.len(), 2, "{text}");
    assert!(ended.iter().all(|line| line.contains("picture 3 has vanished")), "{text}");
}

#[test]
fn a_process_that_dies_or_panics_ends_the_others() {
    for what in ["die", "panic"] {
        let dir = tempfile::tempdir().unwrap();
        let Some(output) = start(dir.path(), what) else { return };
        assert!(!output.status.success());
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains("rank 1"), "{what}: {text}");
    }
}
