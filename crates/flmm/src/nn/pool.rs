//! Max pooling with a correct gradient.
//!
//! candle's max-pool backward divides every gradient by the window size (0.11), so it is not used.

use candle_core::{CpuStorage, CustomOp1, Layout, Result as CandleResult, Shape, Tensor, bail};

use super::host::{Elements, elements, fusable};
use crate::error::Result;

/// 2×2 max pooling with stride 2: `[n, c, h, w]` → `[n, c, h / 2, w / 2]` (an odd last row or column is
/// dropped). Of equal values the first in reading order takes the gradient.
pub fn max_pool2x2(x: &Tensor) -> Result<Tensor> {
    if fusable(&[x]) {
        return Ok(x.contiguous()?.apply_op1(MaxPool2x2)?);
    }
    let (n, c, h, w) = x.dims4()?;
    let (oh, ow) = (h / 2, w / 2);
    let x = x.narrow(2, 0, 2 * oh)?.narrow(3, 0, 2 * ow)?.reshape(&[n, c, oh, 2, ow, 2])?;
    let rows = x.narrow(3, 0, 1)?.maximum(&x.narrow(3, 1, 1)?)?;
    Ok(rows.narrow(5, 0, 1)?.maximum(&rows.narrow(5, 1, 1)?)?.reshape((n, c, oh, ow))?)
}

struct MaxPool2x2;

impl MaxPool2x2 {
    /// Calls `visit(output index, input index of the maximum)` for every window.
    fn for_each_maximum(
        x: &[f32],
        dims: &[usize],
        mut visit: impl FnMut(usize, usize),
    ) -> CandleResult<Shape> {
        let [n, c, h, w] = *dims else { bail!("max_pool2x2 expects [n, c, h, w], found {dims:?}") };
        let (oh, ow) = (h / 2, w / 2);
        let mut output = 0;
        for plane in 0..n * c {
            for y in 0..oh {
                for column in 0..ow {
                    let top = (plane * h + 2 * y) * w + 2 * column;
                    let mut best = top;
                    for candidate in [top + 1, top + w, top + w + 1] {
                        if x[candidate] > x[best] || x[candidate].is_nan() {
                            best = candidate;
                        }
                    }
                    visit(output, best);
                    output += 1;
                }
            }
        }
        Ok(Shape::from((n, c, oh, ow)))
    }
}

impl CustomOp1 for MaxPool2x2 {
    fn name(&self) -> &'static str {
        "max_pool2x2"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        let x = elements(storage, layout)?;
        let mut y = Vec::with_capacity(x.len() / 4);
        let shape = Self::for_each_maximum(x, layout.dims(), |_, from| y.push(x[from]))?;
        Ok((CpuStorage::F32(y), shape))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> CandleResult<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let (x_elements, grad_elements) = (Elements::of(x), Elements::of(&grad));
        let (values, grad) = (x_elements.get()?, grad_elements.get()?);
        let mut dx = vec![0f32; values.len()];
        Self::for_each_maximum(values, x.dims(), |output, from| dx[from] += grad[output])?;
        Ok(Some(Tensor::from_vec(dx, x.dims(), x.device())?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::nn::gradcheck::{check, random};

    #[test]
    fn picks_the_maximum_and_drops_odd_edges() {
        let x = Tensor::arange(0f32, 15., &Device::Cpu).unwrap().reshape((1, 1, 3, 5)).unwrap();
        let y = max_pool2x2(&x).unwrap();
        assert_eq!(y.dims(), [1, 1, 1, 2]);
        assert_eq!(y.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [6., 8.]);
    }

    #[test]
    fn gradient_goes_to_the_first_maximum() {
        let x = Var::new(&[[[[1f32, 1.], [1., 0.]]]], &Device::Cpu).unwrap();
        let grads = (max_pool2x2(&x).unwrap().sum_all().unwrap() * 3.).unwrap().backward().unwrap();
        let dx = grads.get(&x).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(dx, [3., 0., 0., 0.]);
    }

    #[test]
    fn gradients() {
        // Values 0.1 apart, so that a finite step never changes which one is largest.
        let mut order: Vec<f32> = (0..96).map(|i| ((i * 37) % 96) as f32 * 0.1).collect();
        order.swap(3, 50);
        let x = Tensor::from_vec(order, (2, 3, 4, 4), &Device::Cpu).unwrap();
        check(&[x], |t| max_pool2x2(&t[0]));
        let f64s = random(&[1, 2, 4, 6], 1).to_dtype(candle_core::DType::F64).unwrap();
        let fallback = max_pool2x2(&f64s).unwrap().to_dtype(candle_core::DType::F32).unwrap();
        let fused = max_pool2x2(&random(&[1, 2, 4, 6], 1)).unwrap();
        crate::nn::gradcheck::assert_close(&fused, &fallback, 0.0);
    }
}
