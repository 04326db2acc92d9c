//! Training the whole head: gradients go where they should, and one picture can be learnt by heart.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use candle_core::{Device, Tensor};
use flmm::grounder::Observation;
use flmm::sam::{PromptOptions, Refiner, SamGeometry};
use flmm::{Geometry, Result};
use flmm_train::head::{init, trainable};
use flmm_train::optim::{Gradients, accumulate, gradients};
use flmm_train::{
    HeadConfig, HeadSample, HeadTask, LossWeights, RefinedTarget, RunOptions, SelectorConfig, SelectorSample,
    SelectorTask, Task, TrainConfig, Trainer,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

#[path = "common/small_head.rs"]
mod small_head;

use small_head::sizes;

/// Two phrases of 1 and 2 tokens in a picture of 24 × 32 that the LMM saw padded to a square.
fn sample() -> HeadSample {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let mut random = |shape: &[usize], low: f32, high: f32| {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(low..high)).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    let mut masks = vec![0u8; 2 * 24 * 32];
    for y in 6..18 {
        for x in 4..16 {
            masks[y * 32 + x] = 1;
            masks[24 * 32 + y * 32 + x + 14] = 1;
        }
    }
    HeadSample {
        observation: Observation {
            maps: random(&[2, 4, 8, 8], 0.0, 0.02),
            hidden: random(&[2, 5, 6], -1.0, 1.0),
            phrases: vec![vec![1], vec![3, 4]],
            geometry: Geometry {
                original: (24, 32),
                image_shape: (12, 16),
                before: (2, 0),
                padded_shape: (16, 16),
                crop: true,
            },
            sam_embedding: random(&[1, 16, 4, 4], -1.0, 1.0),
            sam_geometry: SamGeometry::new((24, 32), 32),
        },
        masks: Tensor::from_vec(masks, (2, 24, 32), &Device::Cpu).unwrap(),
        token_labels: Some(Tensor::new(&[0u8, 1, 0, 1, 1], &Device::Cpu).unwrap()),
    }
}

fn tensors() -> BTreeMap<String, Tensor> {
    init(&sizes(), 2, Some(&SelectorConfig::default()), None, 9).unwrap()
}

/// The gradients of one of the two terms, and all names.
fn term_gradients(config: HeadConfig, term: usize) -> (Gradients, Vec<String>) {
    let (head, vars) = trainable(&sizes(), &tensors()).unwrap();
    let task = HeadTask::new(head, config).unwrap();
    let losses = task.losses(&sample()).unwrap();
    let grads = gradients(&losses.terms[term].backward().unwrap(), &vars);
    (grads, vars.keys().cloned().collect())
}

fn norm(grads: &Gradients, name: &str) -> f32 {
    grads.get(name).map_or(0.0, |g| g.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap())
}

#[test]
fn mask_losses_reach_every_trained_tensor_and_no_other() {
    let (grads, names) = term_gradients(HeadConfig::default(), 0);
    assert!(!names.iter().any(|name| name.contains("gaussian")), "a buffer is not trained");
    for name in &names {
        let expected = match name.strip_prefix("sam.model.") {
            Some(name) => Refiner::is_trained(name, &PromptOptions::default()),
            None => !name.starts_with("keyword_selector."),
        };
        let norm = norm(&grads, name);
        assert!(norm.is_finite());
        assert_eq!(norm > 0.0, expected, "`{name}` has a gradient of {norm}");
    }
}

#[test]
fn coarse_losses_alone_do_not_run_the_refiner() {
    let losses = LossWeights { refined_bce: 0.0, refined_dice: 0.0, ..LossWeights::default() };
    let (grads, names) = term_gradients(HeadConfig { losses, ..HeadConfig::default() }, 0);
    for name in &names {
        assert_eq!(norm(&grads, name) > 0.0, name.starts_with("mask_head."), "`{name}`");
    }
}

#[test]
fn the_selector_disturbs_nothing_else() {
    for pos_weight in [1.0, 3.0] {
        let selector = Some(SelectorConfig { pos_weight, ..SelectorConfig::default() });
        let (grads, names) = term_gradients(HeadConfig { selector, ..HeadConfig::default() }, 1);
        for name in &names {
            assert_eq!(norm(&grads, name) > 0.0, name.starts_with("keyword_selector."), "`{name}`");
        }
    }
}

#[test]
fn refined_targets_may_be_exact_or_as_published() {
    let loss = |refined_target| {
        let (head, _) = trainable(&sizes(), &tensors()).unwrap();
        let task = HeadTask::new(head, HeadConfig { refined_target, ..HeadConfig::default() }).unwrap();
        let mut sample = sample();
        // One pixel that does not survive the way through the LMM's 12 × 16 pixels.
        let mut masks = sample.masks.flatten_all().unwrap().to_vec1::<u8>().unwrap();
        masks[32 + 1] = 1;
        sample.masks = Tensor::from_vec(masks, (2, 24, 32), &Device::Cpu).unwrap();
        task.losses(&sample).unwrap().terms[0].to_scalar::<f32>().unwrap()
    };
    assert_ne!(loss(RefinedTarget::Published), loss(RefinedTarget::Exact));
}

/// Nine phrases of one to three tokens.
fn large_sample() -> HeadSample {
    let small = sample();
    let repeat = |t: &Tensor| Tensor::cat(&[t, t, t, t, &t.narrow(0, 0, 1).unwrap()], 0).unwrap();
    let mut maps = repeat(&small.observation.maps);
    // All phrases differ.
    let scale: Vec<f32> = (0..9 * 4 * 64).map(|i| 0.5 + ((i * 7919) % 100) as f32 / 200.0).collect();
    maps = (maps * Tensor::from_vec(scale, (9, 4, 8, 8), &Device::Cpu).unwrap()).unwrap();
    let phrases = (0..9).map(|i| (0..1 + i % 3).map(|j| (i + j) % 5).collect()).collect();
    let masks = repeat(&small.masks);
    HeadSample { observation: Observation { maps, phrases, ..small.observation }, masks, ..small }
}

#[test]
fn phrases_in_parts_give_the_loss_and_gradients_of_all_together() {
    let run = |phrases_at_once: usize, refined_bce: f64| {
        let (head, vars) = trainable(&sizes(), &tensors()).unwrap();
        let losses = LossWeights { refined_bce, refined_dice: refined_bce, ..LossWeights::default() };
        let config = HeadConfig {
            phrases_at_once,
            losses,
            selector: Some(SelectorConfig::default()),
            ..HeadConfig::default()
        };
        let task = HeadTask::new(head, config).unwrap();
        let (mut sum, mut loss, mut parts, mut metrics) = (Gradients::new(), 0.0, 0, BTreeMap::new());
        let each = &mut |losses: flmm_train::Losses| {
            parts += 1;
            let total = (&losses.terms[0] + &losses.terms[1])?;
            loss += total.to_scalar::<f32>()?;
            for metric in losses.metrics {
                let (value, weight) = metrics.entry(metric.name).or_insert((0.0, 0.0));
                *value += metric.value * metric.weight;
                *weight += metric.weight;
            }
            accumulate(&mut sum, &gradients(&total.backward()?, &vars), 1.0)
        };
        task.in_parts(&large_sample(), each).unwrap();
        (sum, loss, parts, metrics)
    };
    for refined in [1.0, 0.0] {
        let (whole, loss, parts, metrics) = run(9, refined);
        assert_eq!(parts, 1);
        for size in [1, 2, 4, 8] {
            let (sum, loss_of_parts, parts, metrics_of_parts) = run(size, refined);
            assert_eq!(parts, 9usize.div_ceil(size) + 1);
            assert!((loss_of_parts / loss - 1.0).abs() < 1e-5, "{loss_of_parts} instead of {loss}");
            for (name, (value, weight)) in &metrics {
                let (found, found_weight) = metrics_of_parts[name];
                assert_eq!(found_weight, *weight, "{name}");
                assert!((found - value).abs() < 1e-4 * value.abs().max(1.0), "{name}: {found} {value}");
            }
            for (name, gradient) in &whole {
                let difference = (gradient - &sum[name]).unwrap();
                let norm =
                    |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
                assert!(norm(&difference) <= 1e-4 * norm(gradient) + 1e-7, "`{name}` in parts of {size}");
            }
        }
    }
}

#[test]
fn one_picture_is_learnt_by_heart() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let (head, vars) = trainable(&sizes(), &tensors())?;
    let config = HeadConfig { selector: Some(SelectorConfig::default()), ..HeadConfig::default() };
    let task = HeadTask::new(head, config)?;
    let train = TrainConfig { epochs: 150, batch_size: 1, learning_rate: 1e-2, ..TrainConfig::default() };
    let mut trainer = Trainer::new(&task, vars, train, json!(config), RunOptions::new(dir.path()))?;
    let mut losses = Vec::new();
    trainer.run(&vec![sample()], |step| {
        losses.push(step.loss);
        ControlFlow::Continue(())
    })?;
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    assert!(last < 0.35 * first, "loss {first:.3} -> {last:.3}");
    let probs = task.head().keyword_probs(&sample().observation.hidden)?.unwrap();
    assert!(probs[1] > probs[0] && probs[3] > probs[2] && probs[4] > probs[2], "{probs:?}");
    Ok(())
}

#[test]
fn the_selector_is_trained_alone() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let (head, mut vars) = trainable(&sizes(), &tensors())?;
    vars.retain(|name, _| name.starts_with("keyword_selector."));
    let sample = sample();
    let samples = vec![SelectorSample {
        hidden: sample.observation.hidden.clone(),
        labels: sample.token_labels.unwrap(),
    }];
    let weights = head.text_layer_weights.clone();
    let task = SelectorTask::new(head.keyword_selector.unwrap(), weights, SelectorConfig::default());
    let train = TrainConfig { epochs: 200, batch_size: 1, learning_rate: 5e-2, ..TrainConfig::default() };
    let mut trainer = Trainer::new(&task, vars, train, json!({}), RunOptions::new(dir.path()))?;
    let mut last = f64::INFINITY;
    trainer.run(&samples, |step| {
        last = step.loss;
        ControlFlow::Continue(())
    })?;
    assert!(last < 0.2, "loss {last}");
    Ok(())
}

#[test]
fn wrong_samples_and_heads_are_refused() {
    let (head, _) = trainable(&sizes(), &tensors()).unwrap();
    let task = HeadTask::new(head, HeadConfig::default()).unwrap();
    let mut wrong = sample();
    wrong.masks = wrong.masks.narrow(0, 0, 1).unwrap();
    assert!(task.losses(&wrong).unwrap_err().to_string().contains("2 phrases"));

    let mut extra = tensors();
    extra.insert("mask_head.foreign".into(), tensors()["text_layer_weights"].clone());
    assert!(trainable(&sizes(), &extra).unwrap_err().to_string().contains("mask_head.foreign"));

    let plain: BTreeMap<_, _> =
        tensors().into_iter().filter(|(name, _)| !name.starts_with("keyword_selector.")).collect();
    let (head, _) = trainable(&sizes(), &plain).unwrap();
    let config = HeadConfig { selector: Some(SelectorConfig::default()), ..HeadConfig::default() };
    assert!(HeadTask::new(head, config).is_err());
}
