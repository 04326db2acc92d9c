//! Every kernel against a sum written out.

mod attention;
mod few_bits;
mod rows;

use half::bf16;
use proptest::prelude::*;
use pulp::Arch;

#[cfg(target_arch = "x86_64")]
use crate::element::Pairs;
use crate::element::{Float, Singles, Units};
use crate::few::{Few, product as few_product};
use crate::kernel::{Kernel, Wide};
use crate::line::{LANES, Line, transpose};
use crate::product::{Sizes, product};

/// Numbers in −1..1 that differ from place to place and from `seed` to `seed`.
fn numbers<T: Float>(count: usize, seed: u64) -> Vec<T> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        T::round((state >> 40) as f32 / (1 << 23) as f32 - 1.0)
    };
    std::iter::repeat_with(next).take(count).collect()
}

/// The result in f64 and the sum of the terms' sizes, against which an error is small.
fn reference<T: Float>(x: &[T], weight: &[T], bias: Option<&[T]>, sizes: Sizes) -> Vec<(f64, f64)> {
    let wide = |number: &T| f64::from(number.widen());
    let mut all = Vec::with_capacity(sizes.rows * sizes.outputs);
    for x in x.chunks_exact(sizes.inputs) {
        for (n, weight) in weight.chunks_exact(sizes.inputs).enumerate() {
            let bias = bias.map_or(0.0, |bias| wide(&bias[n]));
            let terms = || x.iter().zip(weight).map(|(x, w)| wide(x) * wide(w));
            all.push((terms().sum::<f64>() + bias, terms().map(f64::abs).sum::<f64>() + bias.abs()));
        }
    }
    all
}

/// Multiples of a quarter, whose sums of products are exact in f32 in any order.
fn quarters<T: Float>(count: usize, seed: u64) -> Vec<T> {
    numbers::<f32>(count, seed).into_iter().map(|number| T::round((number * 8.0).round() / 4.0)).collect()
}

/// Whether every number of `y` is the reference's, but for f32 sums and one rounding of relative size `unit`.
fn check<T: Float>(y: &[T], reference: &[(f64, f64)], unit: f64) -> Result<(), TestCaseError> {
    for (at, (y, &(expected, size))) in y.iter().zip(reference).enumerate() {
        let error = (f64::from(y.widen()) - expected).abs();
        prop_assert!(
            error <= 1e-6 * size + unit * expected.abs(),
            "number {at}: {} instead of {expected}",
            y.widen()
        );
    }
    Ok(())
}

/// Runs `kernel` in both ways.
fn both<T: Float, U: Units<T>>(
    kernel: impl Kernel + Few<T>,
    sizes: Sizes,
    biased: bool,
    unit: f64,
) -> Result<(), TestCaseError> {
    let (x, weight) =
        (numbers::<T>(sizes.rows * sizes.inputs, 1), numbers::<T>(sizes.outputs * sizes.inputs, 2));
    let bias = biased.then(|| numbers::<T>(sizes.outputs, 3));
    let reference = reference(&x, &weight, bias.as_deref(), sizes);
    let mut y = vec![T::round(f32::NAN); sizes.rows * sizes.outputs];
    product::<T, U, _>(kernel, &x, &weight[..], bias.as_deref(), sizes, &mut y);
    check(&y, &reference, unit)?;
    y.fill(T::round(f32::NAN));
    few_product(kernel, &x, &weight[..], bias.as_deref(), sizes, &mut y);
    check(&y, &reference, unit)
}

/// Kernels in f32: of this processor, of AVX2 and without vectors.
fn wide_kernels() -> Vec<Wide> {
    let kernels = [Wide::new(), Wide::on(Arch::Scalar)].into_iter();
    #[cfg(target_arch = "x86_64")]
    let kernels = kernels.chain(pulp::x86::V3::try_new().map(|v3| Wide::on(Arch::V3(v3))));
    kernels.collect()
}

/// Every kernel that this processor has.
fn all_kernels(sizes: Sizes, biased: bool) -> Result<(), TestCaseError> {
    for wide in wide_kernels() {
        both::<f32, Singles>(wide, sizes, biased, 1e-7)?;
        both::<bf16, Singles>(wide, sizes, biased, 1.0 / 256.0)?;
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(native) = crate::avx512::Avx512Bf16::detect() {
        both::<bf16, Pairs>(native, sizes, biased, 1.0 / 256.0)?;
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(amx) = crate::amx::Amx::detect() {
        both::<bf16, Pairs>(amx, sizes, biased, 1.0 / 256.0)?;
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn odd_shapes(rows in 1usize..150, inputs in 1usize..70, outputs in 1usize..120, biased: bool) {
        all_kernels(Sizes { rows, inputs, outputs }, biased)?;
    }

    #[test]
    fn deep_sums(rows in 1usize..40, inputs in 500usize..1600, outputs in 1usize..20, biased: bool) {
        all_kernels(Sizes { rows, inputs, outputs }, biased)?;
    }
}

#[test]
fn several_blocks_of_rows() {
    all_kernels(Sizes { rows: 1100, inputs: 3, outputs: 5 }, true).unwrap();
}

#[test]
fn several_chunks_of_outputs_and_parts_of_inputs() {
    all_kernels(Sizes { rows: 130, inputs: 1100, outputs: 330 }, true).unwrap();
    all_kernels(Sizes { rows: 780, inputs: 530, outputs: 40 }, false).unwrap();
}

#[test]
fn results_do_not_depend_on_other_rows() {
    let (inputs, outputs) = (1100, 330);
    let (x, weight) = (numbers::<bf16>(800 * inputs, 1), numbers::<bf16>(outputs * inputs, 2));
    let results = [40, 100, 800].map(|rows| {
        let mut y = vec![bf16::ZERO; rows * outputs];
        let sizes = Sizes { rows, inputs, outputs };
        crate::linear_bf16(&x[..rows * inputs], &weight, None, sizes, &mut y);
        y.truncate(40 * outputs);
        y
    });
    assert!(results[0] == results[1] && results[0] == results[2]);
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    // One row's outputs are cut into parts for all threads.
    for sizes in
        [Sizes { rows: 70, inputs: 600, outputs: 500 }, Sizes { rows: 1, inputs: 2100, outputs: 2501 }]
    {
        let Sizes { rows, inputs, outputs } = sizes;
        let (x, weight) = (numbers::<bf16>(rows * inputs, 1), numbers::<bf16>(outputs * inputs, 2));
        let int8 = crate::Int8Weight::quantise(&weight, inputs);
        let results = [1, 3].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut y = [(); 2].map(|()| vec![bf16::ZERO; rows * outputs]);
            pool.install(|| {
                crate::linear_bf16(&x, &weight, None, sizes, &mut y[0]);
                int8.multiply(&x, None, &mut y[1]);
            });
            y
        });
        assert!(results[0] == results[1]);
    }
}

#[test]
fn no_inputs_leave_the_bias() {
    let mut y = [9.0; 4];
    let bias = [1.0, 2.0];
    crate::linear::<f32, Singles, _>(
        Wide::new(),
        &[],
        &[],
        Some(&bias),
        Sizes { rows: 2, inputs: 0, outputs: 2 },
        &mut y,
    );
    assert_eq!(y, [1.0, 2.0, 1.0, 2.0]);
}

#[test]
fn rounding_is_half_s_own() {
    let special = [
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        0.0,
        -0.0,
        f32::MAX,
        f32::MIN_POSITIVE,
        257.0 / 256.0,
        259.0 / 256.0,
    ];
    for value in numbers::<f32>(10_000, 4).into_iter().chain(special) {
        assert_eq!(<bf16 as Float>::round(value).to_bits(), bf16::from_f32(value).to_bits(), "{value}");
    }
}

#[test]
fn transposed_blocks() {
    let mut block: [Line; LANES] =
        std::array::from_fn(|row| Line(std::array::from_fn(|column| (row * LANES + column) as u32)));
    transpose(&mut block);
    for (row, line) in block.iter().enumerate() {
        for (column, &unit) in line.0.iter().enumerate() {
            assert_eq!(unit as usize, column * LANES + row);
        }
    }
}
