//! Every kernel against a sum written out.

use half::bf16;
use proptest::prelude::*;
use pulp::Arch;

use crate::attention::{AttentionSizes, Heads, Scores};
#[cfg(target_arch = "x86_64")]
use crate::element::Pairs;
use crate::element::{Float, Singles, Units};
use crate::few::{Few, product as few_product};
use crate::int4::{self, Int4Weight};
use crate::int8::Int8Weight;
use crate::kernel::{Kernel, Wide};
use crate::line::{LANES, Line, transpose};
use crate::product::{Sizes, WeightRows, product};

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

/// Attention written out: results and log-sum-exps.
fn plain_attention<T: Float>(
    q: &[T],
    k: Heads<T>,
    v: Heads<T>,
    sizes: AttentionSizes,
    scores: Scores,
) -> [Vec<f64>; 2] {
    let AttentionSizes { batch, heads, kv_heads, rows, keys, head_dim } = sizes;
    let round = |x: f64| f64::from(T::round(x as f32).widen());
    let (mut y, mut lse) = (vec![0.0; q.len()], Vec::new());
    for head in 0..batch * heads {
        let group = head / heads * kv_heads + head % heads / (heads / kv_heads);
        for row in 0..rows {
            let at = head * rows + row;
            let score = |key: usize| {
                let terms = 0..head_dim;
                let k = &k.data[group * k.stride + key * head_dim..];
                let dot: f64 = terms.map(|c| f64::from(q[at * head_dim + c].widen() * k[c].widen())).sum();
                match scores {
                    Scores::Causal if key > keys - rows + row => f64::NEG_INFINITY,
                    Scores::Full { divided: false } => round(dot),
                    Scores::Causal | Scores::Full { .. } => round(round(dot) / (head_dim as f64).sqrt()),
                    Scores::Relative { by_row, by_column, columns } => {
                        let height = keys / columns;
                        let down = key / columns + height - 1 - row / columns;
                        let right = key % columns + columns - 1 - row % columns;
                        let bias =
                            by_row[at * (2 * height - 1) + down] + by_column[at * (2 * columns - 1) + right];
                        dot / (head_dim as f64).sqrt() + f64::from(bias)
                    }
                }
            };
            let scores: Vec<f64> = (0..keys).map(score).collect();
            let sum: f64 = scores.iter().map(|score| score.exp()).sum();
            lse.push(sum.ln());
            let to = ((head / heads * rows + row) * heads + head % heads) * head_dim;
            for (key, score) in scores.iter().enumerate() {
                let v = &v.data[group * v.stride + key * head_dim..][..head_dim];
                for (y, v) in y[to..].iter_mut().zip(v) {
                    *y += round(score.exp() / sum) * f64::from(v.widen());
                }
            }
        }
    }
    [y, lse]
}

/// [`Scores`], with made-up numbers where there are any.
#[derive(Clone, Copy)]
enum Rule {
    Causal,
    Full {
        divided: bool,
    },
    /// On a grid of so many columns.
    Relative(usize),
}

fn check_attention<T: Float, U: Units<T>>(
    kernel: impl Kernel + Few<T>,
    sizes: AttentionSizes,
    rule: Rule,
    unit: f64,
) -> Result<(), TestCaseError> {
    let AttentionSizes { batch, heads, kv_heads, rows, keys, head_dim } = sizes;
    let q = quarters::<T>(batch * heads * rows * head_dim, 5);
    // Heads lie three keys further apart than they need, as in a cache with room left.
    let stride = (keys + 3) * head_dim;
    let [k, v] = [6, 7].map(|seed| quarters::<T>(batch * kv_heads * stride, seed));
    let [k, v] = [&k, &v].map(|data| Heads { data, stride });
    let offsets = |size: usize| 2 * size - 1;
    let columns = if let Rule::Relative(columns) = rule { columns } else { 1 };
    let by_row = numbers::<f32>(batch * heads * rows * offsets(keys / columns), 8);
    let by_column = numbers::<f32>(batch * heads * rows * offsets(columns), 9);
    let scores = match rule {
        Rule::Causal => Scores::Causal,
        Rule::Full { divided } => Scores::Full { divided },
        Rule::Relative(columns) => Scores::Relative { by_row: &by_row, by_column: &by_column, columns },
    };
    let [expected, expected_lse] = plain_attention(&q, k, v, sizes, scores);
    let (mut y, mut lse) = (vec![T::round(f32::NAN); q.len()], vec![f32::NAN; batch * heads * rows]);
    crate::attention::attention::<T, U, _>(kernel, &q, [k, v], sizes, scores, &mut y, &mut lse);
    for (at, (y, expected)) in y.iter().zip(expected).enumerate() {
        // Probabilities may be rounded to the other side, and add up to one; values are at most two. So is the result,
        // which is rounded once more.
        let error = (f64::from(y.widen()) - expected).abs();
        prop_assert!(
            error <= 1e-5 + (2.0 + expected.abs()) * unit,
            "{sizes:?}: number {at} is {} instead of {expected}",
            y.widen()
        );
    }
    for (at, (lse, expected)) in lse.iter().zip(expected_lse).enumerate() {
        prop_assert!(
            (f64::from(*lse) - expected).abs() < 1e-5,
            "log-sum-exp {at} is {lse} instead of {expected}"
        );
    }
    Ok(())
}

/// Every kernel that this processor has.
fn all_attentions(sizes: AttentionSizes, rule: Rule) -> Result<(), TestCaseError> {
    for wide in wide_kernels() {
        check_attention::<f32, Singles>(wide, sizes, rule, 0.0)?;
        check_attention::<bf16, Singles>(wide, sizes, rule, 1.0 / 256.0)?;
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(native) = crate::avx512::Avx512Bf16::detect() {
        check_attention::<bf16, Pairs>(native, sizes, rule, 1.0 / 256.0)?;
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(amx) = crate::amx::Amx::detect() {
        check_attention::<bf16, Pairs>(amx, sizes, rule, 1.0 / 256.0)?;
    }
    Ok(())
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn causal_attention(
        batch in 1usize..3, kv_heads in 1usize..4, group in 1usize..4, rows in 1usize..90, past in 0usize..40,
        head_dim in 1usize..40,
    ) {
        let sizes = AttentionSizes { batch, heads: kv_heads * group, kv_heads, rows, keys: past + rows, head_dim };
        all_attentions(sizes, Rule::Causal)?;
    }

    #[test]
    fn full_attention(
        batch in 1usize..3, kv_heads in 1usize..4, group in 1usize..4, rows in 1usize..90, keys in 1usize..90,
        head_dim in 1usize..40, divided: bool,
    ) {
        let sizes = AttentionSizes { batch, heads: kv_heads * group, kv_heads, rows, keys, head_dim };
        all_attentions(sizes, Rule::Full { divided })?;
    }

    #[test]
    fn attention_with_relative_positions(
        batch in 1usize..3, heads in 1usize..4, columns in 1usize..9, grid_rows in 1usize..9, head_dim in 1usize..40,
    ) {
        let rows = columns * grid_rows;
        let sizes = AttentionSizes { batch, heads, kv_heads: heads, rows, keys: rows, head_dim };
        all_attentions(sizes, Rule::Relative(columns))?;
    }
}

/// Products with eight-bit weights against the same with the weights written out.
fn check_int8(sizes: Sizes, biased: bool) -> Result<(), TestCaseError> {
    let Sizes { rows, inputs, outputs } = sizes;
    let (x, weight) = (numbers::<bf16>(rows * inputs, 1), numbers::<bf16>(outputs * inputs, 2));
    let bias = biased.then(|| numbers::<bf16>(outputs, 3));
    let int8 = Int8Weight::quantise(&weight, inputs);
    prop_assert_eq!((int8.inputs(), int8.outputs()), (inputs, outputs));
    let (bytes, scales) = int8.parts();
    let again = Int8Weight::from_parts(bytes.to_vec(), &scales, [outputs, inputs]);
    prop_assert_eq!(again.as_ref(), Some(&int8));
    prop_assert!(Int8Weight::from_parts(bytes.to_vec(), &scales, [outputs, inputs + 1]).is_none());
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
    let sixteen_bits = inputs as f64 / 65_534.0;
    let check = |y: &[bf16], step: f64| {
        for (at, (y, &(expected, size))) in y.iter().zip(&expected).enumerate() {
            // Activations are off by half a step of their group's largest, to either side; weights were rounded to bf16.
            let tolerance =
                step * (inputs as f64).sqrt() + size / 512.0 + expected.abs() / 256.0 + sixteen_bits;
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
        crate::int8::many(vnni, &int8, &x, bias.as_deref(), sizes, &mut y);
        check(&y, eight_bits)?;
    }
    y.fill(bf16::NAN);
    int8.multiply(&x, bias.as_deref(), &mut y);
    // Few rows are integers of 16 bits, and tiles take them as they are.
    #[cfg(target_arch = "x86_64")]
    let exact = rows <= crate::few::FEW || crate::amx::Amx::detect().is_some();
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
fn four_bit_weights_of_a_few_inputs() {
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

#[test]
fn attention_to_many_keys() {
    // So many that a block has fewer lines than the kernel's panel.
    let sizes = AttentionSizes { batch: 1, heads: 2, kv_heads: 1, rows: 40, keys: 3001, head_dim: 8 };
    all_attentions(sizes, Rule::Causal).unwrap();
    all_attentions(AttentionSizes { keys: 9000, rows: 17, ..sizes }, Rule::Causal).unwrap();
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
    let sizes = Sizes { rows: 70, inputs: 600, outputs: 500 };
    let (x, weight) =
        (numbers::<bf16>(sizes.rows * sizes.inputs, 1), numbers::<bf16>(sizes.outputs * sizes.inputs, 2));
    let results = [1, 3].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut y = vec![bf16::ZERO; sizes.rows * sizes.outputs];
        pool.install(|| crate::linear_bf16(&x, &weight, None, sizes, &mut y));
        y
    });
    assert!(results[0] == results[1]);
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

/// The nearest bf16, as an f32.
fn near(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

/// Whether numbers agree to one rounding.
fn agree(y: &[bf16], expected: impl Iterator<Item = f32>) {
    let mut count = 0;
    for (at, (y, expected)) in y.iter().zip(expected).enumerate() {
        let error = (y.to_f32() - expected).abs();
        assert!(error <= expected.abs() / 128.0 + 1e-6, "number {at}: {y} instead of {expected}");
        count += 1;
    }
    assert_eq!(count, y.len());
}

#[test]
fn norms_of_rows() {
    // More than one task, and a width that fills no vector.
    for (rows, width) in [(1, 5), (3, 33), (700, 100)] {
        let x = numbers::<bf16>(rows * width, 11);
        let [weight, bias] = [12, 13].map(|seed| numbers::<bf16>(width, seed));
        let mut y = vec![bf16::NAN; x.len()];
        let wide = |row: &[bf16]| row.iter().map(|x| x.to_f32()).collect::<Vec<_>>();

        crate::rms_norm_bf16(&x, &weight, 1e-5, &mut y);
        let expected = x.chunks_exact(width).flat_map(|row| {
            let row = wide(row);
            let root = (row.iter().map(|x| x * x).sum::<f32>() / width as f32 + 1e-5).sqrt();
            row.into_iter()
                .zip(&weight)
                .map(move |(x, w)| near(near(x / root) * w.to_f32()))
                .collect::<Vec<_>>()
        });
        agree(&y, expected);

        crate::layer_norm_bf16(&x, &weight, &bias, 1e-5, &mut y);
        let expected = x.chunks_exact(width).flat_map(|row| {
            let row = wide(row);
            let mean = row.iter().sum::<f32>() / width as f32;
            let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / width as f32;
            let scale = weight.iter().zip(&bias);
            let y = row
                .into_iter()
                .zip(scale)
                .map(move |(x, (w, b))| (x - mean) / (variance + 1e-5).sqrt() * w.to_f32() + b.to_f32());
            y.collect::<Vec<_>>()
        });
        // Where terms cancel, a rounding is one of the terms.
        for (y, expected) in y.iter().zip(expected) {
            assert!((y.to_f32() - expected).abs() < 0.02, "{y} instead of {expected}");
        }
    }
}

#[test]
fn gates() {
    let gate: Vec<bf16> = numbers::<f32>(70_000, 14).into_iter().map(|x| bf16::from_f32(x * 30.0)).collect();
    let up = numbers::<bf16>(gate.len(), 15);
    let mut y = vec![bf16::NAN; gate.len()];
    crate::silu_mul_bf16(&gate, &up, &mut y);
    agree(
        &y,
        gate.iter().zip(&up).map(|(g, u)| near(near(g.to_f32() / (1.0 + (-g.to_f32()).exp())) * u.to_f32())),
    );
}

#[test]
fn branches_are_added() {
    let [x, branch] = [19, 20].map(|seed| numbers::<bf16>(70_001, seed));
    let mut y = vec![bf16::NAN; x.len()];
    crate::add_bf16(&x, &branch, &mut y);
    assert!(y.iter().zip(x.iter().zip(&branch)).all(|(y, (x, b))| *y == *x + *b));
}

#[test]
fn rotations() {
    let (heads, rows, half) = (3, 40, 300);
    let x = numbers::<bf16>(heads * rows * 2 * half, 16);
    let [cos, sin] = [17, 18].map(|seed| numbers::<bf16>(rows * half, seed));
    let mut y = vec![bf16::NAN; x.len()];
    crate::rotate_bf16(&x, &cos, &sin, half, &mut y);
    for (at, y) in y.iter().enumerate() {
        let (row, column) = (at / (2 * half) % rows, at % (2 * half));
        let angle = row * half + column % half;
        let (other, sign) = if column < half { (at + half, -1.0) } else { (at - half, 1.0) };
        let product = |x: bf16, angle: bf16| near(x.to_f32() * angle.to_f32());
        assert_eq!(y.to_f32(), near(product(x[at], cos[angle]) + sign * product(x[other], sin[angle])));
    }
}
