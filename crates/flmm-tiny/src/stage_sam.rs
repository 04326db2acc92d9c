//! Stage `sam`: a small SAM learns the world's masks from boxes and spoilt coarse masks; its image encoder is then
//! frozen, prompt encoder and mask decoder go on learning in the stage `head`.

use std::path::Path;

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use flmm::Geometry;
use flmm::sam::{PromptOptions, Sam, SamConfig};
use flmm_data::world::{self, Mask, Split, WorldConfig};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;
use serde_json::json;

use crate::config;
use crate::lmm::{Setting, rng_for};
use crate::parallel::Workers;
use crate::progress::{self, Run};
use crate::store::{AdamW, Store};

/// How long and how fast to train.
#[derive(Debug, Clone, clap::Args, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct SamArgs {
    /// Optimiser steps in all.
    #[arg(long, default_value_t = 1500)]
    pub(crate) steps: usize,
    /// Scenes per worker and step.
    #[arg(long, default_value_t = 2)]
    pub(crate) batch: usize,
    /// Data-parallel workers, one thread each.
    #[arg(long, default_value_t = 2)]
    pub(crate) workers: usize,
    /// Peak learning rate.
    #[arg(long, default_value_t = 1e-3)]
    pub(crate) lr: f64,
    /// Seed of the scenes.
    #[arg(long, default_value_t = 3)]
    pub(crate) seed: u64,
    /// Steps between evaluations.
    #[arg(long, default_value_t = 100)]
    pub(crate) evaluate_every: usize,
    /// cIoU of refined masks, in percent, that the last evaluation must reach.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) gate: f64,
}

impl Default for SamArgs {
    fn default() -> Self {
        config::defaults()
    }
}

/// Sizes of flmm-tiny's SAM.
pub(crate) fn config() -> SamConfig {
    SamConfig {
        image_size: 192,
        patch_size: 8,
        window_size: 8,
        mlp_ratio: 4.0,
        decoder_num_heads: 4,
        decoder_depth: 2,
        mask_in_chans: 16,
        embed_dim: 96,
        depth: 4,
        num_heads: 3,
        global_attn_indexes: vec![1, 3],
        prompt_embed_dim: 64,
        mlp_dim: 256,
        attention_downsample_rate: 2,
        iou_head_hidden_dim: None,
    }
}

/// Scenes of an evaluation.
const EVALUATION_SCENES: usize = 24;
/// Side of the mask head's logit map.
const LOGIT_SIDE: usize = 64;

/// Trains; the store holds the whole SAM under its public names. Fails if the last evaluation is below the gate.
pub(crate) fn run(
    args: &SamArgs,
    setting: &Setting,
    world: &WorldConfig,
    store: &mut Store,
    folder: &Path,
) -> Result<()> {
    let mut run = Run::open(folder, args.steps, store)?;
    let workers = Workers::new(args.workers)?;
    let adam = AdamW { betas: (0.9, 0.98), weight_decay: 0.02, max_norm: 1.0 };
    loop {
        let step = store.step;
        let sam = Sam::load(&config(), &store.params(&Default::default()))?;
        // Also where a run is taken up again: one that has all its steps is judged by what it reached.
        if step > 0 && (step.is_multiple_of(args.evaluate_every) || step >= args.steps) {
            let [coarse, refined] = evaluate(&sam, setting, world)?;
            run.report(step, &format!("cIoU coarse {coarse:.1} refined {refined:.1}"))?;
            run.curve(&json!({ "step": step, "coarse": coarse, "refined": refined }))?;
            ensure!(
                step < args.steps || refined >= args.gate,
                "gate missed at step {step}: cIoU of refined masks {refined:.1} %, wanted {} %; train longer",
                args.gate
            );
        }
        if step >= args.steps {
            return Ok(());
        }
        let (loss, grads) = workers.gradients(|worker| {
            let first = ((step * args.workers + worker) * args.batch) as u64;
            let mut rng = rng_for(args.seed, step, worker);
            let mut total: Option<Tensor> = None;
            for index in first..first + args.batch as u64 {
                let (loss, _) = refine(&sam, setting, world, Split::Train, args.seed, index, &mut rng)?;
                total = Some(match total {
                    Some(total) => (total + loss)?,
                    None => loss,
                });
            }
            let loss =
                (total.ok_or_else(|| anyhow::anyhow!("--batch must be at least 1"))? / args.batch as f64)?;
            Ok((f64::from(loss.to_scalar::<f32>()?), store.gradients(&loss)?))
        })?;
        let norm = store.update(&grads, &adam, |_| progress::rate(args.lr, step, args.steps, 0.5))?;
        ensure!(store.step > step, "the gradient is not finite at step {step} (norm {norm}); lower --lr");
        run.stepped(store, loss, "")?;
    }
}

/// Coarse and refined cIoU on scenes of the validation split, percent.
fn evaluate(sam: &Sam, setting: &Setting, world: &WorldConfig) -> Result<[f64; 2]> {
    let mut counts = [0u64; 4];
    for index in 0..EVALUATION_SCENES {
        let mut rng = rng_for(7, index, 0);
        let (_, scene) = refine(sam, setting, world, Split::Val, 7, index as u64, &mut rng)?;
        counts.iter_mut().zip(scene).for_each(|(sum, count)| *sum += count);
    }
    let percent = |a: u64, b: u64| 100.0 * a as f64 / b.max(1) as f64;
    Ok([percent(counts[0], counts[1]), percent(counts[2], counts[3])])
}

/// The loss of one scene and its intersection and union pixels, coarse then refined.
fn refine(
    sam: &Sam,
    setting: &Setting,
    world: &WorldConfig,
    split: Split,
    seed: u64,
    index: u64,
    rng: &mut ChaCha8Rng,
) -> Result<(Tensor, [u64; 4])> {
    let scene = world::generate(world, split, seed, index);
    let geometry = setting.geometry(&scene)?;
    let mut masks: Vec<&Mask> = scene.objects.iter().map(|o| &o.mask).collect();
    masks.push(&scene.stuff[rng.random_range(0..scene.stuff.len())].mask);
    let mut logits = Vec::new();
    let mut target = Vec::new();
    for mask in &masks {
        logits.extend(coarse_logits(mask, &geometry, rng));
        target.extend(mask_values(mask));
    }
    let rect = geometry.picture_rect(LOGIT_SIDE, LOGIT_SIDE);
    let logits = Tensor::from_vec(logits, (masks.len(), rect.height, rect.width), &Device::Cpu)?;
    let (height, width) = geometry.original;
    let target = Tensor::from_vec(target, (masks.len(), height, width), &Device::Cpu)?;
    let (pixels, sam_geometry) = sam.pixel_values(&scene.image)?;
    let embedding = sam.image_encoder().forward(&pixels.unsqueeze(0)?)?;
    let no_text = vec![
        Tensor::zeros((1, config().prompt_embed_dim), candle_core::DType::F32, &Device::Cpu)?;
        masks.len()
    ];
    let options =
        PromptOptions { text_prompt: false, box_prompt: rng.random_bool(0.7), ..PromptOptions::default() };
    let refined = sam.refiner().refine(&embedding, &logits, &no_text, &sam_geometry, &options)?;
    let loss = (flmm_train::losses::dice(&refined, &target)?
        + (flmm_train::losses::bce(&refined, &target)? * 3.0)?)?;
    let coarse = flmm::nn::bilinear(&logits, height, width)?;
    let mut counts = [0; 4];
    for (at, logits) in [(0, &coarse), (2, &refined)] {
        let logits = logits.flatten_all()?.to_vec1::<f32>()?;
        let target = target.flatten_all()?.to_vec1::<f32>()?;
        for (logit, target) in logits.iter().zip(target) {
            counts[at] += u64::from(*logit > 0.0 && target > 0.5);
            counts[at + 1] += u64::from(*logit > 0.0 || target > 0.5);
        }
    }
    Ok((loss, counts))
}

/// A mask as 0 and 1, row by row.
pub(crate) fn mask_values(mask: &Mask) -> Vec<f32> {
    mask.data.iter().map(|inside| f32::from(u8::from(*inside))).collect()
}

/// What a mask head might say of `mask`: shrunk to its logit map, shifted, blurred, with holes and noise.
fn coarse_logits(mask: &Mask, geometry: &Geometry, rng: &mut ChaCha8Rng) -> Vec<f32> {
    let rect = geometry.picture_rect(LOGIT_SIDE, LOGIT_SIDE);
    let (h, w) = (rect.height, rect.width);
    let (width, height) = (mask.width, mask.height);
    let shift: [f64; 2] = std::array::from_fn(|_| rng.random_range(-1.5..1.5));
    let mut map = vec![0f32; h * w];
    for (at, value) in map.iter_mut().enumerate() {
        let y = ((at / w) as f64 + 0.5 + shift[0]) * f64::from(height) / h as f64;
        let x = ((at % w) as f64 + 0.5 + shift[1]) * f64::from(width) / w as f64;
        let inside = x >= 0.0 && y >= 0.0 && x < f64::from(width) && y < f64::from(height);
        *value = f32::from(u8::from(inside && mask.get(x as u32, y as u32)));
    }
    let mut noise: Vec<f32> = (0..h * w).map(|_| rng.random_range(-1.0..1.0)).collect();
    for _ in 0..2 {
        noise = blur(&noise, h, w, 2);
    }
    for _ in 0..2 {
        map = blur(&map, h, w, rng.random_range(0..=3));
    }
    let (gain, amount) = (rng.random_range(4.0..14.0), rng.random_range(0.0..2.0));
    let bias = rng.random_range(-0.15..0.15);
    map.iter().zip(noise).map(|(m, n)| gain * (m - 0.5 + bias + amount * n)).collect()
}

/// Box blur of radius `r`, edges clamped.
fn blur(map: &[f32], h: usize, w: usize, r: usize) -> Vec<f32> {
    let pass = |map: &[f32], step: usize, len: usize, other: usize, other_step: usize| {
        let mut out = vec![0f32; map.len()];
        for line in 0..other {
            for i in 0..len {
                let (from, to) = (i.saturating_sub(r), (i + r).min(len - 1));
                let sum: f32 = (from..=to).map(|j| map[line * other_step + j * step]).sum();
                out[line * other_step + i * step] = sum / (to - from + 1) as f32;
            }
        }
        out
    };
    pass(&pass(map, 1, w, h, w), w, h, w, 1)
}
