//! The 3×3 convolution: strips of unfolded columns times the weight matrix.
//!
//! The rows of the whole batch are cut into strips. A strip is unfolded into a `[9 · in, columns]` matrix small
//! enough to stay in the cache, and multiplied. Nothing of it is kept for the backward pass, which unfolds
//! again: the gradient of `x` is the same convolution of the output's gradient with the flipped, transposed
//! kernel, and the gradient of the weight is a sum over strips of `grad · columnsᵀ`.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::host::{Elements, elements, fusable};

/// Columns of a strip hold about this many numbers (2 MiB), so that a strip stays in the second-level cache.
const STRIP_ELEMENTS: usize = 512 * 1024;
/// A product narrower than this wastes time on packing, however large the columns get.
const MIN_STRIP_COLUMNS: usize = 256;

/// `x [n, in, h, w]`, `weight [out, in, 3, 3]` → `[n, out, h, w]`, stride 1, zero padding 1.
pub(crate) fn conv3x3(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if fusable(&[x, weight]) {
        // A constant input (the first layer's) needs no gradient, which saves a third of its backward pass.
        let op = Conv3x3 { input_gradient: x.track_op(), weight_gradient: weight.track_op() };
        x.contiguous()?.apply_op2(&weight.contiguous()?, op)
    } else {
        composed(x, weight)
    }
}

/// The same from candle's operations, for other devices and types.
fn composed(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (n, inputs, h, w) = x.dims4()?;
    let (outputs, ..) = weight.dims4()?;
    let padded = x.pad_with_zeros(2, 1, 1)?.pad_with_zeros(3, 1, 1)?;
    let mut shifted = Vec::with_capacity(9);
    for dy in 0..3 {
        for dx in 0..3 {
            shifted.push(padded.narrow(2, dy, h)?.narrow(3, dx, w)?);
        }
    }
    let columns = Tensor::stack(&shifted, 2)?.reshape((n, inputs * 9, h * w))?;
    let y = weight.reshape((1, outputs, inputs * 9))?.broadcast_matmul(&columns)?;
    y.reshape((n, outputs, h, w))
}

struct Conv3x3 {
    input_gradient: bool,
    weight_gradient: bool,
}

impl CustomOp2 for Conv3x3 {
    fn name(&self) -> &'static str {
        "conv3x3"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        k: &CpuStorage,
        lk: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let batch = Batch::new(lx.dims())?;
        let (outputs, inputs, ..) = lk.shape().dims4()?;
        if inputs != batch.channels {
            bail!("conv3x3: {} input channels, the weight expects {inputs}", batch.channels);
        }
        let y = batch.convolve(elements(x, lx)?, elements(k, lk)?.to_vec(), outputs)?;
        Ok((CpuStorage::F32(y), Shape::from((batch.n, outputs, batch.h, batch.w))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        k: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (x, grad) = (x.contiguous()?, grad.contiguous()?);
        let (x_elements, grad_elements) = (Elements::of(&x), Elements::of(&grad));
        let (outputs, inputs, ..) = k.dims4()?;
        let dk = if self.weight_gradient {
            let dk =
                Batch::new(x.dims())?.weight_gradient(x_elements.get()?, grad_elements.get()?, outputs)?;
            Some(Tensor::from_vec(dk, k.dims(), k.device())?)
        } else {
            None
        };
        let dx = if self.input_gradient {
            let k = k.contiguous()?;
            let kernel = flipped(Elements::of(&k).get()?, outputs, inputs);
            let dx = Batch::new(grad.dims())?.convolve(grad_elements.get()?, kernel, inputs)?;
            Some(Tensor::from_vec(dx, x.dims(), x.device())?)
        } else {
            None
        };
        Ok((dx, dk))
    }
}

/// `[out, in, 3, 3]` → `[in, out, 3, 3]` with every kernel turned by 180°.
fn flipped(kernel: &[f32], outputs: usize, inputs: usize) -> Vec<f32> {
    let mut turned = vec![0f32; kernel.len()];
    for o in 0..outputs {
        for i in 0..inputs {
            let (from, to) = ((o * inputs + i) * 9, (i * outputs + o) * 9);
            for tap in 0..9 {
                turned[to + tap] = kernel[from + 8 - tap];
            }
        }
    }
    turned
}

/// The geometry of a batch of maps `[n, channels, h, w]`.
struct Batch {
    n: usize,
    channels: usize,
    h: usize,
    w: usize,
}

impl Batch {
    fn new(dims: &[usize]) -> Result<Self> {
        match *dims {
            [n, channels, h, w] => Ok(Self { n, channels, h, w }),
            _ => bail!("conv3x3 expects [n, channels, h, w], found {dims:?}"),
        }
    }

    /// The batch's rows (image-major), cut into strips `(first row, number of rows)`.
    fn strips(&self) -> impl Iterator<Item = (usize, usize)> {
        let columns = (STRIP_ELEMENTS / (9 * self.channels).max(1)).max(MIN_STRIP_COLUMNS);
        let per_strip = (columns / self.w.max(1)).max(1);
        let rows = self.n * self.h;
        (0..rows).step_by(per_strip).map(move |first| (first, per_strip.min(rows - first)))
    }

    /// Fills `columns [9 · channels, rows · w]`: row `9 c + 3 dy + dx` is channel `c` shifted by that tap.
    fn unfold(&self, x: &[f32], (first, rows): (usize, usize), columns: &mut Vec<f32>) {
        let (h, w) = (self.h, self.w);
        columns.clear();
        for channel in 0..self.channels {
            for dy in 0..3 {
                for dx in 0..3 {
                    for row in first..first + rows {
                        let (image, y) = (row / h, row % h + dy);
                        if y == 0 || y > h {
                            columns.resize(columns.len() + w, 0.0);
                            continue;
                        }
                        let start = ((image * self.channels + channel) * h + y - 1) * w;
                        let source = &x[start..start + w];
                        match dx {
                            0 => {
                                columns.push(0.0);
                                columns.extend_from_slice(&source[..w - 1]);
                            }
                            1 => columns.extend_from_slice(source),
                            _ => {
                                columns.extend_from_slice(&source[1..]);
                                columns.push(0.0);
                            }
                        }
                    }
                }
            }
        }
    }

    /// The convolution of `x` with `kernel [outputs, channels, 3, 3]`.
    fn convolve(&self, x: &[f32], kernel: Vec<f32>, outputs: usize) -> Result<Vec<f32>> {
        let (k, plane) = (9 * self.channels, self.h * self.w);
        let kernel = CpuStorage::F32(kernel);
        let kernel_layout = Layout::contiguous((outputs, k));
        let mut y = vec![0f32; self.n * outputs * plane];
        let mut columns = Vec::new();
        for strip in self.strips() {
            self.unfold(x, strip, &mut columns);
            let width = strip.1 * self.w;
            let rhs = CpuStorage::F32(std::mem::take(&mut columns));
            let product = kernel.matmul(
                &rhs,
                (1, outputs, width, k),
                &kernel_layout,
                &Layout::contiguous((k, width)),
            )?;
            if let CpuStorage::F32(buffer) = rhs {
                columns = buffer;
            }
            let product = product.as_slice::<f32>()?;
            self.for_each_run(strip, |image, from, offset, len| {
                for o in 0..outputs {
                    let to = (image * outputs + o) * plane + offset;
                    let source = o * width + from;
                    y[to..to + len].copy_from_slice(&product[source..source + len]);
                }
            });
        }
        Ok(y)
    }

    /// The gradient `[outputs, channels, 3, 3]` given the output's gradient `[n, outputs, h, w]`.
    fn weight_gradient(&self, x: &[f32], grad: &[f32], outputs: usize) -> Result<Vec<f32>> {
        let (k, plane) = (9 * self.channels, self.h * self.w);
        let mut sum = vec![0f32; outputs * k];
        let (mut columns, mut rows) = (Vec::new(), Vec::new());
        for strip in self.strips() {
            self.unfold(x, strip, &mut columns);
            let width = strip.1 * self.w;
            rows.clear();
            rows.resize(outputs * width, 0.0);
            self.for_each_run(strip, |image, to, offset, len| {
                for o in 0..outputs {
                    let from = (image * outputs + o) * plane + offset;
                    rows[o * width + to..o * width + to + len].copy_from_slice(&grad[from..from + len]);
                }
            });
            let (lhs, rhs) =
                (CpuStorage::F32(std::mem::take(&mut rows)), CpuStorage::F32(std::mem::take(&mut columns)));
            let transposed = Layout::contiguous((k, width)).transpose(0, 1)?;
            let product =
                lhs.matmul(&rhs, (1, outputs, k, width), &Layout::contiguous((outputs, width)), &transposed)?;
            for (total, term) in sum.iter_mut().zip(product.as_slice::<f32>()?) {
                *total += term;
            }
            if let (CpuStorage::F32(lhs), CpuStorage::F32(rhs)) = (lhs, rhs) {
                (rows, columns) = (lhs, rhs);
            }
        }
        Ok(sum)
    }

    /// Calls `visit(image, column in the strip, offset in the plane, length)` for every part of one image.
    fn for_each_run(&self, (first, rows): (usize, usize), mut visit: impl FnMut(usize, usize, usize, usize)) {
        let mut row = first;
        while row < first + rows {
            let (image, y) = (row / self.h, row % self.h);
            let count = (self.h - y).min(first + rows - row);
            visit(image, (row - first) * self.w, y * self.w, count * self.w);
            row += count;
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::nn::gradcheck::{assert_close, random};

    #[test]
    fn fused_equals_composed_with_gradients() {
        let x = Var::from_tensor(&random(&[3, 37, 19, 23], 1)).unwrap();
        let k = Var::from_tensor(&random(&[11, 37, 3, 3], 2)).unwrap();
        let mix = random(&[3, 11, 19, 23], 3);
        let run = |f: fn(&Tensor, &Tensor) -> Result<Tensor>| {
            let y = f(&x, &k).unwrap();
            let grads = (&y * &mix).unwrap().sum_all().unwrap().backward().unwrap();
            (y, grads.get(&x).unwrap().clone(), grads.get(&k).unwrap().clone())
        };
        let (fused, reference) = (run(conv3x3), run(composed));
        assert_close(&fused.0, &reference.0, 3e-5);
        assert_close(&fused.1, &reference.1, 3e-5);
        assert_close(&fused.2, &reference.2, 3e-4);
    }
}
