//! The training loop on a small mask head: it learns, it resumes exactly, workers change nothing.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use flmm::Result;
use flmm::mask_head::{UNet, UNetConfig};
use flmm::weights::Params;
use flmm_train::losses::{bce, dice, stats};
use flmm_train::optim::{Vars, global_norm, gradients};
use flmm_train::samples::Order;
use flmm_train::{Losses, Metric, Precision, RunOptions, Step, Task, TrainConfig, Trainer};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

const CONFIG: UNetConfig = UNetConfig { in_channels: 2, base_channels: 4, input_size: 16 };

/// Attention maps `[N, 2, 8, 8]` and masks `[N, 16, 16]`.
#[derive(Clone)]
struct Sample {
    maps: Tensor,
    masks: Tensor,
}

struct MaskHead(UNet);

impl Task for MaskHead {
    type Sample = Sample;

    fn weights(&self, sample: &Sample) -> Vec<f64> {
        vec![sample.masks.dims()[0] as f64]
    }

    fn losses(&self, sample: &Sample) -> Result<Losses> {
        let logits = self.0.forward(&sample.maps)?;
        let aiou = stats(&logits, &sample.masks)?.aiou;
        let weight = sample.masks.dims()[0] as f64;
        Ok(Losses {
            terms: vec![(bce(&logits, &sample.masks)? + dice(&logits, &sample.masks)?)?],
            metrics: vec![Metric { name: "aiou", value: aiou, weight }],
        })
    }
}

fn vars() -> Vars {
    let tensors = UNet::init(&CONFIG, &mut ChaCha8Rng::seed_from_u64(3)).unwrap();
    tensors.into_iter().map(|(name, tensor)| (name, Var::from_tensor(&tensor).unwrap())).collect()
}

fn task(vars: &Vars) -> MaskHead {
    let tensors = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
    MaskHead(UNet::load(&CONFIG, &Params::new("test", tensors)).unwrap())
}

/// A rectangle that shows, blurred and noisy, in the first of two maps.
fn samples(count: usize) -> Vec<Sample> {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let mut sample = |n: usize| {
        let (mut maps, mut masks) = (vec![0f32; n * 2 * 64], vec![0u8; n * 256]);
        for phrase in 0..n {
            let (y0, x0) = (rng.random_range(0..5), rng.random_range(0..5));
            let (h, w) = (rng.random_range(2..4), rng.random_range(2..4));
            for y in 0..8 {
                for x in 0..8 {
                    let inside = (y0..y0 + h).contains(&y) && (x0..x0 + w).contains(&x);
                    let noise = rng.random_range(0.0..0.002f32);
                    maps[phrase * 128 + y * 8 + x] = noise + if inside { 0.02 } else { 0.0 };
                    maps[phrase * 128 + 64 + y * 8 + x] = rng.random_range(0.0..0.02f32);
                    for pixel in 0..4 {
                        let at = phrase * 256 + (2 * y + pixel / 2) * 16 + 2 * x + pixel % 2;
                        masks[at] = u8::from(inside);
                    }
                }
            }
        }
        Sample {
            maps: Tensor::from_vec(maps, (n, 2, 8, 8), &Device::Cpu).unwrap(),
            masks: Tensor::from_vec(masks, (n, 16, 16), &Device::Cpu).unwrap(),
        }
    };
    (0..count).map(|i| sample(1 + i % 3)).collect()
}

fn config(epochs: u64) -> TrainConfig {
    TrainConfig { seed: 11, epochs, batch_size: 3, learning_rate: 1e-2, ..TrainConfig::default() }
}

/// Trains until the end or until `stop` steps are done; returns tensors as bits, and all steps.
fn train(dir: &Path, workers: usize, stop: u64) -> (BTreeMap<String, Vec<u32>>, Vec<Step>) {
    let vars = vars();
    let task = task(&vars);
    let options = RunOptions { workers, loaders: workers, log_every: 4, ..RunOptions::new(dir) };
    let mut trainer = Trainer::new(&task, vars, config(6), json!({"base": 2}), options).unwrap();
    let mut steps = Vec::new();
    let taken = trainer.run(&samples(8), |step| {
        steps.push(step.clone());
        if step.step == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert_eq!(taken.unwrap(), trainer.optimizer().steps());
    let tensors = trainer.optimizer().vars().iter().map(|(name, var)| {
        let values = var.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
        (name.clone(), values.into_iter().map(f32::to_bits).collect())
    });
    (tensors.collect(), steps)
}

/// The lines of the log without the time they took.
fn log_lines(dir: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let without_time = |line: &str| {
        let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
        line.as_object_mut().unwrap().remove("seconds").unwrap();
        line.to_string()
    };
    text.lines().map(without_time).collect()
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one_bit_for_bit() {
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (expected, all_steps) = train(whole.path(), 1, u64::MAX);
    assert_eq!(all_steps.len(), 18);
    let mut steps = Vec::new();
    // In the middle of an epoch, at the end of one, and between two lines of the log.
    for stop in [2, 9, 13] {
        steps.extend(train(broken.path(), 1, stop).1);
    }
    let (found, rest) = train(broken.path(), 1, u64::MAX);
    steps.extend(rest);
    assert_eq!(steps, all_steps);
    for (name, bits) in &expected {
        assert_eq!(bits, &found[name], "`{name}` differs after resuming");
    }
    assert_eq!(log_lines(broken.path()), log_lines(whole.path()));
    // A run that is finished stays as it is.
    let (again, none) = train(broken.path(), 1, u64::MAX);
    assert_eq!((again == expected, none.len()), (true, 0));
}

#[test]
fn rounded_weights_are_trained_through_exact_ones() {
    let run = |dir: &Path, stop: u64| {
        let vars = vars();
        let task = task(&vars);
        let config = TrainConfig { precision: Precision::Bf16, ..config(4) };
        let mut trainer = Trainer::new(&task, vars.clone(), config, json!({}), RunOptions::new(dir)).unwrap();
        let end = trainer.run(&samples(8), |step| match step.step == stop {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        });
        end.unwrap();
        let values = |vars: &Vars| -> Vec<f32> {
            vars.values().flat_map(|var| var.flatten_all().unwrap().to_vec1::<f32>().unwrap()).collect()
        };
        (values(&vars), values(trainer.optimizer().vars()))
    };
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (used, exact) = run(whole.path(), u64::MAX);
    let rounded = |value: f32| f32::from_bits(value.to_bits() & 0xffff_0000);
    assert!(used.iter().all(|&value| rounded(value) == value));
    assert!(exact.iter().any(|&value| rounded(value) != value));
    assert!(used.iter().zip(&exact).all(|(a, b)| (a - b).abs() <= b.abs() / 128.0));
    run(broken.path(), 5);
    assert_eq!(run(broken.path(), u64::MAX), (used, exact));
}

#[test]
fn workers_do_not_change_the_result() {
    let [one, two, three] = [1, 2, 3].map(|workers| {
        let dir = tempfile::tempdir().unwrap();
        train(dir.path(), workers, u64::MAX)
    });
    assert_eq!(one, two);
    assert_eq!(one, three);
}

#[test]
fn a_batch_weighs_pictures_by_their_masks() {
    let dir = tempfile::tempdir().unwrap();
    let (_, steps) = train(dir.path(), 1, 1);

    let vars = vars();
    let task = task(&vars);
    let order = Order { len: 8, batch_size: 3, seed: 11 };
    let (_, indices) = order.batches(0).next().unwrap();
    let (mut sum, mut masks) = (Tensor::new(0f32, &Device::Cpu).unwrap(), 0.0);
    for index in indices {
        let sample = &samples(8)[index];
        let n = sample.masks.dims()[0] as f64;
        sum = (sum + (&task.losses(sample).unwrap().terms[0] * n).unwrap()).unwrap();
        masks += n;
    }
    let loss = (sum / masks).unwrap();
    let norm = global_norm(&gradients(&loss.backward().unwrap(), &vars)).unwrap();
    let loss = f64::from(loss.to_scalar::<f32>().unwrap());
    assert!((steps[0].loss / loss - 1.0).abs() < 1e-5, "{} instead of {loss}", steps[0].loss);
    assert!((steps[0].grad_norm / norm - 1.0).abs() < 1e-4, "{} instead of {norm}", steps[0].grad_norm);
}

#[test]
fn it_learns() {
    let dir = tempfile::tempdir().unwrap();
    let vars = vars();
    let task = task(&vars);
    let config = config(40);
    let mut trainer = Trainer::new(&task, vars, config, json!({}), RunOptions::new(dir.path())).unwrap();
    let mut losses = Vec::new();
    let run = trainer.run(&samples(9), |step| {
        losses.push(step.loss);
        ControlFlow::Continue(())
    });
    run.unwrap();
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let (first, last) = (mean(&losses[..6]), mean(&losses[losses.len() - 6..]));
    assert!(last < 0.6 * first, "loss {first:.3} -> {last:.3}");
}

#[test]
fn another_configuration_or_bad_data_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    train(dir.path(), 1, 2);
    let vars = vars();
    let task = task(&vars);
    let options = RunOptions::new(dir.path());
    let mut other = Trainer::new(&task, vars, config(7), json!({"base": 2}), options).unwrap();
    let message = other.run(&samples(8), |_| ControlFlow::Continue(())).unwrap_err().to_string();
    assert!(message.contains("train.epochs: 6 in the checkpoint, 7 now"), "{message}");
    let none: Vec<Sample> = Vec::new();
    let message = other.run(&none, |_| ControlFlow::Continue(())).unwrap_err().to_string();
    assert!(message.contains("no training samples"), "{message}");
}
