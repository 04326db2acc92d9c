//! Heads beyond the paper's: few attention maps, no refiner.

#[path = "common/small_head.rs"]
mod small_head;

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use candle_core::{Device, Tensor};
use flmm::grounder::{GroundingHead, HeadSettings, RefinerKind};
use flmm::weights::Params;
use flmm_train::head::{init_as, trainable_as};
use flmm_train::samples::from_fn;
use flmm_train::selection::{best_channels, channel_scores};
use flmm_train::{HeadConfig, HeadSample, HeadTask, LossWeights, RunOptions, Task, Trainer};
use serde_json::json;

/// A sample whose map number 2 is the mask, seen through noise, and whose others are noise.
fn telling(index: usize) -> HeadSample {
    let mut sample = small_head::sample(index);
    let maps = &sample.observation.maps;
    let (n, ..) = maps.dims4().unwrap();
    // The picture of 24 × 32 lies in rows 1..7 of the 8 × 8 grid: cells of 4 × 4 pixels.
    let mut values = maps.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let masks = sample.masks.to_vec3::<u8>().unwrap();
    for (phrase, mask) in masks.iter().enumerate() {
        for y in 0..6 {
            for x in 0..8 {
                let inside = f32::from(mask[4 * y + 2][4 * x + 2]);
                values[((phrase * 4 + 2) * 8 + y + 1) * 8 + x] += 0.05 * inside;
            }
        }
    }
    sample.observation.maps = Tensor::from_vec(values, (n, 4, 8, 8), &Device::Cpu).unwrap();
    sample
}

#[test]
fn the_map_that_shows_the_mask_is_found() {
    let samples = from_fn(10, |index, _| Ok(telling(index)));
    let scores = channel_scores(&samples, 0..10).unwrap();
    assert_eq!(best_channels(&scores, 1), [2], "{scores:?}");
    assert!(scores[2] > 0.8 && scores[0].abs() < 0.2, "{scores:?}");
    let error = channel_scores(&samples, []).unwrap_err();
    assert!(error.to_string().contains("no phrase"), "{error}");
}

fn settings() -> HeadSettings {
    HeadSettings { channels_used: Some(vec![2, 0]), refiner: RefinerKind::None }
}

/// Tensors of a fresh head with [`settings`], and the names among them.
fn fresh() -> BTreeMap<String, Tensor> {
    init_as(&small_head::sizes(), &settings(), 2, None, None, 3).unwrap()
}

#[test]
fn such_a_head_has_fewer_tensors_and_sees_only_its_maps() {
    let tensors = fresh();
    assert!(tensors.keys().all(|name| name.starts_with("mask_head.") || name == "text_layer_weights"));
    assert_eq!(tensors["mask_head.encoder.0.0.convs.0.conv.weight"].dims()[1], 2);

    let params = Params::new("test", tensors.into_iter().collect());
    let head = GroundingHead::from_params_as(&small_head::sizes(), &settings(), &params).unwrap();
    params.finish("").unwrap();
    let all = telling(1).observation;
    let logits = head.decode(&all).unwrap();
    assert_eq!(logits.refined.dims()[1..], [24, 32], "as large as the picture");
    let values = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();

    // Another map may change; a used one may not.
    let change = |channel: usize| {
        let mut other = all.clone();
        let mut maps = values(&all.maps);
        maps[channel * 64 + 20] += 0.1;
        other.maps = Tensor::from_vec(maps, all.maps.dims(), &Device::Cpu).unwrap();
        values(&head.decode(&other).unwrap().coarse)
    };
    assert_eq!(change(1), values(&logits.coarse));
    assert_ne!(change(2), values(&logits.coarse));
}

#[test]
fn it_learns() {
    let dir = tempfile::tempdir().unwrap();
    let (head, vars) = trainable_as(&small_head::sizes(), &settings(), &fresh()).unwrap();
    let losses = LossWeights { refined_bce: 0.0, refined_dice: 0.0, ..LossWeights::default() };
    let task = HeadTask::new(head, HeadConfig { losses, ..HeadConfig::default() }).unwrap();
    let samples = from_fn(4, |index, _| Ok(telling(index)));
    let config = small_head::train_config(60, 2);
    let mut trainer = Trainer::new(&task, vars, config, json!({}), RunOptions::new(dir.path())).unwrap();
    let mut losses = Vec::new();
    trainer
        .run(&samples, |step| {
            losses.push(step.loss);
            ControlFlow::Continue(())
        })
        .unwrap();
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    assert!(last < 0.7 * first, "loss {first:.3} -> {last:.3}");
}

#[test]
fn a_head_without_a_refiner_has_no_refined_losses() {
    let (head, _) = trainable_as(&small_head::sizes(), &settings(), &fresh()).unwrap();
    let error = HeadTask::new(head, HeadConfig::default()).err().unwrap();
    assert!(error.to_string().contains("no refiner"), "{error}");
    // Without them, the task never touches SAM.
    let (head, _) = trainable_as(&small_head::sizes(), &settings(), &fresh()).unwrap();
    let losses = LossWeights { refined_bce: 0.0, refined_dice: 0.0, ..LossWeights::default() };
    let task = HeadTask::new(head, HeadConfig { losses, ..HeadConfig::default() }).unwrap();
    let mut sample = telling(0);
    sample.observation.sam_embedding =
        Tensor::zeros((1, 0, 0, 0), candle_core::DType::F32, &Device::Cpu).unwrap();
    assert!(task.losses(&sample).unwrap().terms[0].to_scalar::<f32>().unwrap().is_finite());
}
