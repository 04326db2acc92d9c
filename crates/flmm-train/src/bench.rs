//! How long one training step of a head takes, and how much arithmetic it is.

use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use cpu_time::ProcessTime;
use flmm::grounder::{HeadSizes, Observation};
use flmm::mask_head::UNetConfig;
use flmm::sam::{SamConfig, SamGeometry};
use flmm::{Geometry, Result};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::head::{self, HeadConfig, HeadSample, HeadTask};
use crate::optim::{AdamW, AdamWConfig, gradients};
use crate::task::Task;

/// The step that is measured. The defaults are a 7B model's: 32 layers of 32 heads, 24 × 24 image tokens, SAM's
/// published decoder, one picture of 480 × 640 pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct StepConfig {
    /// Attention maps per phrase.
    pub channels: usize,
    /// Phrases of the picture.
    pub phrases: usize,
    /// Width of the mask head's first stage.
    pub base_channels: usize,
    /// Side of the attention maps.
    pub grid: usize,
    /// Whether the refiner is run.
    pub refiner: bool,
}

impl Default for StepConfig {
    fn default() -> Self {
        Self { channels: 1024, phrases: 4, base_channels: 64, grid: 24, refiner: true }
    }
}

impl StepConfig {
    /// Decoder layers and width of the hidden states.
    const LAYERS: usize = 32;
    const HIDDEN: usize = 4096;
    const PICTURE: (usize, usize) = (480, 640);

    /// Tokens of phrase `n`: phrases of two and three tokens take turns.
    fn tokens(n: usize) -> usize {
        2 + n % 2
    }

    /// Floating-point operations of the products in one step, forward and backward: convolutions of the mask head and
    /// linear layers of the mask decoder that see the whole picture. The rest is below a hundredth. They are counted as
    /// the method is written down, so that implementations can be compared; ours leaves out a third of them.
    pub fn flops(&self) -> f64 {
        let unet = UNetConfig { base_channels: self.base_channels, ..UNetConfig::new(self.channels) };
        // The input of the first convolution is constant: its gradient is not needed.
        let passes = |name: &str| if name.starts_with("encoder.0.0.convs.0") { 2.0 } else { 3.0 };
        let mut total: f64 = unet.flops(self.grid).iter().map(|(name, forward)| passes(name) * forward).sum();
        if self.refiner {
            total += 3.0 * SamConfig::vit_l().decoder_flops();
        }
        total * self.phrases as f64
    }

    fn sample(&self) -> Result<HeadSample> {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let mut random = |shape: &[usize], low: f32, high: f32| {
            let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(low..high)).collect();
            Ok::<_, flmm::Error>(Tensor::from_vec(values, shape, &Device::Cpu)?)
        };
        let (height, width) = Self::PICTURE;
        let mut masks = vec![0u8; self.phrases * height * width];
        for (n, mask) in masks.chunks_mut(height * width).enumerate() {
            let rows = 60 + 20 * n..260 + 20 * n;
            mask.chunks_mut(width)
                .enumerate()
                .filter(|(y, _)| rows.contains(y))
                .for_each(|(_, row)| row[100..400].fill(1));
        }
        let mut next = 0;
        let phrases = (0..self.phrases).map(|n| {
            let first = next;
            next += Self::tokens(n);
            (first..next).collect()
        });
        let phrases: Vec<Vec<usize>> = phrases.collect();
        let sam = SamConfig::vit_l();
        Ok(HeadSample {
            observation: Observation {
                maps: random(&[self.phrases, self.channels, self.grid, self.grid], 0.0, 0.01)?,
                hidden: random(&[Self::LAYERS, next, Self::HIDDEN], -1.0, 1.0)?,
                phrases,
                geometry: Geometry {
                    original: Self::PICTURE,
                    image_shape: (252, 336),
                    before: (42, 0),
                    padded_shape: (336, 336),
                    crop: true,
                },
                sam_embedding: random(&[1, sam.prompt_embed_dim, sam.grid(), sam.grid()], -1.0, 1.0)?,
                sam_geometry: SamGeometry::new(Self::PICTURE, sam.image_size),
            },
            masks: Tensor::from_vec(masks, (self.phrases, height, width), &Device::Cpu)?,
            token_labels: None,
        })
    }
}

/// How long the parts of one step took.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct StepTimes {
    /// Seconds of the forward pass and the losses.
    pub forward: f64,
    /// Seconds of the backward pass.
    pub backward: f64,
    /// Seconds of clipping and AdamW.
    pub optimizer: f64,
    /// Processor seconds of the whole step, over all threads: what counts on a machine that others use too.
    pub cpu: f64,
}

impl StepTimes {
    /// Seconds of the whole step.
    pub fn total(&self) -> f64 {
        self.forward + self.backward + self.optimizer
    }

    /// The median of every part.
    pub fn median(rounds: &[Self]) -> Self {
        let middle = |part: fn(&Self) -> f64| {
            let mut values: Vec<f64> = rounds.iter().map(part).collect();
            values.sort_by(f64::total_cmp);
            values.get(values.len() / 2).copied().unwrap_or_default()
        };
        Self {
            forward: middle(|t| t.forward),
            backward: middle(|t| t.backward),
            optimizer: middle(|t| t.optimizer),
            cpu: middle(|t| t.cpu),
        }
    }
}

/// Measures `rounds` steps on a fresh head and a made-up sample, behind `warmup` steps that do not count.
/// `on_round` is told every one.
pub fn train_step(
    config: &StepConfig,
    device: &Device,
    warmup: usize,
    rounds: usize,
    mut on_round: impl FnMut(&StepTimes),
) -> Result<Vec<StepTimes>> {
    let sizes = HeadSizes {
        channels: config.channels,
        layers: StepConfig::LAYERS,
        hidden_size: StepConfig::HIDDEN,
        sam: SamConfig::vit_l(),
    };
    let fresh = head::init(&sizes, config.base_channels, None, None, 1)?;
    let tensors = fresh.into_iter().map(|(name, tensor)| Ok((name, tensor.to_device(device)?)));
    let tensors = tensors.collect::<Result<_>>()?;
    let (trainable, vars) = head::trainable(&sizes, &tensors)?;
    drop(tensors);
    let mut head_config = HeadConfig::default();
    if !config.refiner {
        head_config.losses = head_config.losses.coarse_only();
    }
    let task = HeadTask::new(trainable, head_config)?;
    let mut optimizer = AdamW::new(vars, AdamWConfig::default())?;
    let sample = config.sample()?.to_device(device)?;
    let mut times = Vec::with_capacity(rounds);
    for round in 0..warmup + rounds {
        let cpu = ProcessTime::now();
        let (mut clock, mut lap) = (Instant::now(), Duration::ZERO);
        let mut split = || {
            // A device may still be at work on what it was given.
            device.synchronize()?;
            lap = clock.elapsed();
            clock = Instant::now();
            Ok::<_, flmm::Error>(lap.as_secs_f64())
        };
        let losses = task.losses(&sample)?;
        let forward = split()?;
        let store = losses.terms[0].backward()?;
        let gradients = gradients(&store, optimizer.vars());
        drop(store);
        let backward = split()?;
        optimizer.step(&gradients, 1e-4)?;
        let step = StepTimes { forward, backward, optimizer: split()?, cpu: cpu.elapsed().as_secs_f64() };
        if round >= warmup {
            on_round(&step);
            times.push(step);
        }
    }
    Ok(times)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_of_the_published_size() {
        // Counted by hand: first convolution 2 · 64 · 1024 · 9 · 64² = 4.83 GFLOP forward per phrase.
        let unet = StepConfig { phrases: 1, refiner: false, ..StepConfig::default() };
        assert!((22e9..25e9).contains(&unet.flops()), "{}", unet.flops());
        let wider = StepConfig { channels: 2048, ..unet };
        assert!((wider.flops() - unet.flops() - 2.0 * 4.83e9).abs() < 0.02e9);
        let whole = StepConfig::default();
        assert!((8e9..14e9).contains(&(whole.flops() / 4.0 - unet.flops())), "{}", whole.flops());
    }

    #[test]
    fn a_small_step_is_measured() {
        let config = StepConfig { channels: 3, phrases: 1, base_channels: 2, grid: 4, refiner: false };
        let mut seen = 0;
        let times = train_step(&config, &Device::Cpu, 1, 3, |_| seen += 1).unwrap();
        assert_eq!((times.len(), seen), (3, 3));
        let median = StepTimes::median(&times);
        assert!(median.total() > 0.0 && median.total() <= times.iter().map(StepTimes::total).sum());
    }
}
