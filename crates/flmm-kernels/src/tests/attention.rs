//! Attention against the same written out.

use half::bf16;
use proptest::prelude::*;

use super::{numbers, quarters, wide_kernels};
use crate::attention::{AttentionSizes, Heads, Scores};
#[cfg(target_arch = "x86_64")]
use crate::element::Pairs;
use crate::element::{Float, Singles, Units};
use crate::few::Few;
use crate::kernel::Kernel;

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

#[test]
fn attention_to_many_keys() {
    // So many that a block has fewer lines than the kernel's panel.
    let sizes = AttentionSizes { batch: 1, heads: 2, kv_heads: 1, rows: 40, keys: 3001, head_dim: 8 };
    all_attentions(sizes, Rule::Causal).unwrap();
    all_attentions(AttentionSizes { keys: 9000, rows: 17, ..sizes }, Rule::Causal).unwrap();
}
