//! What the fused operations share: reading f32 CPU tensors as slices, and an `exp` the compiler can vectorise.

use candle_core::{CpuStorage, DType, Device, Layout, Storage, Tensor};

/// Whether the fused f32 CPU path applies to `x`; other devices and types take the composed path.
pub(super) fn is_cpu_f32(x: &Tensor) -> bool {
    x.dtype() == DType::F32 && matches!(x.device(), Device::Cpu)
}

/// The elements of a contiguous f32 CPU storage.
pub(super) fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(data), Some((start, end))) => Ok(&data[start..end]),
        (CpuStorage::F32(_), None) => candle_core::bail!("a fused operation needs a contiguous tensor"),
        _ => candle_core::bail!("a fused operation needs an f32 tensor"),
    }
}

/// Calls `f` with the elements of `x` in row-major order, copying only when `x` is strided.
pub(super) fn with_slice<R>(x: &Tensor, f: impl FnOnce(&[f32]) -> R) -> candle_core::Result<R> {
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok(f(slice(storage, layout)?)),
        _ => candle_core::bail!("a fused operation needs a CPU tensor"),
    }
}

/// `eˣ` to about 1e-7 relative, without branches or calls so that loops over it vectorise.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Cody-Waite reduction to |r| ≤ ln2 / 2, then a degree-6 polynomial; 1.5·2²³ rounds to nearest.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let n = (x * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 0.166_666_65;
    let p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    y * f32::from_bits(((n as i32 + 127) as u32) << 23)
}

#[cfg(test)]
mod tests {
    #[test]
    fn exp_is_accurate_over_its_range() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let expected = f64::from(x).exp();
            let relative = (f64::from(super::exp(x)) - expected).abs() / expected;
            assert!(relative < 3e-7, "exp({x}) is off by {relative}");
        }
    }
}
