//! ConvNeXt, as OpenCLIP publishes it: stem and stages without the final norm (`spec/models.md` §8).
//!
//! Maps are kept channels-last, `[h, w, channels]`: norms and feed-forward layers then need no transposition.

use std::ops::Range;

use candle_core::{DType, Tensor};

use crate::error::Result;
use crate::nn::{DepthwiseConv2d, LayerNorm, Linear, bilinear_part, gelu, residual};
use crate::weights::Params;

const EPS: f64 = 1e-6;

/// Side of a patch of the stem.
const STEM: usize = 4;

/// Most stages that are read; every stage halves the map.
const MAX_STAGES: usize = 8;

/// Pixels that go through a block's feed-forward layers at once: its hidden maps, four times as wide, would else
/// be the largest tensors of the whole program.
const PIXELS: usize = 1 << 14;

/// A frozen ConvNeXt trunk. Widths and depths follow from the tensors.
#[derive(Debug)]
pub struct ConvNext {
    stem: Patches,
    stem_norm: LayerNorm,
    stages: Vec<Stage>,
    widths: Vec<usize>,
}

impl ConvNext {
    /// Reads `stem.{0,1}`, `stages.S.downsample.{0,1}` and `stages.S.blocks.B.{conv_dw, norm, mlp.fc1, mlp.fc2, gamma}`.
    pub fn load(params: &Params) -> Result<Self> {
        let (mut widths, mut depths) = (Vec::new(), Vec::new());
        for index in 0..MAX_STAGES {
            let stage = params.pp("stages").pp(index);
            let count = (0..).take_while(|block| stage.has(&format!("blocks.{block}.gamma"))).count();
            let width = stage.shape("blocks.0.gamma").and_then(|shape| shape.first().copied());
            let Some(width) = width.filter(|&width| width > 0) else { break };
            widths.push(width);
            depths.push(count);
        }
        if widths.is_empty() {
            // No ConvNeXt at all: the tensors asked for below are then reported as missing, with ConvNeXt-L's sizes.
            (widths, depths) = (vec![192], vec![1]);
        }
        let stages = depths.iter().enumerate().map(|(index, &depth)| {
            let before = index.checked_sub(1).map(|before| widths[before]);
            Stage::load(before, widths[index], depth, &params.pp("stages").pp(index))
        });
        Ok(Self {
            stem: Patches::load(3, widths[0], STEM, &params.pp("stem.0"))?,
            stem_norm: LayerNorm::load(widths[0], EPS, &params.pp("stem.1"))?,
            stages: stages.collect::<Result<_>>()?,
            widths,
        })
    }

    /// Channels of [`ConvNext::feature_map`]: the sum of the stages' widths.
    pub fn channels(&self) -> usize {
        self.widths.iter().sum()
    }

    /// Pixels of the picture per cell of the last stage: a picture's sides must be multiples of it.
    pub fn stride(&self) -> usize {
        STEM << (self.widths.len() - 1)
    }

    /// Pixels of the picture per cell of [`ConvNext::feature_map`].
    pub fn map_stride(&self) -> usize {
        STEM
    }

    /// `pixel_values [1, 3, H, W]` → a map `[channels, H / 4, W / 4]`.
    pub fn feature_map(&self, pixel_values: &Tensor) -> Result<FeatureMap> {
        let pixels = pixel_values.to_dtype(self.stem.dtype())?.squeeze(0)?.permute((1, 2, 0))?;
        let mut x = self.stem_norm.forward(&self.stem.forward(&pixels)?)?;
        let (height, width, _) = x.dims3()?;
        let mut stages = Vec::with_capacity(self.stages.len());
        for stage in &self.stages {
            x = stage.forward(x)?;
            stages.push(x.permute((2, 0, 1))?.contiguous()?);
        }
        Ok(FeatureMap { stages, height, width })
    }
}

/// The outputs of all stages, to be seen as one map `[channels, height, width]`: all resized to the first one's size
/// (bilinear, in f32, rounded back) and concatenated.
///
/// That map is eight times as large as they are (gigabytes for the largest pictures), so it is made row by row.
#[derive(Debug, Clone)]
pub struct FeatureMap {
    /// `[width, h, w]` of every stage.
    stages: Vec<Tensor>,
    height: usize,
    width: usize,
}

impl FeatureMap {
    /// Rows and columns.
    pub fn size(&self) -> (usize, usize) {
        (self.height, self.width)
    }

    /// The part `rows × columns`: `[channels, rows, columns]`.
    pub fn part(&self, rows: Range<usize>, columns: Range<usize>) -> Result<Tensor> {
        let parts =
            self.stages.iter().map(|stage| bilinear_part(stage, self.size(), rows.clone(), columns.clone()));
        Ok(Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?)
    }

    /// All of it.
    pub fn whole(&self) -> Result<Tensor> {
        self.part(0..self.height, 0..self.width)
    }
}

/// A convolution whose stride is its size: a linear map of patches.
#[derive(Debug)]
struct Patches {
    linear: Linear,
    side: usize,
    dtype: DType,
}

impl Patches {
    fn load(inputs: usize, outputs: usize, side: usize, params: &Params) -> Result<Self> {
        let weight = params.get(&[outputs, inputs, side, side], "weight")?;
        let dtype = weight.dtype();
        let weight = weight.permute((0, 2, 3, 1))?.reshape((outputs, side * side * inputs))?;
        Ok(Self { linear: Linear::new(weight, Some(params.get(&[outputs], "bias")?)), side, dtype })
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    /// `x [h, w, inputs]` → `[h / side, w / side, outputs]`; what does not fill a patch is left out.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (height, width, channels) = x.dims3()?;
        let (side, rows, columns) = (self.side, height / self.side, width / self.side);
        let x = x.narrow(0, 0, rows * side)?.narrow(1, 0, columns * side)?;
        let patches = x.reshape(&[rows, side, columns, side, channels])?.permute([0, 2, 1, 3, 4])?;
        self.linear.forward(&patches.reshape((rows, columns, side * side * channels))?)
    }
}

#[derive(Debug)]
struct Stage {
    /// Norm and halving; the first stage has none.
    downsample: Option<(LayerNorm, Patches)>,
    blocks: Vec<Block>,
}

impl Stage {
    fn load(before: Option<usize>, width: usize, depth: usize, params: &Params) -> Result<Self> {
        let downsample = before.map(|before| {
            let params = params.pp("downsample");
            let norm = LayerNorm::load(before, EPS, &params.pp(0))?;
            Ok::<_, crate::Error>((norm, Patches::load(before, width, 2, &params.pp(1))?))
        });
        let blocks = (0..depth).map(|index| Block::load(width, &params.pp("blocks").pp(index)));
        Ok(Self { downsample: downsample.transpose()?, blocks: blocks.collect::<Result<_>>()? })
    }

    fn forward(&self, mut x: Tensor) -> Result<Tensor> {
        if let Some((norm, halve)) = &self.downsample {
            x = halve.forward(&norm.forward(&x)?)?;
        }
        for block in &self.blocks {
            x = block.forward(&x)?;
        }
        Ok(x)
    }
}

#[derive(Debug)]
struct Block {
    conv_dw: DepthwiseConv2d,
    norm: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    /// `[width]`
    gamma: Tensor,
}

impl Block {
    fn load(width: usize, params: &Params) -> Result<Self> {
        let inner = 4 * width;
        Ok(Self {
            conv_dw: DepthwiseConv2d::load(width, 7, &params.pp("conv_dw"))?,
            norm: LayerNorm::load(width, EPS, &params.pp("norm"))?,
            fc1: Linear::load(width, inner, true, &params.pp("mlp.fc1"))?,
            fc2: Linear::load(inner, width, true, &params.pp("mlp.fc2"))?,
            gamma: params.get(&[width], "gamma")?,
        })
    }

    /// `x [h, w, width]` → same shape.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (height, width, channels) = x.dims3()?;
        let mixed = self.conv_dw.forward(x)?.reshape((height * width, channels))?;
        let mut fed = Vec::new();
        for start in (0..height * width).step_by(PIXELS) {
            let pixels = mixed.narrow(0, start, PIXELS.min(height * width - start))?;
            let inner = self.fc1.forward(&self.norm.forward(&pixels)?)?;
            // Evaluated in f32 and rounded once.
            let inner = gelu(&inner.to_dtype(DType::F32)?)?.to_dtype(inner.dtype())?;
            fed.push(self.fc2.forward(&inner)?.broadcast_mul(&self.gamma)?);
        }
        residual(x, &Tensor::cat(&fed, 0)?.reshape((height, width, channels))?)
    }
}
