//! The mask head: attention maps of a phrase in, coarse mask logits out (`spec/pipeline.md` §3).

mod unet;

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use rand::Rng;

use crate::error::{Error, Result};
use crate::nn::{Conv2d, Enlarged};
use crate::weights::Params;

use unet::{Body, Visitor};

/// Sides are padded to a multiple of this: three poolings halve them three times.
const MULTIPLE: usize = 8;

/// Sizes of a [`UNet`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct UNetConfig {
    /// Attention maps per phrase: layers × heads (× 2 with two resolutions).
    pub in_channels: usize,
    /// Width of the first stage; the published heads have 64.
    pub base_channels: usize,
    /// Maps whose longer side is smaller are enlarged to this: 64.
    pub input_size: usize,
}

impl UNetConfig {
    /// A published head for `in_channels` maps.
    pub fn new(in_channels: usize) -> Self {
        Self { in_channels, base_channels: 64, input_size: 64 }
    }

    /// Name and shape of every parameter, without a prefix (`spec/pipeline.md` §3.4).
    pub fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        let mut shapes = Body::shapes(self.in_channels, self.base_channels);
        shapes.push(("conv_seg.weight".into(), vec![1, self.base_channels, 1, 1]));
        shapes.push(("conv_seg.bias".into(), vec![1]));
        shapes
    }

    /// Number of trained values: 7,182,785 + 576 · `in_channels` for the published width.
    pub fn parameter_count(&self) -> usize {
        self.shapes().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }

    /// Floating-point operations of every convolution, by its name, for the maps of one phrase, whose longer side is
    /// `side`.
    pub fn flops(&self, side: usize) -> Vec<(String, f64)> {
        let side = self.input_size.max(side).next_multiple_of(MULTIPLE);
        let convolution = |(name, shape): (String, Vec<usize>)| {
            let [outputs, inputs, kernel, _] = shape[..] else { return None };
            // A stage's number says how often its maps were halved.
            let stage = name.split('.').nth(1).and_then(|stage| stage.parse::<u32>().ok()).unwrap_or(0);
            let pixels = (side >> stage).pow(2);
            Some((name, 2.0 * (outputs * inputs * kernel * kernel * pixels) as f64))
        };
        self.shapes().into_iter().filter_map(convolution).collect()
    }
}

/// The mask head.
#[derive(Debug, Clone)]
pub struct UNet {
    config: UNetConfig,
    body: Body,
    conv_seg: Conv2d,
    dtype: DType,
}

impl UNet {
    /// Reads the tensors of [`UNetConfig::shapes`] below `params` (in a grounding head: below `mask_head.`).
    pub fn load(config: &UNetConfig, params: &Params) -> Result<Self> {
        let dtype = params.get(&[1, config.base_channels, 1, 1], "conv_seg.weight")?.dtype();
        Ok(Self {
            config: *config,
            body: Body::load(config.in_channels, config.base_channels, params)?,
            conv_seg: Conv2d::load(config.base_channels, 1, 1, 1, true, &params.pp("conv_seg"))?,
            dtype,
        })
    }

    /// Fresh f32 tensors: Kaiming normal (fan out, ReLU gain) for every convolution, zero biases, unit norms.
    pub fn init(config: &UNetConfig, rng: &mut impl Rng) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = BTreeMap::new();
        for (name, shape) in config.shapes() {
            let count = shape.iter().product::<usize>();
            let values: Vec<f32> = match *shape.as_slice() {
                [outputs, _, kh, kw] => {
                    let std = (2.0 / (outputs * kh * kw) as f64).sqrt();
                    (0..count).map(|_| (std * normal(rng)) as f32).collect()
                }
                _ if name.ends_with("gn.weight") => vec![1.0; count],
                _ => vec![0.0; count],
            };
            tensors.insert(name, Tensor::from_vec(values, shape, &Device::Cpu)?);
        }
        Ok(tensors)
    }

    /// The sizes this head was built for.
    pub fn config(&self) -> &UNetConfig {
        &self.config
    }

    /// Attention maps `[N, C, h, w]`, probabilities in `0..=1` → logits `[N, h', w']`, where the longer of `h'` and
    /// `w'` is 64 for smaller maps and unchanged for larger ones.
    ///
    /// # Errors
    /// [`Error::Request`] if the maps have another number of channels, are empty, or leave `0..=1`.
    pub fn forward(&self, maps: &Tensor) -> Result<Tensor> {
        self.run(maps, None)
    }

    /// [`UNet::forward`] that shows every stage's output to `visit`: `prepared_input`, `encoder.0` … `decoder.0`.
    pub fn forward_with(&self, maps: &Tensor, visit: &mut dyn FnMut(&str, &Tensor)) -> Result<Tensor> {
        self.run(maps, Some(visit))
    }

    fn run(&self, maps: &Tensor, mut visit: Visitor) -> Result<Tensor> {
        let (n, _, h, w) = self.check(maps)?;
        let factor = (self.config.input_size as f64 / h.max(w) as f64).max(1.0);
        let (height, width) = ((h as f64 * factor) as usize, (w as f64 * factor) as usize);
        if n == 0 {
            return Ok(Tensor::zeros((0, height, width), self.dtype, maps.device())?);
        }
        let maps = maps.to_dtype(self.dtype)?;
        let mass = maps.sum_keepdim((2, 3))?.maximum(1e-12)?;
        let size = (height.next_multiple_of(MULTIPLE), width.next_multiple_of(MULTIPLE));
        let x = Enlarged { maps: maps.broadcast_div(&mass)?, factor, size };
        if let Some(visit) = &mut visit {
            visit("prepared_input", &x.written_out()?);
        }
        let features = self.body.forward(&x, visit)?;
        let features = features.narrow(2, 0, height)?.narrow(3, 0, width)?.contiguous()?;
        Ok(self.conv_seg.forward(&features)?.squeeze(1)?)
    }

    fn check(&self, maps: &Tensor) -> Result<(usize, usize, usize, usize)> {
        let channels = self.config.in_channels;
        let wrong = |what: String| {
            let hint = "the mask head reads attention probabilities of the model it was trained for";
            Err(Error::request(what, hint))
        };
        let dims = match *maps.dims() {
            [n, c, h, w] if c == channels && h > 0 && w > 0 => (n, c, h, w),
            ref found => {
                return wrong(format!("attention maps have shape {found:?}, expected [N, {channels}, h, w]"));
            }
        };
        if dims.0 > 0 {
            let flat = maps.detach().to_dtype(DType::F32)?.flatten_all()?;
            let (low, high) = (flat.min(0)?.to_scalar::<f32>()?, flat.max(0)?.to_scalar::<f32>()?);
            let sum = flat.sum_all()?.to_scalar::<f32>()?;
            // A sum is not a number as soon as one value is; the minimum may not tell.
            if !(low >= 0.0 && high <= 1.0 && sum.is_finite()) {
                return wrong(format!("attention maps reach from {low} to {high}, expected values in 0..=1"));
            }
        }
        Ok(dims)
    }
}

/// A standard normal number (Box–Muller).
fn normal(rng: &mut impl Rng) -> f64 {
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::Var;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn small(in_channels: usize) -> UNetConfig {
        UNetConfig { in_channels, base_channels: 4, input_size: 64 }
    }

    fn maps(shape: (usize, usize, usize, usize)) -> Tensor {
        Tensor::rand(0f32, 0.01, shape, &Device::Cpu).unwrap()
    }

    fn fresh(config: &UNetConfig) -> UNet {
        let tensors: HashMap<_, _> =
            UNet::init(config, &mut ChaCha8Rng::seed_from_u64(1)).unwrap().into_iter().collect();
        let params = Params::new("test", tensors);
        let unet = UNet::load(config, &params).unwrap();
        params.finish("").unwrap();
        assert_eq!(params.unused(), Vec::<String>::new());
        unet
    }

    #[test]
    fn parameter_counts_of_the_published_heads() {
        // spec/pipeline.md §3.4
        for (channels, count) in
            [(384, 7_403_969), (144, 7_265_729), (960, 7_735_745), (1024, 7_772_609), (2048, 8_362_433)]
        {
            assert_eq!(UNetConfig::new(channels).parameter_count(), count);
            assert_eq!(count, 7_182_785 + 576 * channels);
        }
    }

    #[test]
    fn initialisation_has_the_stated_spread() {
        let config = UNetConfig { in_channels: 6, base_channels: 16, input_size: 64 };
        let tensors = UNet::init(&config, &mut ChaCha8Rng::seed_from_u64(1)).unwrap();
        let weight = &tensors["encoder.3.1.convs.1.conv.weight"];
        let std = weight.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        let expected = (2.0f32 / (128.0 * 9.0)).sqrt();
        assert!((std / expected - 1.0).abs() < 0.01, "{std} instead of {expected}");
        let mean = |name: &str| tensors[name].mean_all().unwrap().to_scalar::<f32>().unwrap();
        assert_eq!((mean("decoder.2.conv_block.convs.1.gn.weight"), mean("conv_seg.bias")), (1.0, 0.0));
    }

    #[test]
    fn bad_maps_are_refused() {
        let unet = fresh(&small(3));
        let message = |x: Tensor| unet.forward(&x).unwrap_err().to_string();
        assert!(message(maps((1, 4, 8, 8))).contains("expected [N, 3, h, w]"));
        assert!(message((maps((1, 3, 8, 8)) - 1.0).unwrap()).contains("0..=1"));
        let nan = Tensor::full(f32::NAN, (1, 3, 8, 8), &Device::Cpu).unwrap();
        assert!(message(nan).contains("0..=1"));
        assert_eq!(unet.forward(&maps((0, 3, 49, 20))).unwrap().dims(), [0, 63, 26]);
    }

    #[test]
    fn phrases_do_not_see_one_another() {
        let unet = fresh(&small(3));
        let x = maps((3, 3, 24, 16));
        let batch = unet.forward(&x).unwrap();
        for phrase in 0..3 {
            let alone = unet.forward(&x.narrow(0, phrase, 1).unwrap()).unwrap();
            let difference = (batch.narrow(0, phrase, 1).unwrap() - alone).unwrap().abs().unwrap();
            assert!(difference.max_all().unwrap().to_scalar::<f32>().unwrap() < 1e-4);
        }
    }

    #[test]
    fn every_tensor_gets_a_gradient() {
        let config = small(3);
        let vars: HashMap<String, Var> = UNet::init(&config, &mut ChaCha8Rng::seed_from_u64(1))
            .unwrap()
            .into_iter()
            .map(|(name, tensor)| (name, Var::from_tensor(&tensor).unwrap()))
            .collect();
        let tensors = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
        let unet = UNet::load(&config, &Params::new("test", tensors)).unwrap();
        let grads = unet.forward(&maps((2, 3, 24, 24))).unwrap().sqr().unwrap().sum_all().unwrap().backward();
        let grads = grads.unwrap();
        for (name, var) in &vars {
            let norm =
                grads.get(var).map(|g| g.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
            assert!(norm.is_some_and(|n| n.is_finite() && n > 0.0), "{name}: {norm:?}");
        }
    }
}
