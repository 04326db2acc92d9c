//! Causal attention without a `[heads, S, S]` matrix.

use candle_core::{D, DType, Device, Tensor};
use flmm_kernels::Scores;

use crate::error::Result;
use crate::nn::{frozen_products, fused_attention};

/// Scores held at once, in elements: query rows are taken in blocks of this size divided by `heads · keys`.
const BLOCK: usize = 1 << 23;

/// Attention of the last `T` of `S` tokens.
///
/// `q [heads, T, d]`; `k`, `v` `[kv heads, S, d]`, where query head `h` reads key head `h · kv heads / heads`.
/// Returns the mixed values `[T, heads · d]` and, if `keep_lse`, the log-sum-exp of every score row
/// `[heads, T]` in f32. Arithmetic as `spec/pipeline.md` §2.1 rules 2–4 asks for. Asking for the log-sum-exp
/// changes nothing else that is computed.
pub fn attend(q: &Tensor, k: &Tensor, v: &Tensor, keep_lse: bool) -> Result<(Tensor, Option<Tensor>)> {
    match fused_attention([q, k, v], 1, Scores::Causal)? {
        Some((mixed, lse)) => Ok((mixed.squeeze(0)?, keep_lse.then_some(lse))),
        None => attend_in_blocks(q, k, v, keep_lse, (BLOCK / (q.dim(0)? * k.dim(1)?)).max(16)),
    }
}

/// As [`attend`], from candle's operations, `step` query rows at a time.
fn attend_in_blocks(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    keep_lse: bool,
    step: usize,
) -> Result<(Tensor, Option<Tensor>)> {
    let (heads, rows, head_dim) = q.dims3()?;
    let (kv_heads, keys, _) = k.dims3()?;
    let past = keys - rows;
    let (mut mixed, mut lse) = (Vec::new(), Vec::new());
    for start in (0..rows).step_by(step) {
        let block = step.min(rows - start);
        // Later keys are masked for every row of the block, so they need not be looked at.
        let seen = past + start + block;
        let q = q.narrow(1, start, block)?;
        let mut scores = scaled_scores(&q, &k.narrow(1, 0, seen)?)?;
        if block > 1 {
            scores = scores.broadcast_add(&causal_mask(block, seen, q.device())?)?;
        }
        let max = scores.max_keepdim(D::Minus1)?;
        let exp = scores.broadcast_sub(&max)?.exp()?;
        let sum = exp.sum_keepdim(D::Minus1)?;
        if keep_lse {
            lse.push((max + sum.log()?)?.squeeze(2)?);
        }
        let probs = exp.broadcast_div(&sum)?.to_dtype(q.dtype())?;
        let probs = probs.reshape((kv_heads, heads / kv_heads * block, seen))?;
        let out = probs.matmul(&v.narrow(1, 0, seen)?)?.reshape((heads, block, head_dim))?;
        mixed.push(out.transpose(0, 1)?.reshape((block, heads * head_dim))?);
    }
    let lse = if keep_lse { Some(Tensor::cat(&lse, 1)?) } else { None };
    Ok((Tensor::cat(&mixed, 0)?, lse))
}

/// `q·kᵀ / √d` for `q [heads, R, d]` and `k [kv heads, n, d]`, returned as f32 `[heads, R, n]`.
///
/// In bf16 both the product and the quotient are rounded to bf16.
pub fn scaled_scores(q: &Tensor, k: &Tensor) -> Result<Tensor> {
    let (heads, rows, head_dim) = q.dims3()?;
    let (kv_heads, keys, _) = k.dims3()?;
    let grouped = q.contiguous()?.reshape((kv_heads, heads / kv_heads * rows, head_dim))?;
    let scores = match frozen_products(&grouped, k)? {
        Some(scores) => scores,
        None => grouped.matmul(&k.transpose(1, 2)?)?,
    };
    let scores = scores.to_dtype(DType::F32)?;
    let scores = (scores / (head_dim as f64).sqrt())?;
    let scores = round_to(&scores, q.dtype())?;
    Ok(scores.reshape((heads, rows, keys))?)
}

/// `x` in f32, rounded to what `dtype` can hold.
pub(crate) fn round_to(x: &Tensor, dtype: DType) -> Result<Tensor> {
    if dtype == DType::F32 {
        return Ok(x.to_dtype(DType::F32)?);
    }
    Ok(x.to_dtype(dtype)?.to_dtype(DType::F32)?)
}

/// `[rows, keys]`: 0 where a key may be seen, −∞ where it lies in the future of the row.
fn causal_mask(rows: usize, keys: usize, device: &Device) -> Result<Tensor> {
    // Made where it is needed: nothing is copied to a device once per layer.
    let last = Tensor::arange((keys - rows) as u32, keys as u32, device)?.reshape((rows, 1))?;
    let hidden = Tensor::arange(0, keys as u32, device)?.reshape((1, keys))?.broadcast_gt(&last)?;
    let [never, seen] = [f32::NEG_INFINITY, 0.0].map(|x| Tensor::full(x, (rows, keys), device));
    Ok(hidden.where_cond(&never?, &seen?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(shape: (usize, usize, usize), seed: f64) -> Result<Tensor> {
        let count = shape.0 * shape.1 * shape.2;
        let values: Vec<f32> = (0..count).map(|i| ((i as f64 * 0.7 + seed) * 1.3).sin() as f32).collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    /// Plain attention of one head, written out.
    fn plain(q: &[Vec<f32>], k: &[Vec<f32>], v: &[Vec<f32>]) -> (Vec<Vec<f32>>, Vec<f32>) {
        let past = k.len() - q.len();
        let scale = (q[0].len() as f32).sqrt();
        let mut lse = Vec::new();
        let out = q.iter().enumerate().map(|(row, q)| {
            let scores: Vec<f32> = (0..=past + row)
                .map(|key| q.iter().zip(&k[key]).map(|(a, b)| a * b).sum::<f32>() / scale)
                .collect();
            let total: f32 = scores.iter().map(|s| s.exp()).sum();
            lse.push(total.ln());
            (0..q.len())
                .map(|c| scores.iter().enumerate().map(|(key, s)| s.exp() / total * v[key][c]).sum())
                .collect()
        });
        (out.collect(), lse)
    }

    #[test]
    fn scores_in_bf16_agree_with_those_in_f32() -> Result<()> {
        let narrow = |x: Tensor| x.to_dtype(DType::BF16);
        // Two query heads a key head, keys in a cache with room left, and keys whose matrices lie transposed.
        let q = narrow(ramp((4, 3, 20), 0.1)?)?;
        let cache = narrow(ramp((2, 9, 20), 0.2)?)?;
        let turned = narrow(ramp((2, 20, 7), 0.3)?)?.transpose(1, 2)?;
        for k in [cache.narrow(1, 2, 5)?, turned] {
            let wide = scaled_scores(&q.to_dtype(DType::F32)?, &k.to_dtype(DType::F32)?)?;
            let scores = scaled_scores(&q, &k)?;
            let error = ((scores - &wide)?.abs()? - (wide.abs()? * (1.0 / 128.0))?)?.flatten_all()?.max(0)?;
            assert!(error.to_scalar::<f32>()? < 1e-4, "{error}");
        }
        assert_eq!(scaled_scores(&q.narrow(1, 0, 0)?, &cache)?.dims(), [4, 0, 9]);
        Ok(())
    }

    #[test]
    fn fused_attention_agrees_with_attention_in_blocks() -> Result<()> {
        let (heads, kv, d) = (6, 2, 20);
        for (rows, keys) in [(1, 50), (3, 50), (70, 75)] {
            for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 1.0 / 64.0)] {
                let random =
                    |heads, rows, seed| Ok::<_, crate::Error>(ramp((heads, rows, d), seed)?.to_dtype(dtype)?);
                let (q, k, v) =
                    (random(heads, rows, 0.1)?, random(kv, keys + 4, 0.5)?, random(kv, keys + 2, 0.9)?);
                let (k, v) = (k.narrow(1, 3, keys)?, v.narrow(1, 0, keys)?);
                let (fused, fused_lse) = attend(&q, &k, &v, true)?;
                assert_eq!(attend(&q, &k, &v, false)?.1.map(|lse| lse.dims().to_vec()), None);
                let (plain, plain_lse) = attend_in_blocks(&q, &k, &v, true, 16)?;
                let difference = |a: &Tensor, b: &Tensor| -> Result<f32> {
                    let [a, b] = [a, b].map(|t| t.to_dtype(DType::F32));
                    Ok((a? - b?)?.abs()?.flatten_all()?.max(0)?.to_scalar()?)
                };
                assert_eq!((fused.dims(), fused.dtype()), (plain.dims(), dtype));
                assert!(difference(&fused, &plain)? < tolerance);
                let (Some(fused), Some(plain)) = (fused_lse, plain_lse) else { panic!("no log-sum-exp") };
                assert!(difference(&fused, &plain)? < tolerance);
            }
        }
        Ok(())
    }

    #[test]
    fn blocks_and_groups_do_not_change_the_result() -> Result<()> {
        let (heads, kv, rows, keys, d) = (4, 2, 40, 50, 6);
        let (q, k, v) = (ramp((heads, rows, d), 0.1)?, ramp((kv, keys, d), 0.5)?, ramp((kv, keys, d), 0.9)?);
        let (out, lse) = attend_in_blocks(&q, &k, &v, true, 16)?;
        let lse = lse.map(|lse| lse.to_vec2::<f32>()).transpose()?.unwrap_or_default();
        let out = out.to_vec2::<f32>()?;
        let (q, k, v) = (q.to_vec3::<f32>()?, k.to_vec3::<f32>()?, v.to_vec3::<f32>()?);
        for head in 0..heads {
            let (expected, expected_lse) = plain(&q[head], &k[head / 2], &v[head / 2]);
            for row in 0..rows {
                assert!((lse[head][row] - expected_lse[row]).abs() < 1e-4);
                for c in 0..d {
                    assert!((out[row][head * d + c] - expected[row][c]).abs() < 1e-5);
                }
            }
        }
        Ok(())
    }
}
