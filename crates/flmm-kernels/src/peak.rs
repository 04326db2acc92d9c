//! What the machine can do at most, measured: loops that only multiply and add, and loops that only read.

use half::bf16;
use half::slice::HalfFloatSliceExt;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Independent sums of a loop: enough that none waits for the one before. With 20 and more, Zen 4 multiplies bf16 at two
/// thirds of its speed where nothing is loaded in between.
pub(crate) const SUMS: usize = 16;

/// Places of memory that are read from side by side.
const STREAMS: usize = 4;

/// Floating-point operations that one thread did.
fn operations(turns: usize, per_instruction: usize) -> f64 {
    (turns * SUMS * per_instruction) as f64
}

/// A multiply-and-add loop in registers: `turns` times 16 instructions on every thread of the pool. Returns the
/// operations done in all, multiplications and additions counted apart.
pub fn multiply_add_f32(turns: usize) -> f64 {
    on_every_thread(|| Arch::new().dispatch(Spin { turns }))
}

/// As [`multiply_add_f32`], with bf16 factors and f32 sums, in tiles where there are any; `None` on a processor that
/// cannot multiply bf16.
pub fn multiply_add_bf16(turns: usize) -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    if let Some(amx) = crate::amx::Amx::detect() {
        return Some(on_every_thread(|| amx.spin(turns) as f64));
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(native) = crate::avx512::Avx512Bf16::detect() {
        return Some(on_every_thread(|| {
            std::hint::black_box(native.spin(turns));
            // Sixteen sums of two products each.
            operations(turns, 16 * 4)
        }));
    }
    let _ = turns;
    None
}

/// As [`multiply_add_f32`], with 32-bit integer sums and the factors that eight-bit weights are multiplied by in many rows: of
/// eight bits, or with AVX2 of sixteen; `None` on a processor that multiplies them in f32.
pub fn multiply_add_int8(turns: usize) -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    if let Some(vnni) = crate::vnni::Vnni::detect() {
        return Some(on_every_thread(|| {
            std::hint::black_box(vnni.spin(turns));
            // Sixteen sums of four products each.
            operations(turns, 16 * 8)
        }));
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(avx2) = crate::int8::in_words() {
        return Some(on_every_thread(|| {
            std::hint::black_box(avx2.spin(turns));
            // Eight sums of two products each.
            operations(turns, 8 * 4)
        }));
    }
    let _ = turns;
    None
}

/// Reads all of `data` once, on all threads of the pool. Returns the number of bytes.
pub fn read(data: &[bf16]) -> f64 {
    let parts = data.par_chunks(1 << 18);
    std::hint::black_box(parts.map(|part| Arch::new().dispatch(Read { part })).reduce(|| 0, |a, b| a ^ b));
    size_of_val(data) as f64
}

fn on_every_thread(work: impl Fn() -> f64 + Sync) -> f64 {
    rayon::broadcast(|_| work()).into_iter().sum()
}

struct Spin {
    turns: usize,
}

impl WithSimd for Spin {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f64 {
        // Sixteen sums and a factor do not fit sixteen registers.
        match S::REGISTER_COUNT > SUMS {
            true => spin::<S, SUMS>(simd, self.turns),
            false => spin::<S, { SUMS * 3 / 4 }>(simd, self.turns * 4 / 3),
        }
        operations(self.turns, 2 * S::F32_LANES)
    }
}

/// Multiplies and adds in registers, `N` instructions a turn.
#[inline(always)]
fn spin<S: Simd, const N: usize>(simd: S, turns: usize) {
    let mut sums = [simd.splat_f32s(0.0); N];
    let factor = simd.splat_f32s(std::hint::black_box(1e-3));
    for _ in 0..turns {
        for sum in &mut sums {
            *sum = simd.mul_add_e_f32s(factor, *sum, factor);
        }
    }
    let total = sums.into_iter().fold(simd.splat_f32s(0.0), |total, sum| simd.add_f32s(total, sum));
    std::hint::black_box(simd.reduce_sum_f32s(total));
}

struct Read<'a> {
    part: &'a [bf16],
}

impl WithSimd for Read<'_> {
    type Output = u16;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> u16 {
        // Several streams side by side: one alone leaves a part of the memory's speed unused.
        let numbers = self.part.reinterpret_cast();
        if S::F32_LANES == 1 {
            return numbers.iter().fold(0, |all, x| all ^ x);
        }
        let (vectors, rest) = S::as_simd_u16s(numbers);
        let mut streams = vectors.chunks(vectors.len().div_ceil(STREAMS).max(1));
        let streams: [&[S::u16s]; STREAMS] = std::array::from_fn(|_| streams.next().unwrap_or_default());
        let mut all = [simd.splat_u32s(0); STREAMS];
        for k in 0..streams[0].len() {
            for (all, stream) in all.iter_mut().zip(&streams) {
                if let Some(&vector) = stream.get(k) {
                    *all = simd.xor_u32s(*all, bytemuck::cast(vector));
                }
            }
        }
        let all = all.map(bytemuck::cast::<S::u32s, S::u16s>);
        let lanes: &[u16] = bytemuck::cast_slice(&all);
        lanes.iter().chain(rest).fold(0, |all, x| all ^ x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_numbers_are_read() {
        for len in [0usize, 1, 63, 64, 65, 1000, 4099] {
            for at in [0, len / 2, len.saturating_sub(1)] {
                let mut data = vec![bf16::from_bits(0); len];
                if let Some(number) = data.get_mut(at) {
                    *number = bf16::from_bits(0x1234);
                }
                let read = Arch::new().dispatch(Read { part: &data });
                assert_eq!(read, if len > 0 { 0x1234 } else { 0 }, "number {at} of {len}");
            }
        }
    }
}
