//! A head of a few hundred parameters and made-up samples for it.
#![allow(dead_code, reason = "not every test uses all of it")]

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use candle_core::{Device, Tensor};
use flmm::grounder::{HeadSizes, Observation};
use flmm::sam::{SamConfig, SamGeometry};
use flmm::{Geometry, Result};
use flmm_train::head::{init, trainable};
use flmm_train::{
    HeadConfig, HeadSample, HeadTask, RunOptions, Samples, SelectorConfig, Step, TrainConfig, Trainer,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

/// What the head must fit.
pub(crate) fn sizes() -> HeadSizes {
    let sam = SamConfig {
        image_size: 32,
        patch_size: 8,
        window_size: 2,
        mlp_ratio: 2.0,
        decoder_num_heads: 2,
        decoder_depth: 2,
        mask_in_chans: 16,
        embed_dim: 8,
        depth: 1,
        num_heads: 2,
        global_attn_indexes: vec![0],
        prompt_embed_dim: 16,
        mlp_dim: 16,
        attention_downsample_rate: 2,
        iou_head_hidden_dim: None,
    };
    HeadSizes { channels: 4, layers: 2, hidden_size: 6, sam }
}

/// Sample number `index`: one to three phrases in a picture of 24 × 32; neighbours share a picture.
pub(crate) fn sample(index: usize) -> HeadSample {
    let mut rng = ChaCha8Rng::seed_from_u64(index as u64);
    let mut picture = ChaCha8Rng::seed_from_u64(1000 + index as u64 / 2);
    let random = |rng: &mut ChaCha8Rng, shape: &[usize], low: f32, high: f32| {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(low..high)).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    let n = rng.random_range(1..4);
    let mut masks = vec![0u8; n * 24 * 32];
    for phrase in 0..n {
        let (top, left) = (rng.random_range(0..12), rng.random_range(0..16));
        for y in top..top + 10 {
            for x in left..left + 12 {
                masks[(phrase * 24 + y) * 32 + x] = 1;
            }
        }
    }
    HeadSample {
        observation: Observation {
            maps: random(&mut rng, &[n, 4, 8, 8], 0.0, 0.02),
            hidden: random(&mut rng, &[2, 7, 6], -1.0, 1.0),
            phrases: (0..n).map(|phrase| (2 * phrase..2 * phrase + 1 + phrase % 2).collect()).collect(),
            geometry: Geometry {
                original: (24, 32),
                image_shape: (12, 16),
                before: (2, 0),
                padded_shape: (16, 16),
                crop: true,
            },
            sam_embedding: random(&mut picture, &[1, 16, 4, 4], -1.0, 1.0),
            sam_geometry: SamGeometry::new((24, 32), 32),
        },
        masks: Tensor::from_vec(masks, (n, 24, 32), &Device::Cpu).unwrap(),
        token_labels: Some(Tensor::new(&[0u8, 1, 0, 1, 1, 0, 0], &Device::Cpu).unwrap()),
    }
}

/// A fresh task and what it trains.
pub(crate) fn task(selector: bool) -> (HeadTask, flmm_train::optim::Vars) {
    let tensors: BTreeMap<_, _> = init(&sizes(), 2, Some(&SelectorConfig::default()), None, 9).unwrap();
    let (head, vars) = trainable(&sizes(), &tensors).unwrap();
    let selector = selector.then(SelectorConfig::default);
    (HeadTask::new(head, HeadConfig { selector, ..HeadConfig::default() }).unwrap(), vars)
}

/// How the small head is trained.
pub(crate) fn train_config(epochs: u64, batch_size: usize) -> TrainConfig {
    TrainConfig { epochs, batch_size, learning_rate: 1e-2, ..TrainConfig::default() }
}

/// Trains a fresh head and returns every step and the tensors.
pub(crate) fn train(
    samples: &dyn Samples<HeadSample>,
    config: TrainConfig,
    dir: &Path,
) -> Result<(Vec<Step>, BTreeMap<String, Vec<f32>>)> {
    let (task, vars) = task(false);
    let mut trainer = Trainer::new(&task, vars, config, json!({}), RunOptions::new(dir))?;
    let mut steps = Vec::new();
    trainer.run(samples, |step| {
        steps.push(step.clone());
        ControlFlow::Continue(())
    })?;
    Ok((steps, tensors(&trainer)))
}

/// What a trainer has made.
pub(crate) fn tensors(trainer: &Trainer<'_, HeadTask>) -> BTreeMap<String, Vec<f32>> {
    let vars = trainer.optimizer().vars().iter();
    vars.map(|(name, var)| (name.clone(), var.flatten_all().unwrap().to_vec1().unwrap())).collect()
}

/// Whether a tensor's gradient is zero but for rounding, which AdamW makes large: a bias of keys adds the same to all
/// scores of a row, and the softmax takes it out again.
pub(crate) fn has_no_gradient(name: &str) -> bool {
    name.ends_with("k_proj.bias")
}
