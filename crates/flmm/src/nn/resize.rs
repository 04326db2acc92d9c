//! Bilinear and nearest resizing with gradients (`spec/pipeline.md` §3.2): half-pixel centres, edge clamping, no
//! antialiasing, coefficients in f32.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{
    CpuStorage, CustomOp1, D, DType, Device, Layout, Result as CandleResult, Shape, Tensor, bail,
};
use rayon::prelude::*;

use super::host::{Elements, elements, fusable};
use crate::error::Result;

/// Bilinear resize of `x [.., h, w]` to `[.., height, width]` by the ratio rule: scale = in / out.
pub fn bilinear(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    resize(x, Taps::by_ratio(x.dim(D::Minus2)?, height), Taps::by_ratio(x.dim(D::Minus1)?, width))
}

/// The part `rows × columns` of [`bilinear`], without computing the rest: `[.., rows, columns]`.
pub fn bilinear_part(
    x: &Tensor,
    (height, width): (usize, usize),
    rows: Range<usize>,
    columns: Range<usize>,
) -> Result<Tensor> {
    for (part, whole) in [(&rows, height), (&columns, width)] {
        if part.end > whole || part.is_empty() {
            return Err(candle_core::Error::msg(format!("part {part:?} of a side of {whole}")).into());
        }
    }
    let (all_rows, all_columns) =
        (Taps::by_ratio(x.dim(D::Minus2)?, height), Taps::by_ratio(x.dim(D::Minus1)?, width));
    if all_rows.is_identity() && all_columns.is_identity() {
        return Ok(x.narrow(D::Minus2, rows.start, rows.len())?.narrow(
            D::Minus1,
            columns.start,
            columns.len(),
        )?);
    }
    let (rows, top, height) = all_rows.part(rows);
    let (columns, left, width) = all_columns.part(columns);
    resize(&x.narrow(D::Minus2, top, height)?.narrow(D::Minus1, left, width)?, rows, columns)
}

/// Bilinear resize of `x [.., h, w]` by the scale-factor rule: size `int(in · factor)`, scale = 1 / factor.
pub fn bilinear_scaled(x: &Tensor, factor: f64) -> Result<Tensor> {
    let (h, w) = (x.dim(D::Minus2)?, x.dim(D::Minus1)?);
    resize(x, Taps::by_factor(h, factor), Taps::by_factor(w, factor))
}

/// Nearest resize of `x [.., h, w]` (any type): source index `min(floor(i · (in / out)), in − 1)`.
pub fn nearest(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    let pick = |x: &Tensor, dim: usize, output: usize| -> CandleResult<Tensor> {
        let input = x.dim(dim)?;
        if input == output {
            return Ok(x.clone());
        }
        let scale = input as f32 / output as f32;
        let source = |i: usize| ((i as f32 * scale) as usize).min(input - 1) as u32;
        let source: Vec<u32> = (0..output).map(source).collect();
        x.contiguous()?.index_select(&Tensor::from_vec(source, output, x.device())?, dim)
    };
    let rank = x.rank();
    if rank < 2 {
        return Err(candle_core::Error::msg("nearest expects [.., h, w]").into());
    }
    Ok(pick(&pick(x, rank - 2, height)?, rank - 1, width)?)
}

/// For every output position: the two source positions and the weight of the second.
pub(super) struct Taps {
    input: usize,
    first: Vec<usize>,
    second: Vec<usize>,
    lambda: Vec<f32>,
}

impl Taps {
    fn by_ratio(input: usize, output: usize) -> Self {
        Self::new(input, output, input as f32 / output as f32)
    }

    pub(super) fn by_factor(input: usize, factor: f64) -> Self {
        Self::new(input, (input as f64 * factor) as usize, (1.0 / factor) as f32)
    }

    fn new(input: usize, output: usize, scale: f32) -> Self {
        let last = input.saturating_sub(1);
        let mut taps = Self { input, first: vec![], second: vec![], lambda: vec![] };
        for i in 0..output {
            let source = (scale * (i as f32 + 0.5) - 0.5).max(0.0);
            let first = (source as usize).min(last);
            taps.first.push(first);
            taps.second.push((first + 1).min(last));
            taps.lambda.push((source - first as f32).clamp(0.0, 1.0));
        }
        taps
    }

    pub(super) fn output(&self) -> usize {
        self.first.len()
    }

    /// The taps of the output positions `part`, not empty, on the part of the input that they reach: its first position
    /// and its size.
    fn part(&self, part: Range<usize>) -> (Self, usize, usize) {
        let from = self.first[part.start];
        let count = self.second[part.end - 1] + 1 - from;
        let moved = |taps: &[usize]| taps[part.clone()].iter().map(|tap| tap - from).collect();
        let taps = Self {
            input: count,
            first: moved(&self.first),
            second: moved(&self.second),
            lambda: self.lambda[part].to_vec(),
        };
        (taps, from, count)
    }

    fn is_identity(&self) -> bool {
        self.input == self.output()
            && self.lambda.iter().all(|&l| l == 0.0)
            && self.first.iter().enumerate().all(|(i, &f)| i == f)
    }

    /// Adds the weights of the output position `i` to `row [input]`.
    pub(super) fn add_weights(&self, i: usize, row: &mut [f32]) {
        row[self.first[i]] += 1.0 - self.lambda[i];
        row[self.second[i]] += self.lambda[i];
    }

    /// The `[output, input]` matrix.
    fn matrix(&self, device: &Device) -> CandleResult<Tensor> {
        let mut matrix = vec![0f32; self.output() * self.input];
        for (i, row) in matrix.chunks_exact_mut(self.input).enumerate() {
            self.add_weights(i, row);
        }
        Tensor::from_vec(matrix, (self.output(), self.input), device)
    }
}

fn resize(x: &Tensor, rows: Taps, columns: Taps) -> Result<Tensor> {
    if rows.is_identity() && columns.is_identity() {
        return Ok(x.clone());
    }
    if rows.input == 0 || columns.input == 0 {
        return Err(candle_core::Error::msg("cannot resize an empty map").into());
    }
    let op = Bilinear { rows: Arc::new(rows), columns: Arc::new(columns) };
    let wide = x.to_dtype(DType::F32)?;
    let y = if fusable(&[&wide]) { wide.contiguous()?.apply_op1(op)? } else { op.composed(&wide)? };
    Ok(y.to_dtype(x.dtype())?)
}

#[derive(Clone)]
struct Bilinear {
    rows: Arc<Taps>,
    columns: Arc<Taps>,
}

impl Bilinear {
    /// The same as two products with constant matrices, for other devices.
    fn composed(&self, x: &Tensor) -> CandleResult<Tensor> {
        let (h, w, width) = (self.rows.input, self.columns.input, self.columns.output());
        let maps = x.elem_count() / (h * w);
        let wide = x.reshape((maps * h, w))?.matmul(&self.columns.matrix(x.device())?.t()?)?;
        let rows = self.rows.matrix(x.device())?.unsqueeze(0)?;
        rows.broadcast_matmul(&wide.reshape((maps, h, width))?)?.reshape(self.output_dims(x.dims())?)
    }

    fn output_dims(&self, dims: &[usize]) -> CandleResult<Vec<usize>> {
        match dims {
            [lead @ .., h, w] if *h == self.rows.input && *w == self.columns.input => {
                Ok(lead.iter().copied().chain([self.rows.output(), self.columns.output()]).collect())
            }
            _ => bail!("bilinear expects [.., h, w], found {dims:?}"),
        }
    }
}

impl CustomOp1 for Bilinear {
    fn name(&self) -> &'static str {
        "bilinear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        let dims = self.output_dims(layout.dims())?;
        let (h, w, height, width) =
            (self.rows.input, self.columns.input, self.rows.output(), self.columns.output());
        let x = elements(storage, layout)?;
        let mut y = vec![0f32; dims.iter().product()];
        y.par_chunks_mut((height * width).max(1)).zip(x.par_chunks(h * w)).for_each(|(y, x)| {
            let mut wide = vec![0f32; h * width];
            for (to, from) in wide.chunks_mut(width.max(1)).zip(x.chunks(w)) {
                for (i, to) in to.iter_mut().enumerate() {
                    let lambda = self.columns.lambda[i];
                    *to =
                        (1.0 - lambda) * from[self.columns.first[i]] + lambda * from[self.columns.second[i]];
                }
            }
            for (i, y) in y.chunks_mut(width.max(1)).enumerate() {
                let lambda = self.rows.lambda[i];
                let upper = &wide[self.rows.first[i] * width..][..width];
                let lower = &wide[self.rows.second[i] * width..][..width];
                for ((y, a), b) in y.iter_mut().zip(upper).zip(lower) {
                    *y = (1.0 - lambda) * a + lambda * b;
                }
            }
        });
        Ok((CpuStorage::F32(y), Shape::from(dims)))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> CandleResult<Option<Tensor>> {
        let (h, w, height, width) =
            (self.rows.input, self.columns.input, self.rows.output(), self.columns.output());
        let grad = grad.contiguous()?;
        let handle = Elements::of(&grad);
        let mut dx = vec![0f32; x.elem_count()];
        dx.par_chunks_mut(h * w).zip(handle.get()?.par_chunks((height * width).max(1))).for_each(
            |(dx, grad)| {
                let mut wide = vec![0f32; h * width];
                for (i, grad) in grad.chunks(width.max(1)).enumerate() {
                    let lambda = self.rows.lambda[i];
                    let upper = &mut wide[self.rows.first[i] * width..][..width];
                    upper.iter_mut().zip(grad).for_each(|(to, g)| *to += (1.0 - lambda) * g);
                    let lower = &mut wide[self.rows.second[i] * width..][..width];
                    lower.iter_mut().zip(grad).for_each(|(to, g)| *to += lambda * g);
                }
                for (to, from) in dx.chunks_mut(w).zip(wide.chunks(width.max(1))) {
                    for (i, g) in from.iter().enumerate() {
                        let lambda = self.columns.lambda[i];
                        to[self.columns.first[i]] += (1.0 - lambda) * g;
                        to[self.columns.second[i]] += lambda * g;
                    }
                }
            },
        );
        Ok(Some(Tensor::from_vec(dx, x.dims(), x.device())?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::gradcheck::{assert_close, check, random};

    fn values(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn sizes_of_the_scale_factor_rule() {
        // spec/pipeline.md §3.2: int(in · (64 / in)) is 64 for all sides but 49.
        for side in 1..=64usize {
            let x = Tensor::zeros((side, side), DType::F32, &Device::Cpu).unwrap();
            let expected = if side == 49 { 63 } else { 64 };
            let y = bilinear_scaled(&x, 64.0 / side as f64).unwrap();
            assert_eq!(y.dims(), [expected, expected]);
        }
        let x = Tensor::zeros((48, 32), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(bilinear_scaled(&x, 64.0 / 48.0).unwrap().dims(), [64, 42]);
    }

    #[test]
    fn the_two_rules_differ_where_the_size_is_truncated() {
        let x = Tensor::arange(0f32, 32., &Device::Cpu).unwrap().reshape((1, 32)).unwrap();
        let scaled = values(&bilinear_scaled(&x, 64.0 / 48.0).unwrap());
        let ratio = values(&bilinear(&x, 1, 42).unwrap());
        assert_eq!(scaled[41], 0.75f32 * 41.5 - 0.5);
        assert_eq!(ratio[41], 31.0);
        assert!((ratio[40] - (32f32 / 42. * 40.5 - 0.5)).abs() < 1e-5);
    }

    #[test]
    fn same_size_is_an_exact_copy_and_dtype_is_kept() {
        let x = random(&[2, 5, 7], 1);
        assert_eq!(values(&bilinear(&x, 5, 7).unwrap()), values(&x));
        assert_eq!(values(&bilinear_scaled(&x, 1.0).unwrap()), values(&x));
        let half = x.to_dtype(DType::BF16).unwrap();
        assert_eq!(bilinear(&half, 9, 9).unwrap().dtype(), DType::BF16);
    }

    #[test]
    fn fused_equals_matrices_up_and_down() {
        let x = random(&[2, 3, 9, 14], 2);
        for (height, width) in [(18, 28), (4, 5), (64, 3), (1, 1)] {
            let op = Bilinear {
                rows: Arc::new(Taps::new(9, height, 9.0 / height as f32)),
                columns: Arc::new(Taps::new(14, width, 14.0 / width as f32)),
            };
            assert_close(&bilinear(&x, height, width).unwrap(), &op.composed(&x).unwrap(), 1e-6);
        }
    }

    #[test]
    fn nearest_has_no_half_pixel_offset() {
        let x = Tensor::arange(0u32, 5, &Device::Cpu).unwrap().to_dtype(DType::U8).unwrap();
        let y = nearest(&x.reshape((1, 5)).unwrap(), 2, 3).unwrap();
        assert_eq!(y.to_vec2::<u8>().unwrap(), [[0, 1, 3], [0, 1, 3]]);
    }

    #[test]
    fn gradients() {
        let x = [random(&[2, 4, 5], 3)];
        check(&x, |t| bilinear(&t[0], 7, 3));
        check(&x, |t| bilinear_scaled(&t[0], 1.6));
        check(&x, |t| nearest(&t[0], 9, 2));
    }

    #[test]
    fn parts_are_those_of_the_whole() -> Result<()> {
        for (h, w, height, width) in [(3, 4, 12, 8), (5, 5, 7, 3), (8, 2, 8, 2), (9, 4, 4, 4)] {
            let values: Vec<f32> = (0..2 * h * w).map(|i| (i as f32 * 1.7).sin()).collect();
            let x = Tensor::from_vec(values, (2, h, w), &Device::Cpu)?;
            let whole = bilinear(&x, height, width)?;
            let size = (height, width);
            for rows in [0..height, 0..1, height - 1..height, 1..height - 1] {
                for columns in [0..width, 0..1, width - 1..width] {
                    let part = bilinear_part(&x, size, rows.clone(), columns.clone())?;
                    let expected = whole.narrow(1, rows.start, rows.len())?;
                    let expected = expected.narrow(2, columns.start, columns.len())?;
                    assert_eq!(part.to_vec3::<f32>()?, expected.to_vec3::<f32>()?);
                }
            }
            assert!(bilinear_part(&x, size, 0..height + 1, 0..1).is_err());
            assert!(bilinear_part(&x, size, 0..1, width..width + 1).is_err());
            assert!(bilinear_part(&x, size, 1..1, 0..width).is_err());
        }
        Ok(())
    }
}
