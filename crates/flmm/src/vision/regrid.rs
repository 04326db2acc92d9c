//! Learned positions of a tower that reads pictures of another size than it was trained on (`spec/models.md` §9).

use candle_core::{DType, Tensor};

use crate::error::{Error, Result};

/// Positions `[extra + from², width]` → `[extra + to², width]`, in the type of `table`.
///
/// The last `from²` rows are a square grid, row-major; rows before them (a class token's) keep their values.
/// Bicubic with a = −0.75 and half-pixel centres, no antialiasing, in f32. The reference keeps the result in f16
/// before it becomes the model's type again, so all rows are rounded to f16 on the way. A grid that keeps its
/// side is not touched.
///
/// # Errors
/// [`Error::Request`] if the table has fewer than `from²` rows or a side is 0.
pub fn regrid(table: &Tensor, from: usize, to: usize) -> Result<Tensor> {
    if from == to {
        return Ok(table.clone());
    }
    let (rows, width) = table.dims2()?;
    let Some(extra) = rows.checked_sub(from * from).filter(|_| from > 0 && to > 0) else {
        return Err(Error::request(
            format!("{rows} positions cannot be re-gridded from {from} × {from} to {to} × {to}"),
            "check the tower's picture and patch size",
        ));
    };
    let wide = table.to_dtype(DType::F32)?;
    let grid = wide.narrow(0, extra, from * from)?.flatten_all()?.to_vec1::<f32>()?;
    let taps = taps(from, to);
    let columns = along(&grid, from, width, &taps);
    let both = along(&columns, from, to * width, &taps);
    let grid = Tensor::from_vec(both, (to * to, width), table.device())?;
    let all = Tensor::cat(&[&wide.narrow(0, 0, extra)?, &grid], 0)?;
    Ok(all.to_dtype(DType::F16)?.to_dtype(table.dtype())?)
}

/// The four source positions of an output position, clamped to the grid, and their weights.
type Tap = [(usize, f32); 4];

fn taps(from: usize, to: usize) -> Vec<Tap> {
    const A: f32 = -0.75;
    // The order of roundings is the one that reproduces the recorded tables to the last bit: a value in the middle
    // between two f16 numbers turns a change of 1e-7 into one of 5e-4.
    let near = |x: f32| ((A + 2.0) * x - (A + 3.0)) * (x * x) + 1.0;
    let far = |x: f32| A.mul_add(x, -5.0 * A).mul_add(x, 8.0 * A) * x - 4.0 * A;
    let scale = from as f32 / to as f32;
    let tap = |i: usize| {
        let source = scale * (i as f32 + 0.5) - 0.5;
        let first = source.floor();
        let t = source - first;
        let at = |offset: f32| (first + offset).clamp(0.0, (from - 1) as f32) as usize;
        let back = 1.0 - t;
        [(at(-1.0), far(t + 1.0)), (at(0.0), near(t)), (at(1.0), near(back)), (at(2.0), far(back + 1.0))]
    };
    (0..to).map(tap).collect()
}

/// Interpolates the middle axis of `[outer, from, inner]`.
fn along(values: &[f32], from: usize, inner: usize, taps: &[Tap]) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len() / from * taps.len());
    for block in values.chunks_exact(from * inner) {
        for tap in taps {
            let mixed =
                |i: usize| tap.iter().map(|&(at, weight)| weight * block[at * inner + i]).sum::<f32>();
            out.extend((0..inner).map(mixed));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn a_constant_stays_and_a_ramp_keeps_its_middle() -> Result<()> {
        let device = Device::Cpu;
        let flat = Tensor::full(0.5f32, (17, 3), &device)?;
        assert_eq!(regrid(&flat, 4, 7)?.to_vec2::<f32>()?, vec![vec![0.5f32; 3]; 50]);
        let ramp = Tensor::arange(0f32, 16., &device)?.reshape((16, 1))?;
        let middle = regrid(&ramp, 4, 7)?.to_vec2::<f32>()?[24][0];
        assert!((middle - 7.5).abs() < 1e-6, "{middle}");
        Ok(())
    }

    #[test]
    fn the_same_grid_is_not_rounded_and_a_short_table_is_refused() -> Result<()> {
        let table = Tensor::full(0.1f32, (4, 2), &Device::Cpu)?;
        assert_eq!(regrid(&table, 2, 2)?.to_vec2::<f32>()?[0], [0.1f32; 2]);
        for (from, to) in [(3, 4), (0, 4), (2, 0)] {
            assert!(matches!(regrid(&table, from, to), Err(Error::Request { .. })), "{from} → {to}");
        }
        Ok(())
    }
}
