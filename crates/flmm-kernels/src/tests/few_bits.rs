//! Weights of eight and four bits against the same written out.

use half::bf16;
use proptest::prelude::*;

use super::{numbers, reference, wide_kernels};
use crate::element::Singles;
use crate::int4::{self, Int4Weight};
use crate::int8::{self, Int8Weight};
use crate::product::{Sizes, WeightRows, product};

/// Products with eight-bit weights against the same with the weights written out.
fn check_int8(sizes: Sizes, biased: bool) -> Result<(), TestCaseError> {
    let Sizes { rows, inputs, outputs } = sizes;
    let (x, weight) = (numbers::<bf16>(rows * inputs, 1), numbers::<bf16>(outputs * inputs, 2));
    let bias = biased.then(|| numbers::<bf16>(outputs, 3));
    let int8 = Int8Weight::quantise(&weight, inputs);
    prop_assert_eq!((int8.inputs(), int8.outputs()), (inputs, outputs));
    let (bytes, scales) = int8.parts();
    let again = Int8Weight::from_parts(bytes.to_vec(), scales.to_vec(), [outputs, inputs]);
    prop_assert_eq!(again.as_ref(), Some(&int8));
    prop_assert!(Int8Weight::from_parts(bytes.to_vec(), scales.to_vec(), [outputs, inputs + 1]).is_none());
    let space = &mut Vec::new();
    let near = int8.rows(0..outputs, inputs, space);
    for (near, weight) in near.iter().zip(&weight) {
        // Half a step of the largest, which is at most one, with a scale that was rounded up, and a rounding to bf16.
        prop_assert!(
            (near.to_f32() - weight.to_f32()).abs() <= 0.5 / 126.0 + 1.0 / 256.0,
            "{near} for {weight}"
        );
    }
    let expected = reference(&x, near, bias.as_deref(), sizes);
    let sixteen_bits = inputs as f64 / 65_278.0;
    let check = |y: &[bf16], step: f64| {
        for (at, (y, &(expected, size))) in y.iter().zip(&expected).enumerate() {
            // Activations are off by half a step of their group's largest, to either side; weights were rounded to bf16.
            let tolerance =
                step * (inputs as f64).sqrt() + size / 256.0 + expected.abs() / 256.0 + sixteen_bits;
            let error = (y.to_f64() - expected).abs();
            prop_assert!(
                error <= tolerance,
                "{sizes:?}: number {at}: {y} instead of {expected}, {tolerance}"
            );
        }
        Ok(())
    };
    let mut y = vec![bf16::NAN; rows * outputs];
    for wide in wide_kernels() {
        y.fill(bf16::NAN);
        int8.widened(wide, &x, bias.as_deref(), sizes, &mut y);
        check(&y, 0.0)?;
    }
    // Activations in integers of eight bits.
    let eight_bits = 2.0 / 127.0;
    #[cfg(target_arch = "x86_64")]
    if let Some(vnni) = crate::vnni::Vnni::detect() {
        y.fill(bf16::NAN);
        int8::many(vnni, &int8, &x, bias.as_deref(), sizes, &mut y);
        check(&y, eight_bits)?;
    }
    // What a processor with more would not choose.
    #[cfg(target_arch = "x86_64")]
    if let Some(avx2) = crate::avx2::Avx2::detect() {
        y.fill(bf16::NAN);
        int8::few(avx2, &int8, &x, bias.as_deref(), sizes, &mut y);
        check(&y, 0.0)?;
        y.fill(bf16::NAN);
        int8::many(avx2, &int8, &x, bias.as_deref(), sizes, &mut y);
        check(&y, 0.0)?;
    }
    y.fill(bf16::NAN);
    int8.multiply(&x, bias.as_deref(), &mut y);
    // Few rows are integers of 16 bits, as with AVX2 all are, and tiles take them as they are.
    #[cfg(target_arch = "x86_64")]
    let exact = rows <= crate::few::FEW
        || crate::amx::Amx::detect().is_some()
        || crate::vnni::Vnni::detect().is_none();
    #[cfg(not(target_arch = "x86_64"))]
    let exact = true;
    check(&y, if exact { 0.0 } else { eight_bits })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn eight_bit_weights(rows in 1usize..100, inputs in 1usize..1500, outputs in 1usize..20, biased: bool) {
        check_int8(Sizes { rows, inputs, outputs }, biased)?;
    }

    #[test]
    fn eight_bit_weights_in_few_rows(rows in 1usize..9, inputs in 1usize..700, outputs in 1usize..200, biased: bool) {
        check_int8(Sizes { rows, inputs, outputs }, biased)?;
    }
}

/// Products with four-bit weights against the same with the weights written out.
fn check_int4(sizes: Sizes, biased: bool) -> Result<(), TestCaseError> {
    let Sizes { rows, inputs, outputs } = sizes;
    let (x, weight) = (numbers::<bf16>(rows * inputs, 1), numbers::<bf16>(outputs * inputs, 2));
    let bias = biased.then(|| numbers::<bf16>(outputs, 3));
    let int4 = Int4Weight::quantise(&weight, inputs);
    prop_assert_eq!((int4.inputs(), int4.outputs()), (inputs, outputs));
    let (nibbles, scales) = int4.parts();
    let again = Int4Weight::from_parts(nibbles.to_vec(), scales.to_vec(), [outputs, inputs]);
    prop_assert_eq!(again.as_ref(), Some(&int4));
    prop_assert!(Int4Weight::from_parts(nibbles.to_vec(), scales.to_vec(), [outputs, inputs + 32]).is_none());
    let space = &mut Vec::new();
    let near = int4.rows(0..outputs, inputs, space);
    // Groups begin anew with every output, and the last one may be short.
    for (near, weight) in near.chunks(inputs).zip(weight.chunks(inputs)) {
        for (near, weight) in near.chunks(int4::GROUP).zip(weight.chunks(int4::GROUP)) {
            let largest = weight.iter().fold(0f32, |a, x| a.max(x.to_f32().abs()));
            for (near, weight) in near.iter().zip(weight) {
                // Half a step, or what is cut off beyond the seventh or the eighth.
                let error = (near.to_f32() - weight.to_f32()).abs();
                prop_assert!(error <= largest / 4.0, "{near} for {weight} beside {largest}");
            }
        }
    }
    let expected = reference(&x, near, bias.as_deref(), sizes);
    let check = |y: &[bf16], what: &str| {
        for (at, (y, &(expected, size))) in y.iter().zip(&expected).enumerate() {
            // Weights were rounded to bf16, activations to a 32,639th of the largest of 128, and sums once.
            let tolerance = (size + expected.abs()) / 256.0 + inputs as f64 / 65_278.0;
            let error = (y.to_f64() - expected).abs();
            prop_assert!(error <= tolerance, "{what}, {sizes:?}: number {at}: {y} instead of {expected}");
        }
        Ok(())
    };
    let mut y = vec![bf16::NAN; rows * outputs];
    int4.multiply(&x, bias.as_deref(), &mut y);
    check(&y, "as chosen")?;
    for wide in wide_kernels() {
        y.fill(bf16::NAN);
        product::<bf16, Singles, _>(wide, &x, &int4, bias.as_deref(), sizes, &mut y);
        check(&y, "many rows")?;
    }
    y.fill(bf16::NAN);
    int4::few(int4::Plain, &int4, &x, bias.as_deref(), sizes, &mut y);
    check(&y, "written out")?;
    // Sums are exact within a group; only the order of groups differs.
    let alike = |z: &[bf16], what: &str| {
        for (at, (z, (y, (_, size)))) in z.iter().zip(y.iter().zip(&expected)).enumerate() {
            let error = (z.to_f64() - y.to_f64()).abs();
            prop_assert!(
                error <= y.to_f64().abs() / 128.0 + size * 1e-6,
                "{what}, {sizes:?}: number {at}: {z} beside {y}"
            );
        }
        Ok(())
    };
    #[cfg(target_arch = "x86_64")]
    {
        let mut z = vec![bf16::NAN; y.len()];
        if let Some(avx2) = crate::avx2::Avx2::detect() {
            int4::few(avx2, &int4, &x, bias.as_deref(), sizes, &mut z);
            alike(&z, "AVX2")?;
            z.fill(bf16::NAN);
            int8::many(avx2, &int4, &x, bias.as_deref(), sizes, &mut z);
            alike(&z, "AVX2, many rows")?;
        }
        z.fill(bf16::NAN);
        if let Some(vnni) = crate::vnni::Vnni::detect() {
            int4::few(vnni, &int4, &x, bias.as_deref(), sizes, &mut z);
            alike(&z, "VNNI")?;
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn four_bit_weights(rows in 1usize..100, inputs in 1usize..700, outputs in 1usize..20, biased: bool) {
        check_int4(Sizes { rows, inputs, outputs }, biased)?;
    }

    #[test]
    fn four_bit_weights_in_few_rows(rows in 1usize..9, inputs in 1usize..400, outputs in 1usize..200, biased: bool) {
        check_int4(Sizes { rows, inputs, outputs }, biased)?;
    }
}

/// Errors of few terms come near to their bounds.
#[test]
fn weights_of_a_few_inputs() {
    check_int8(Sizes { rows: 1, inputs: 2, outputs: 95 }, false).unwrap();
    for [rows, inputs, outputs] in [[2, 4, 56], [4, 2, 82]] {
        check_int4(Sizes { rows, inputs, outputs }, false).unwrap();
    }
}

#[test]
fn four_bit_weights_at_the_border_of_groups() {
    // One weight that is not zero, and one activation: each place of a group, of a block of groups, and of the last ones.
    for inputs in [1, 16, 17, 31, 32, 33, 127, 128, 129, 160, 300] {
        for at in 0..inputs {
            let mut weight = vec![bf16::ZERO; 2 * inputs];
            // Exactly −8 steps of a power of two.
            weight[inputs + at] = bf16::from_f32(-2.0);
            let int4 = Int4Weight::quantise(&weight, inputs);
            for row in [at, (at + 16) % inputs] {
                let mut x = vec![bf16::ZERO; inputs];
                x[row] = bf16::from_f32(-3.0);
                let mut y = [bf16::NAN; 2];
                int4.multiply(&x, None, &mut y);
                let expected = if row == at { 6.0 } else { 0.0 };
                assert_eq!(y.map(bf16::to_f32), [0.0, expected], "{inputs} inputs, {at} and {row}");
            }
        }
    }
}

/// Relative error, as a root of squares, of weights between −1 and 1.
fn relative_error(near: &[bf16], weight: &[bf16]) -> f64 {
    let square = |x: f64| x * x;
    let errors = near.iter().zip(weight).map(|(near, weight)| square(near.to_f64() - weight.to_f64()));
    (errors.sum::<f64>() / weight.iter().map(|weight| square(weight.to_f64())).sum::<f64>()).sqrt()
}

#[test]
fn errors_of_weights_are_as_documented() {
    let (outputs, inputs) = (64, 1024);
    // Sums of twelve such numbers are nearly normally distributed, as trained weights are.
    let parts = numbers::<f32>(12 * outputs * inputs, 4);
    let weight: Vec<bf16> = parts.chunks(12).map(|part| bf16::from_f32(part.iter().sum())).collect();
    let (int8, int4) = (Int8Weight::quantise(&weight, inputs), Int4Weight::quantise(&weight, inputs));
    let space = &mut Vec::new();
    let eight = relative_error(int8.rows(0..outputs, inputs, space), &weight);
    let four = relative_error(int4.rows(0..outputs, inputs, space), &weight);
    println!("relative error of normally distributed weights: {eight:.4} in eight bits, {four:.4} in four");
    assert!(eight < 0.008 && four < 0.085, "{eight}, {four}");
}

#[test]
fn weights_of_any_size_have_four_bits() {
    for size in [1e-37f32, 1e-20, 1.0, 1e20, 3e38] {
        let weight: Vec<bf16> = numbers::<f32>(320, 2).iter().map(|x| bf16::from_f32(x * size)).collect();
        let int4 = Int4Weight::quantise(&weight, 40);
        let space = &mut Vec::new();
        let scaled = |x: &bf16| x.to_f64() / f64::from(size);
        let near = int4.rows(0..8, 40, space).iter().map(scaled);
        let error = near
            .zip(weight.iter().map(scaled))
            .map(|(near, weight)| (near - weight).abs())
            .fold(0.0, f64::max);
        assert!(error < 0.25, "{size}: {error}");
    }
}

#[test]
fn weights_of_zeros_stay_zeros() {
    // The second one is so small that no f32 brings it to 127.
    for weight in [bf16::ZERO, bf16::from_f32(1e-37)] {
        let int8 = Int8Weight::quantise(&[weight; 260], 130);
        let mut y = [bf16::NAN; 2 * 20];
        int8.multiply(&numbers(20 * 130, 1), None, &mut y);
        assert_eq!(y, [bf16::ZERO; 2 * 20], "{weight}");
        if weight == bf16::ZERO {
            y.fill(bf16::NAN);
            Int4Weight::quantise(&[weight; 260], 130).multiply(&numbers(20 * 130, 1), None, &mut y);
            assert_eq!(y, [bf16::ZERO; 2 * 20]);
        }
    }
}
