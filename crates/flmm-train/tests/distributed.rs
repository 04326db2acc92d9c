//! Data-parallel training: two ranks make the same head as one with the same batch, and none waits for ever.

#[path = "common/small_head.rs"]
mod small_head;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use flmm::{Error, Result};
use flmm_train::distributed::{Communicator, local};
use flmm_train::samples::from_fn;
use flmm_train::{HeadSample, RunOptions, Samples, Step, Trainer};
use serde_json::json;

const EPOCHS: u64 = 3;
const BATCH: usize = 4;

type Trained = (Vec<Step>, BTreeMap<String, Vec<f32>>);

/// One rank's run; it stops after `until` steps.
fn run(
    rank: &dyn Communicator,
    samples: &dyn Samples<HeadSample>,
    dir: &Path,
    until: u64,
) -> Result<Trained> {
    // Only rank 0's fresh tensors count: the others begin with different ones.
    let (task, vars) = small_head::task(true);
    if rank.rank() != 0 {
        for var in vars.values() {
            var.set(&(var.as_detached_tensor() + 1.0)?)?;
        }
    }
    let config = small_head::train_config(EPOCHS, BATCH);
    let mut trainer = Trainer::new(&task, vars, config, json!({}), RunOptions::new(dir))?;
    trainer = trainer.with_communicator(rank)?;
    let mut steps = Vec::new();
    trainer.run(samples, |step| {
        steps.push(step.clone());
        if step.step == until { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    Ok((steps, small_head::tensors(&trainer)))
}

/// All ranks in threads of this process.
fn together(world: usize, samples: &dyn Samples<HeadSample>, dir: &Path, until: u64) -> Vec<Result<Trained>> {
    std::thread::scope(|scope| {
        let ranks = local(world).into_iter().map(|rank| {
            let dir = if rank.rank() == 0 { dir.to_owned() } else { dir.join("never-written") };
            let thread = std::thread::Builder::new().stack_size(64 << 20);
            thread.spawn_scoped(scope, move || run(&rank, samples, &dir, until)).unwrap()
        });
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn assert_same(one: &Trained, other: &Trained, tolerance: f64) {
    assert_eq!(one.0.len(), other.0.len());
    for (a, b) in one.0.iter().zip(&other.0) {
        assert!((a.loss - b.loss).abs() <= tolerance * a.loss, "step {}: {} and {}", a.step, a.loss, b.loss);
        assert!((a.grad_norm - b.grad_norm).abs() <= tolerance * a.grad_norm);
    }
    for (name, values) in one.1.iter().filter(|(name, _)| !small_head::has_no_gradient(name)) {
        for (a, b) in values.iter().zip(&other.1[name]) {
            assert!(
                f64::from((a - b).abs()) <= tolerance * f64::from(a.abs()).max(0.1),
                "{name}: {a} and {b}"
            );
        }
    }
}

#[test]
fn ranks_make_the_head_that_one_makes_with_the_whole_batch() {
    let dir = tempfile::tempdir().unwrap();
    // Ten samples: the last batch wraps around. Some have a selector term, some have more phrases.
    let samples = from_fn(10, |index, _| {
        let mut sample = small_head::sample(index);
        sample.token_labels = sample.token_labels.filter(|_| index % 3 != 0);
        Ok(sample)
    });
    let alone = together(1, &samples, &dir.path().join("1"), u64::MAX).remove(0).unwrap();
    for world in [2, 4] {
        let folder = dir.path().join(world.to_string());
        let ranks: Vec<Trained> =
            together(world, &samples, &folder, u64::MAX).into_iter().map(Result::unwrap).collect();
        assert_same(&alone, &ranks[0], 2e-4);
        for rank in &ranks[1..] {
            assert_eq!(rank, &ranks[0], "all ranks have the same tensors");
        }
        assert!(!folder.join("never-written").exists(), "only rank 0 writes");
        let lines = |dir: &Path| std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap().lines().count();
        assert_eq!(lines(&folder), lines(&dir.path().join("1")));
    }
}

#[test]
fn a_run_of_several_ranks_is_resumed_by_all() {
    let dir = tempfile::tempdir().unwrap();
    let samples = from_fn(8, |index, _| Ok(small_head::sample(index)));
    let whole = together(2, &samples, &dir.path().join("whole"), u64::MAX).remove(0).unwrap();
    let cut = dir.path().join("cut");
    together(2, &samples, &cut, 3).into_iter().for_each(|rank| assert_eq!(rank.unwrap().0.len(), 3));
    let rest = together(2, &samples, &cut, u64::MAX).remove(0).unwrap();
    assert_eq!(rest.0[..], whole.0[3..]);
    assert_eq!(rest.1, whole.1);
}

#[test]
fn an_error_of_one_rank_ends_all_with_its_message() {
    let dir = tempfile::tempdir().unwrap();
    let samples = from_fn(8, |index, epoch| match (index, epoch) {
        (5, 1) => Err(Error::request("picture 5 has vanished", "look for it")),
        _ => Ok(small_head::sample(index)),
    });
    let messages: Vec<String> = together(2, &samples, dir.path(), u64::MAX)
        .into_iter()
        .map(|rank| rank.unwrap_err().to_string())
        .collect();
    assert!(messages.iter().all(|message| message.contains("picture 5 has vanished")), "{messages:?}");
    assert!(messages.iter().any(|message| message.starts_with("rank ")), "{messages:?}");
}

#[test]
fn a_batch_that_cannot_be_shared_out_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let samples = from_fn(8, |index, _| Ok(small_head::sample(index)));
    let error = together(3, &samples, dir.path(), 1).remove(0).unwrap_err();
    assert!(error.to_string().contains("a batch of 4 samples cannot be shared out to 3 ranks"), "{error}");
    assert!(error.hint().unwrap().contains("multiple of 3"));
}
