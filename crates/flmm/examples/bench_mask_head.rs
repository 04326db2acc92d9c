//! Medians of the mask head's forward and training step, and of one 3×3 convolution against candle's own:
//! `cargo run --release -p flmm --example bench_mask_head [channels] [base] [phrases]`.

use std::collections::HashMap;
use std::time::Instant;

use candle_core::{Device, Tensor, Var};
use flmm::Result;
use flmm::mask_head::{UNet, UNetConfig};
use flmm::nn::Conv2d;
use flmm::weights::Params;
use rand::SeedableRng;

/// Median milliseconds of several runs after one that warms up.
fn median(mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    run()?;
    let mut times = Vec::new();
    for _ in 0..7 {
        let clock = Instant::now();
        run()?;
        times.push(clock.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[3])
}

fn convolution(n: usize, inputs: usize, outputs: usize, side: usize) -> Result<()> {
    let x = Var::randn(0f32, 1f32, (n, inputs, side, side), &Device::Cpu)?;
    let weight = Var::randn(0f32, 1f32, (outputs, inputs, 3, 3), &Device::Cpu)?;
    let ours = Conv2d::new(weight.as_tensor().clone(), None, 1)?;
    let own = |backward: bool| -> Result<()> {
        let y = ours.forward(&x)?;
        if backward {
            y.sqr()?.sum_all()?.backward()?;
        }
        Ok(())
    };
    let candle = |backward: bool| -> Result<()> {
        let y = x.conv2d(&weight, 1, 1, 1, 1)?;
        if backward {
            y.sqr()?.sum_all()?.backward()?;
        }
        Ok(())
    };
    println!(
        "conv 3x3 [{n}, {inputs}, {side}, {side}] -> {outputs}: forward {:.1} ms (candle {:.1}), with backward {:.1} ms (candle {:.1})",
        median(|| own(false))?,
        median(|| candle(false))?,
        median(|| own(true))?,
        median(|| candle(true))?
    );
    Ok(())
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).map_while(|argument| argument.parse().ok());
    let mut next = |default: usize| arguments.next().unwrap_or(default);
    let (in_channels, base_channels, phrases) = (next(30), next(16), next(16));
    convolution(phrases, in_channels, base_channels, 64)?;
    convolution(phrases, 4 * base_channels, 4 * base_channels, 16)?;
    convolution(phrases, 8 * base_channels, 8 * base_channels, 8)?;

    let config = UNetConfig { in_channels, base_channels, input_size: 64 };
    let tensors = UNet::init(&config, &mut rand_chacha::ChaCha8Rng::seed_from_u64(1))?;
    let mut vars = HashMap::new();
    for (name, tensor) in tensors {
        vars.insert(name, Var::from_tensor(&tensor)?);
    }
    let params = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
    let unet = UNet::load(&config, &Params::new("bench", params))?;
    let maps = Tensor::rand(0f32, 0.01f32, (phrases, in_channels, 24, 24), &Device::Cpu)?;
    let forward = median(|| unet.forward(&maps).map(drop))?;
    let step = median(|| {
        unet.forward(&maps)?.sqr()?.sum_all()?.backward()?;
        Ok(())
    })?;
    println!(
        "mask head, {in_channels} maps, base {base_channels}, {phrases} phrases: forward {forward:.0} ms, with backward {step:.0} ms"
    );
    Ok(())
}
