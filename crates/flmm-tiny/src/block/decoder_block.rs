//! A layer of the Llama-shaped decoder as one operation.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::attention::{Attention, Maps, PackedMask, Probabilities};
use super::linear::{Sizes, input_gradient, linear, weight_gradient};
use super::product::{Buffer, Numbers};
use super::rotary::Rotary;
use super::rows::{rms_norm, rms_norm_backward, silu_mul, silu_mul_backward};

/// Sizes and constants of a decoder's layers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DecoderSizes {
    pub(crate) width: usize,
    pub(crate) heads: usize,
    pub(crate) ffn: usize,
    /// Of the norms.
    pub(crate) eps: f32,
}

/// What the layers of a forward pass have in common.
#[derive(Debug, Clone)]
pub(crate) struct Pass {
    pub(crate) sizes: DecoderSizes,
    pub(crate) mask: Arc<PackedMask>,
    pub(crate) rotary: Arc<Rotary>,
}

impl DecoderSizes {
    /// Names and shapes of a layer's tensors, in the order in which [`decoder_block`] takes them.
    pub(crate) fn tensors(&self) -> [(&'static str, Vec<usize>); 9] {
        let (d, ffn) = (self.width, self.ffn);
        [
            ("input_layernorm", vec![d]),
            ("self_attn.q_proj", vec![d, d]),
            ("self_attn.k_proj", vec![d, d]),
            ("self_attn.v_proj", vec![d, d]),
            ("self_attn.o_proj", vec![d, d]),
            ("post_attention_layernorm", vec![d]),
            ("mlp.gate_proj", vec![ffn, d]),
            ("mlp.up_proj", vec![ffn, d]),
            ("mlp.down_proj", vec![d, ffn]),
        ]
    }

    /// Lengths of the parts of the parameters that are used together: norm, queries with keys and values, output, norm,
    /// gate with what it multiplies, down.
    fn parts(&self) -> [usize; 6] {
        let (d, ffn) = (self.width, self.ffn);
        [d, 3 * d * d, d * d, d, 2 * ffn * d, d * ffn]
    }
}

/// `x [B, S, width]` through a layer whose tensors (see [`DecoderSizes::tensors`]) lie one behind the other in
/// `parameters`; and the attention `[B, S, keys]` of every head in `maps`.
pub(crate) fn decoder_block(
    x: &Tensor,
    parameters: &Tensor,
    pass: &Pass,
    maps: &Maps,
) -> Result<(Tensor, Vec<Tensor>)> {
    let (batch, rows, width) = x.dims3()?;
    let DecoderSizes { heads, .. } = pass.sizes;
    let attention = Attention { batch, rows, heads, head: width / heads, mask: Some(pass.mask.clone()) };
    let keys = attention.shared().saturating_sub(maps.first);
    if width != pass.sizes.width || maps.heads.iter().any(|head| *head >= heads) {
        bail!("x is {:?}, the maps are {maps:?}, the layer has {:?}", x.dims(), pass.sizes);
    }
    let saved = Mutex::new(None);
    let op = DecoderBlock { pass: pass.clone(), attention, maps: maps.clone(), saved };
    let out = x.contiguous()?.apply_op2(&parameters.contiguous()?, op)?;
    if maps.heads.is_empty() {
        return Ok((out.reshape(x.dims())?, Vec::new()));
    }
    let (states, of_head) = (batch * rows * width, batch * rows * keys);
    let map = |at| out.narrow(0, states + at * of_head, of_head)?.reshape((batch, rows, keys));
    let kept = (0..maps.heads.len()).map(map).collect::<Result<_>>()?;
    Ok((out.narrow(0, 0, states)?.reshape(x.dims())?, kept))
}

/// What the backward pass needs and is dear to compute.
struct Saved {
    /// Queries and keys, rotated, and values, `[rows, 3 · width]`.
    qkv: Buffer,
    probabilities: Vec<Probabilities>,
    /// What attention picked, `[rows, width]`.
    picked: Buffer,
    /// States behind attention, `[rows, width]`.
    middle: Buffer,
    /// `[rows, 2 · ffn]`
    gate_up: Buffer,
}

struct DecoderBlock {
    pass: Pass,
    attention: Attention,
    maps: Maps,
    saved: Mutex<Option<Saved>>,
}

struct Weights<'a> {
    input_norm: &'a [f32],
    qkv: Numbers<'a>,
    o: Numbers<'a>,
    post_norm: &'a [f32],
    gate_up: Numbers<'a>,
    down: Numbers<'a>,
}

impl DecoderBlock {
    fn rows(&self) -> usize {
        self.attention.batch * self.attention.rows
    }

    fn sizes(&self, inputs: usize, outputs: usize) -> Sizes {
        Sizes { rows: self.rows(), inputs, outputs }
    }

    fn weights<'a>(&self, parameters: Numbers<'a>) -> Result<Weights<'a>> {
        let DecoderSizes { width, .. } = self.pass.sizes;
        let mut rest = parameters;
        let [input_norm, qkv, o, post_norm, gate_up, down] = self.pass.sizes.parts().map(|len| {
            let part = rest;
            rest = rest.skip(len);
            part
        });
        let (input_norm, post_norm) = (input_norm.first(width)?, post_norm.first(width)?);
        Ok(Weights { input_norm, qkv, o, post_norm, gate_up, down })
    }

    fn forward(&self, x: &[f32], weights: &Weights) -> Result<(Vec<f32>, Saved)> {
        let Pass { sizes: DecoderSizes { width, heads, ffn, eps }, rotary, .. } = &self.pass;
        let (width, ffn) = (*width, *ffn);
        let normed = rms_norm(x, weights.input_norm, *eps).into();
        let mut qkv = linear(&normed, weights.qkv, self.sizes(width, 3 * width))?;
        rotary.rotate(&mut qkv, 3 * width, 2 * heads, false);
        let (probabilities, picked) = self.attention.forward(&qkv)?;
        let mut middle = linear(&picked, weights.o, self.sizes(width, width))?;
        middle.iter_mut().zip(x).for_each(|(y, x)| *y += x);
        let normed = rms_norm(&middle, weights.post_norm, *eps).into();
        let gate_up = linear(&normed, weights.gate_up, self.sizes(width, 2 * ffn))?;
        let hidden = silu_mul(&gate_up, ffn).into();
        let mut out = linear(&hidden, weights.down, self.sizes(ffn, width))?.into_vec();
        out.iter_mut().zip(middle.iter()).for_each(|(y, x)| *y += x);
        self.attention.append_maps(&probabilities, &self.maps, &mut out);
        Ok((out, Saved { qkv, probabilities, picked, middle, gate_up }))
    }

    /// The gradient of `x`; writes those of the parameters to `d`.
    fn backward(
        &self,
        x: &[f32],
        weights: &Weights,
        saved: &Saved,
        dy: Numbers,
        d: &mut [f32],
    ) -> Result<Vec<f32>> {
        let Pass { sizes: DecoderSizes { width, heads, ffn, eps }, rotary, .. } = &self.pass;
        let (width, ffn) = (*width, *ffn);
        let mut rest = d;
        let [d_input_norm, d_qkv, d_o, d_post_norm, d_gate_up, d_down] =
            self.pass.sizes.parts().map(|len| rest.split_off_mut(..len).unwrap_or_default());

        let sizes = self.sizes(ffn, width);
        let mut hidden = input_gradient(dy, weights.down, sizes)?;
        let gate_up = silu_mul_backward(&saved.gate_up, ffn, &mut hidden).into();
        weight_gradient(&hidden, dy, sizes, d_down)?;
        let sizes = self.sizes(width, 2 * ffn);
        let normed = rms_norm(&saved.middle, weights.post_norm, *eps).into();
        weight_gradient(&normed, &gate_up, sizes, d_gate_up)?;
        let normed = input_gradient(&gate_up, weights.gate_up, sizes)?;
        let mut middle = Buffer::from(dy.first(x.len())?.to_vec());
        rms_norm_backward(&saved.middle, weights.post_norm, *eps, &normed, &mut middle, d_post_norm);

        let sizes = self.sizes(width, width);
        weight_gradient(&saved.picked, &middle, sizes, d_o)?;
        let picked = input_gradient(&middle, weights.o, sizes)?;
        let keys = self.attention.shared().saturating_sub(self.maps.first);
        let maps = dy.skip(x.len()).first(self.maps.heads.len() * self.rows() * keys)?;
        let mut qkv =
            self.attention.backward(&saved.qkv, &saved.probabilities, &picked, (&self.maps, maps))?;
        rotary.rotate(&mut qkv, 3 * width, 2 * heads, true);
        let sizes = self.sizes(width, 3 * width);
        let normed = rms_norm(x, weights.input_norm, *eps).into();
        weight_gradient(&normed, &qkv, sizes, d_qkv)?;
        let normed = input_gradient(&qkv, weights.qkv, sizes)?;
        rms_norm_backward(x, weights.input_norm, *eps, &normed, &mut middle, d_input_norm);
        Ok(middle.into_vec())
    }
}

impl CustomOp2 for DecoderBlock {
    fn name(&self) -> &'static str {
        "decoder-block"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        parameters: &CpuStorage,
        parameter_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let count = self.rows() * self.pass.sizes.width;
        let x = Numbers::of(x, x_layout)?.first(count)?;
        let (out, saved) = self.forward(x, &self.weights(Numbers::of(parameters, parameter_layout)?)?)?;
        *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = Some(saved);
        let shape = Shape::from(out.len());
        Ok((CpuStorage::F32(out), shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        parameters: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(saved) = saved else { bail!("a second backward pass through a decoder block") };
        let grad = grad.contiguous()?;
        let [x_storage, weights, grads] = [x, parameters, &grad].map(Tensor::storage_and_layout);
        let weights = self.weights(Numbers::on_cpu(&weights.0, weights.1)?)?;
        let mut d = vec![0f32; parameters.elem_count()];
        let values = Numbers::on_cpu(&x_storage.0, x_storage.1)?.first(x.elem_count())?;
        let dx = self.backward(values, &weights, &saved, Numbers::on_cpu(&grads.0, grads.1)?, &mut d)?;
        let dx = Tensor::from_vec(dx, x.dims(), x.device())?;
        Ok((Some(dx), Some(Tensor::from_vec(d, parameters.dims(), parameters.device())?)))
    }
}
