//! Losses and statistics of mask logits (`spec/training.md` §4), and the BCE of the keyword selector (§8.2).
//!
//! Both losses are fused on the CPU: one pass forward, one backward, sums in f64.

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result as CandleResult, Shape, Tensor, bail};
use flmm::nn::host::{Elements, elements, fusable};
use flmm::{Error, Result};

/// f32 machine epsilon, as in the published losses' denominators.
const EPSILON: f64 = f32::EPSILON as f64;

/// Mean binary cross-entropy of `logits` against `target` (0 or 1, any type) over all pixels of all masks.
///
/// Both have one shape, normally `[N, h, w]`. The result is a scalar.
pub fn bce(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    let target = like(logits, target)?;
    if fusable(&[logits]) {
        return Ok(logits.contiguous()?.apply_op2(&target, Bce)?);
    }
    let softplus = (logits.relu()? + ((logits.abs()?.neg()?.exp()? + 1.0)?.log()?))?;
    let sum = (softplus - logits.mul(&target)?)?.sum_all()?;
    Ok((sum / (logits.elem_count() as f64 + EPSILON))?)
}

/// Mean over masks of `1 − (2 Σ p·y + 1) / (Σ p + Σ y + 1)` with `p = sigmoid(logits)`: dice with first powers in
/// the denominator.
///
/// `logits` and `target` are `[N, h, w]`. The result is a scalar.
pub fn dice(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    let target = like(logits, target)?;
    if fusable(&[logits]) {
        return Ok(logits.contiguous()?.apply_op2(&target, Dice)?);
    }
    let p = (logits.neg()?.exp()? + 1.0)?.recip()?.flatten_from(1)?;
    let target = target.flatten_from(1)?;
    let overlap = ((p.mul(&target)?.sum(1)? * 2.0)? + 1.0)?;
    let size = (p.sum(1)?.add(&target.sum(1)?)? + 1.0)?;
    let sum = overlap.div(&size)?.affine(-1.0, 1.0)?.sum_all()?;
    Ok((sum / (logits.dim(0)? as f64 + EPSILON))?)
}

/// `target` in the type of `logits`; fails unless the shapes agree.
fn like(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    if logits.dims() != target.dims() {
        return Err(Error::request(
            format!("logits have shape {:?}, their target {:?}", logits.dims(), target.dims()),
            "resize the target to the logits first",
        ));
    }
    Ok(target.to_dtype(logits.dtype())?.contiguous()?)
}

/// How well masks were hit, for logging.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct MaskStats {
    /// Share of pixels, over all masks, whose `sigmoid > 0.5` is right.
    pub accuracy: f64,
    /// Mean over masks of intersection over union (0 for two empty masks).
    pub aiou: f64,
}

/// Statistics of `logits [N, h, w]` against `target [N, h, w]` (0 or 1).
pub fn stats(logits: &Tensor, target: &Tensor) -> Result<MaskStats> {
    let target = like(logits, target)?;
    let n = logits.dim(0)?;
    let rows = |x: &Tensor| x.to_dtype(DType::F32)?.reshape((n, ()))?.to_vec2::<f32>();
    if logits.elem_count() == 0 {
        return Ok(MaskStats::default());
    }
    let (mut right, mut aiou) = (0usize, 0f64);
    for (logits, target) in rows(&logits.detach())?.iter().zip(&rows(&target)?) {
        let (mut intersection, mut union) = (0usize, 0usize);
        for (&x, &y) in logits.iter().zip(target) {
            let (predicted, wanted) = (sigmoid(x) > 0.5, y > 0.5);
            right += usize::from(predicted == wanted);
            intersection += usize::from(predicted && wanted);
            union += usize::from(predicted || wanted);
        }
        aiou += intersection as f64 / (union as f64 + 1e-12);
    }
    Ok(MaskStats { accuracy: right as f64 / logits.elem_count() as f64, aiou: aiou / n as f64 })
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

struct Bce;

impl CustomOp2 for Bce {
    fn name(&self) -> &'static str {
        "bce_with_logits"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        y: &CpuStorage,
        ly: &Layout,
    ) -> CandleResult<(CpuStorage, Shape)> {
        let (x, y) = (elements(x, lx)?, elements(y, ly)?);
        // softplus(x) − x·y, where softplus(x) = max(x, 0) + ln(1 + e^−|x|) does not overflow.
        let term = |(&x, &y): (&f32, &f32)| f64::from(x.max(0.0) - x * y + (-x.abs()).exp().ln_1p());
        let sum: f64 = x.iter().zip(y).map(term).sum();
        Ok((CpuStorage::F32(vec![(sum / (x.len() as f64 + EPSILON)) as f32]), Shape::from(())))
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> CandleResult<(Option<Tensor>, Option<Tensor>)> {
        let scale = (f64::from(grad.to_scalar::<f32>()?) / (x.elem_count() as f64 + EPSILON)) as f32;
        let (handle_x, handle_y) = (Elements::of(x), Elements::of(y));
        let pairs = handle_x.get()?.iter().zip(handle_y.get()?);
        let dx: Vec<f32> = pairs.map(|(&x, &y)| (sigmoid(x) - y) * scale).collect();
        Ok((Some(Tensor::from_vec(dx, x.dims(), x.device())?), None))
    }
}

struct Dice;

/// `2 Σ p·y + 1` and `Σ p + Σ y + 1` of one mask.
fn dice_parts(x: &[f32], y: &[f32]) -> (f64, f64) {
    let (mut overlap, mut size) = (0f64, 0f64);
    for (&x, &y) in x.iter().zip(y) {
        let p = sigmoid(x);
        overlap += f64::from(p * y);
        size += f64::from(p + y);
    }
    (2.0 * overlap + 1.0, size + 1.0)
}

impl CustomOp2 for Dice {
    fn name(&self) -> &'static str {
        "dice"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        y: &CpuStorage,
        ly: &Layout,
    ) -> CandleResult<(CpuStorage, Shape)> {
        let (n, pixels) = masks_and_pixels(lx.dims())?;
        let (x, y) = (elements(x, lx)?, elements(y, ly)?);
        let loss = |(x, y)| {
            let (overlap, size) = dice_parts(x, y);
            1.0 - overlap / size
        };
        let sum: f64 = x.chunks(pixels).zip(y.chunks(pixels)).map(loss).sum();
        Ok((CpuStorage::F32(vec![(sum / (n as f64 + EPSILON)) as f32]), Shape::from(())))
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> CandleResult<(Option<Tensor>, Option<Tensor>)> {
        let (n, pixels) = masks_and_pixels(x.dims())?;
        let scale = f64::from(grad.to_scalar::<f32>()?) / (n as f64 + EPSILON);
        let (handle_x, handle_y) = (Elements::of(x), Elements::of(y));
        let mut dx = Vec::with_capacity(x.elem_count());
        for (x, y) in handle_x.get()?.chunks(pixels).zip(handle_y.get()?.chunks(pixels)) {
            let (overlap, size) = dice_parts(x, y);
            // d(−overlap / size) / dp = overlap / size² − 2 y / size
            let (constant, slope) = ((scale * overlap / (size * size)) as f32, (scale * 2.0 / size) as f32);
            dx.extend(x.iter().zip(y).map(|(&x, &y)| {
                let p = sigmoid(x);
                (constant - slope * y) * p * (1.0 - p)
            }));
        }
        Ok((Some(Tensor::from_vec(dx, x.dims(), x.device())?), None))
    }
}

fn masks_and_pixels(dims: &[usize]) -> CandleResult<(usize, usize)> {
    match dims {
        [n, rest @ ..] => Ok((*n, rest.iter().product::<usize>().max(1))),
        [] => bail!("dice expects [N, h, w], found a scalar"),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    fn pair() -> (Tensor, Tensor) {
        let logits = Tensor::randn(0f32, 2.0, (3, 7, 5), &Device::Cpu).unwrap();
        let target = Tensor::rand(0f32, 1.0, (3, 7, 5), &Device::Cpu).unwrap().ge(0.6).unwrap();
        (logits, target)
    }

    #[test]
    fn fused_equals_composed_with_gradients() {
        let (logits, target) = pair();
        for loss in [bce, dice] {
            let run = |dtype: DType| {
                let x = Var::from_tensor(&logits.to_dtype(dtype).unwrap()).unwrap();
                let loss = loss(&x, &target).unwrap();
                let grads = (&loss * 3.0).unwrap().backward().unwrap();
                let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
                (
                    wide(&loss).to_vec1::<f64>().unwrap(),
                    wide(grads.get(&x).unwrap()).to_vec1::<f64>().unwrap(),
                )
            };
            let (fused, composed) = (run(DType::F32), run(DType::F64));
            assert!((fused.0[0] - composed.0[0]).abs() < 1e-6);
            for (a, b) in fused.1.iter().zip(&composed.1) {
                assert!((a - b).abs() < 1e-7, "{a} {b}");
            }
        }
    }

    #[test]
    fn shapes_must_agree() {
        let (logits, target) = pair();
        let message = bce(&logits, &target.narrow(0, 0, 2).unwrap()).unwrap_err().to_string();
        assert!(message.contains("[2, 7, 5]"), "{message}");
    }

    #[test]
    fn no_masks_cost_nothing() {
        let none = Tensor::zeros((0, 4, 4), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(bce(&none, &none).unwrap().to_scalar::<f32>().unwrap(), 0.0);
        assert_eq!(dice(&none, &none).unwrap().to_scalar::<f32>().unwrap(), 0.0);
        assert_eq!(stats(&none, &none).unwrap(), MaskStats::default());
    }
}
