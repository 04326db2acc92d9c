//! Numbers of operands as 32-bit units.

use half::bf16;
#[cfg(target_arch = "x86_64")]
use half::slice::HalfFloatSliceExt;

use crate::line::LANES;

/// How the numbers of a row become units of a packed operand.
pub(crate) trait Units<T>: Copy + Send + Sync {
    /// Numbers that one unit holds.
    const PER_UNIT: usize;

    /// Writes `numbers` as units; a last unit that is not full is filled with zeros, and so are all further ones.
    fn write(numbers: &[T], units: &mut [u32]);

    /// The unit of two neighbouring numbers; of the first alone where a unit holds only one.
    fn of(first: T, second: T) -> u32;
}

/// Two neighbouring bf16 numbers, the first in the low half.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Pairs;

/// One f32.
#[derive(Clone, Copy)]
pub(crate) struct Singles;

#[cfg(target_arch = "x86_64")]
impl Units<bf16> for Pairs {
    const PER_UNIT: usize = 2;

    #[inline(always)]
    fn write(numbers: &[bf16], units: &mut [u32]) {
        let (pairs, rest) = numbers.reinterpret_cast().as_chunks::<2>();
        let (full, padding) = units.split_at_mut(pairs.len());
        // The first of two is the low half on this processor, as it lies in memory.
        bytemuck::cast_slice_mut(full).copy_from_slice(pairs.as_flattened());
        padding.fill(0);
        if let ([last], [unit, ..]) = (rest, padding) {
            *unit = u32::from(*last);
        }
    }

    #[inline(always)]
    fn of(first: bf16, second: bf16) -> u32 {
        u32::from(first.to_bits()) | u32::from(second.to_bits()) << 16
    }
}

impl Units<bf16> for Singles {
    const PER_UNIT: usize = 1;

    #[inline(always)]
    fn write(numbers: &[bf16], units: &mut [u32]) {
        let (full, padding) = units.split_at_mut(numbers.len());
        let (lines, rest) = full.as_chunks_mut::<LANES>();
        let mut numbers = numbers.chunks(LANES);
        for (line, numbers) in lines.iter_mut().zip(&mut numbers) {
            // Arrays of known length become vectors.
            let numbers: [bf16; LANES] = std::array::from_fn(|i| numbers[i]);
            *line = numbers.map(|number| u32::from(number.to_bits()) << 16);
        }
        for (unit, number) in rest.iter_mut().zip(numbers.next().unwrap_or_default()) {
            *unit = u32::from(number.to_bits()) << 16;
        }
        padding.fill(0);
    }

    #[inline(always)]
    fn of(first: bf16, _: bf16) -> u32 {
        u32::from(first.to_bits()) << 16
    }
}

impl Units<f32> for Singles {
    const PER_UNIT: usize = 1;

    #[inline(always)]
    fn write(numbers: &[f32], units: &mut [u32]) {
        let (full, padding) = units.split_at_mut(numbers.len());
        for (unit, number) in full.iter_mut().zip(numbers) {
            *unit = number.to_bits();
        }
        padding.fill(0);
    }

    #[inline(always)]
    fn of(first: f32, _: f32) -> u32 {
        first.to_bits()
    }
}

/// Numbers of activations and results.
pub(crate) trait Float: Copy + Send + Sync {
    /// The nearest number, ties to even.
    fn round(value: f32) -> Self;

    /// The number itself.
    fn widen(self) -> f32;
}

impl Float for bf16 {
    #[inline(always)]
    fn round(value: f32) -> Self {
        // As `bf16::from_f32`, in a form that becomes vector code.
        let bits = value.to_bits();
        let rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        bf16::from_bits(if value.is_nan() { (bits >> 16) as u16 | 0x40 } else { rounded as u16 })
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

impl Float for f32 {
    #[inline(always)]
    fn round(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}
