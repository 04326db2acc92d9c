//! Affine maps that are trained, as one operation on the CPU.
//!
//! candle's backward pass makes zeros for every node's gradient and adds to them. A product with a bias would be four
//! such nodes of the result's size; here it is one.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::host::{Elements, elements, fusable};

/// Rows whose sum a thread computes at once; the sum's order depends on nothing else.
const ROWS: usize = 4096;

/// `x [..., inputs] · weightᵀ + bias` as `[..., outputs]`, if all are f32 on the CPU; `weight` is `[outputs, inputs]`.
pub(crate) fn affine(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
    if !fusable(&[x, weight, bias.unwrap_or(weight)]) || x.elem_count() == 0 {
        return Ok(None);
    }
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    Ok(Some(match bias {
        Some(bias) => x.apply_op3(&weight, &bias.contiguous()?, Affine)?,
        None => x.apply_op2(&weight, Affine)?,
    }))
}

struct Affine;

impl Affine {
    fn product(x: &CpuStorage, lx: &Layout, weight: &CpuStorage, lw: &Layout) -> Result<(Vec<f32>, Shape)> {
        let (outputs, inputs) = lw.shape().dims2()?;
        let mut dims = lx.dims().to_vec();
        let Some(last) = dims.last_mut().filter(|last| **last == inputs) else {
            bail!("a product of {:?} and [{outputs}, {inputs}]", lx.dims());
        };
        *last = outputs;
        let rows = lx.shape().elem_count() / inputs;
        let flat = Layout::contiguous_with_offset((rows, inputs), lx.start_offset());
        match x.matmul(weight, (1, rows, outputs, inputs), &flat, &lw.transpose(0, 1)?)? {
            CpuStorage::F32(y) => Ok((y, Shape::from(dims))),
            _ => bail!("expected an f32 product"),
        }
    }

    /// The gradients of `x` and `weight`, and the output's gradient `[rows, outputs]`.
    fn gradients(x: &Tensor, weight: &Tensor, grad: &Tensor) -> Result<([Option<Tensor>; 2], Tensor)> {
        let (outputs, inputs) = weight.dims2()?;
        let grad = grad.contiguous()?.reshape(((), outputs))?;
        let dx = if x.track_op() { Some(grad.matmul(&weight.detach())?.reshape(x.dims())?) } else { None };
        let dw = if weight.track_op() {
            Some(grad.t()?.matmul(&x.detach().reshape(((), inputs))?)?)
        } else {
            None
        };
        Ok(([dx, dw], grad))
    }
}

impl CustomOp2 for Affine {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        weight: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (y, shape) = Self::product(x, lx, weight, lw)?;
        Ok((CpuStorage::F32(y), shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let ([dx, dw], _) = Self::gradients(x, weight, grad)?;
        Ok((dx, dw))
    }
}

impl CustomOp3 for Affine {
    fn name(&self) -> &'static str {
        "linear-with-bias"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        weight: &CpuStorage,
        lw: &Layout,
        bias: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (mut y, shape) = Self::product(x, lx, weight, lw)?;
        let bias = elements(bias, lb)?;
        if y.len() % bias.len() != 0 || lw.dims()[0] != bias.len() {
            bail!("a bias of {} for {:?}", bias.len(), shape);
        }
        y.par_chunks_mut(ROWS * bias.len()).for_each(|y| Arch::new().dispatch(AddRow { row: bias, y }));
        Ok((CpuStorage::F32(y), shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let ([dx, dw], grad) = Self::gradients(x, weight, grad)?;
        let db = if bias.track_op() {
            let elements = Elements::of(&grad);
            let db = column_sums(elements.get()?, bias.elem_count());
            Some(Tensor::from_vec(db, bias.dims(), bias.device())?)
        } else {
            None
        };
        Ok((dx, dw, db))
    }
}

/// Sums of the columns of rows of `width` numbers.
fn column_sums(rows: &[f32], width: usize) -> Vec<f32> {
    let part = |rows: &[f32]| {
        let mut sums = vec![0f32; width];
        Arch::new().dispatch(SumRows { rows, sums: &mut sums });
        sums
    };
    let parts: Vec<Vec<f32>> = rows.par_chunks(ROWS * width).map(part).collect();
    let mut sums = vec![0f32; width];
    for part in parts {
        sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
    sums
}

struct AddRow<'a> {
    row: &'a [f32],
    y: &'a mut [f32],
}

impl WithSimd for AddRow<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for y in self.y.chunks_exact_mut(self.row.len()) {
            y.iter_mut().zip(self.row).for_each(|(y, bias)| *y += bias);
        }
    }
}

struct SumRows<'a> {
    rows: &'a [f32],
    sums: &'a mut [f32],
}

impl WithSimd for SumRows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for row in self.rows.chunks_exact(self.sums.len()) {
            self.sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::nn::gradcheck::{assert_close, check, random};

    fn composed(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let y = x.broadcast_matmul(&weight.t()?)?;
        bias.map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))
    }

    #[test]
    fn equals_the_composed_product_with_gradients() {
        // More rows than a thread sums at once, one row, a transposed input.
        for (shape, outputs) in [(vec![3, 1500, 12], 7), (vec![1, 5], 3), (vec![2, 3, 4], 16)] {
            let inputs = shape[shape.len() - 1];
            let vars = [random(&shape, 1), random(&[outputs, inputs], 2), random(&[outputs], 3)];
            let [x, weight, bias] = vars.map(|tensor| Var::from_tensor(&tensor).unwrap());
            for with_bias in [true, false] {
                let bias = with_bias.then_some(bias.as_tensor());
                let run = |y: Tensor| {
                    let mix = random(y.dims(), 4);
                    let mut grads = (&y * &mix).unwrap().sum_all().unwrap().backward().unwrap();
                    (
                        y,
                        [&x, &weight].map(|var| grads.remove(var).unwrap()),
                        bias.and_then(|b| grads.remove(b)),
                    )
                };
                let fused = run(affine(&x, &weight, bias).unwrap().unwrap());
                let plain = run(composed(&x, &weight, bias).unwrap());
                assert_close(&fused.0, &plain.0, 1e-5);
                for (fused, plain) in fused.1.iter().zip(&plain.1) {
                    assert_close(fused, plain, 2e-4);
                }
                assert_eq!(fused.2.is_some(), with_bias);
                if let (Some(fused), Some(plain)) = (fused.2, plain.2) {
                    assert_close(&fused, &plain, 2e-4);
                }
            }
        }
    }

    #[test]
    fn gradients() {
        let inputs = [random(&[2, 3, 4], 5), random(&[6, 4], 6), random(&[6], 7)];
        check(&inputs, |t| Ok(affine(&t[0], &t[1], Some(&t[2]))?.unwrap()));
        check(&inputs[..2], |t| Ok(affine(&t[0].transpose(0, 1)?, &t[1], None)?.unwrap()));
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let (x, weight) = (random(&[2, 3], 1), random(&[4, 5], 2));
        assert!(affine(&x, &weight, None).is_err());
        assert!(affine(&random(&[2, 5], 1), &weight, Some(&random(&[8], 3))).is_err());
    }
}
