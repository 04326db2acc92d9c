//! The U-Net body: four encoder stages, three decoder stages (`spec/pipeline.md` §3.3).

use candle_core::Tensor;

use crate::error::Result;
use crate::nn::{Conv2d, Enlarged, GroupNorm1, bilinear_scaled, max_pool2x2};
use crate::weights::Params;

const STAGES: usize = 4;
const EPS: f64 = 1e-5;

/// Is shown every stage's name and output.
pub(super) type Visitor<'a> = Option<&'a mut dyn FnMut(&str, &Tensor)>;

/// Everything between the prepared maps and the last 1×1 convolution.
#[derive(Debug, Clone)]
pub(super) struct Body {
    /// Output of stage `i` is `base · 2^i` wide and `2^i` times smaller.
    encoder: Vec<Block>,
    /// Decoder `i` joins the output of decoder `i + 1` (or of the last encoder) with that of encoder `i`.
    decoder: Vec<Decoder>,
}

impl Body {
    pub(super) fn load(in_channels: usize, base: usize, params: &Params) -> Result<Self> {
        let mut encoder = Vec::new();
        for i in 0..STAGES {
            let inputs = if i == 0 { in_channels } else { base << (i - 1) };
            encoder.push(Block::load(inputs, base << i, &params.pp(encoder_name(i)))?);
        }
        let mut decoder = Vec::new();
        for i in 0..STAGES - 1 {
            decoder.push(Decoder::load(base << i, &params.pp(format!("decoder.{i}")))?);
        }
        Ok(Self { encoder, decoder })
    }

    /// Name and shape of every parameter.
    pub(super) fn shapes(in_channels: usize, base: usize) -> Vec<(String, Vec<usize>)> {
        let mut shapes = Vec::new();
        let mut unit = |name: String, inputs: usize, outputs: usize, kernel: usize| {
            shapes.push((format!("{name}.conv.weight"), vec![outputs, inputs, kernel, kernel]));
            shapes.push((format!("{name}.gn.weight"), vec![outputs]));
            shapes.push((format!("{name}.gn.bias"), vec![outputs]));
        };
        for i in 0..STAGES {
            let inputs = if i == 0 { in_channels } else { base << (i - 1) };
            unit(format!("{}.convs.0", encoder_name(i)), inputs, base << i, 3);
            unit(format!("{}.convs.1", encoder_name(i)), base << i, base << i, 3);
        }
        for i in 0..STAGES - 1 {
            let width = base << i;
            unit(format!("decoder.{i}.upsample.interp_upsample.1"), 2 * width, width, 1);
            unit(format!("decoder.{i}.conv_block.convs.0"), 2 * width, width, 3);
            unit(format!("decoder.{i}.conv_block.convs.1"), width, width, 3);
        }
        shapes
    }

    /// `x [N, C, h, w]`, sides multiples of 8 once enlarged → `[N, base, h, w]`.
    pub(super) fn forward(&self, x: &Enlarged, mut visit: Visitor) -> Result<Tensor> {
        let mut visit = |name: &str, y: &Tensor| {
            if let Some(visit) = &mut visit {
                visit(name, y);
            }
        };
        let mut outputs: Vec<Tensor> = Vec::new();
        for (i, block) in self.encoder.iter().enumerate() {
            let y = match outputs.last() {
                None => block.forward_enlarged(x)?,
                Some(previous) => block.forward(&max_pool2x2(previous)?)?,
            };
            visit(&format!("encoder.{i}"), &y);
            outputs.push(y);
        }
        let mut y = outputs[STAGES - 1].clone();
        for (i, decoder) in self.decoder.iter().enumerate().rev() {
            let up = decoder.upsample.forward_before_enlarging(&y)?;
            visit(&format!("decoder.{i}.upsampled"), &up);
            y = decoder.conv_block.forward(&Tensor::cat(&[&outputs[i], &up], 1)?)?;
            visit(&format!("decoder.{i}"), &y);
        }
        Ok(y)
    }
}

/// The first stage is a sequence of one block; the others begin with the pooling, so their block is number 1.
fn encoder_name(stage: usize) -> String {
    format!("encoder.{stage}.{}", usize::from(stage > 0))
}

#[derive(Debug, Clone)]
struct Decoder {
    /// 1×1, halves the channels of the enlarged deeper stage.
    upsample: ConvUnit,
    conv_block: Block,
}

impl Decoder {
    fn load(width: usize, params: &Params) -> Result<Self> {
        Ok(Self {
            upsample: ConvUnit::load(2 * width, width, 1, &params.pp("upsample.interp_upsample.1"))?,
            conv_block: Block::load(2 * width, width, &params.pp("conv_block"))?,
        })
    }
}

/// Two 3×3 units.
#[derive(Debug, Clone)]
struct Block {
    convs: [ConvUnit; 2],
}

impl Block {
    fn load(inputs: usize, outputs: usize, params: &Params) -> Result<Self> {
        let first = ConvUnit::load(inputs, outputs, 3, &params.pp("convs.0"))?;
        Ok(Self { convs: [first, ConvUnit::load(outputs, outputs, 3, &params.pp("convs.1"))?] })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.convs[1].forward(&self.convs[0].forward(x)?)
    }

    fn forward_enlarged(&self, x: &Enlarged) -> Result<Tensor> {
        self.convs[1].forward(&self.convs[0].forward_enlarged(x)?)
    }
}

/// Convolution without bias, group norm with one group, ReLU.
#[derive(Debug, Clone)]
struct ConvUnit {
    conv: Conv2d,
    gn: GroupNorm1,
}

impl ConvUnit {
    fn load(inputs: usize, outputs: usize, kernel: usize, params: &Params) -> Result<Self> {
        Ok(Self {
            conv: Conv2d::load(inputs, outputs, kernel, 1, false, &params.pp("conv"))?,
            gn: GroupNorm1::load(outputs, EPS, &params.pp("gn"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.gn.forward_relu(&self.conv.forward(x)?)
    }

    fn forward_enlarged(&self, x: &Enlarged) -> Result<Tensor> {
        self.gn.forward_relu(&self.conv.forward_enlarged(x)?)
    }

    /// The unit of `x` enlarged twofold. A 1×1 convolution without bias and enlarging can change places: first the
    /// convolution is a quarter of the work.
    fn forward_before_enlarging(&self, x: &Tensor) -> Result<Tensor> {
        self.gn.forward_relu(&bilinear_scaled(&self.conv.forward(x)?, 2.0)?)
    }
}
