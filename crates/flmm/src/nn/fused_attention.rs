//! Attention of frozen layers without a matrix of scores: by `flmm_kernels` on the processor, by `flmm_cuda` on CUDA.

use bytemuck::Zeroable;
use candle_core::{DType, Tensor, WithDType};
use flmm_kernels::{AttentionSizes, Heads, Scores, attention_bf16, attention_f32};
use half::bf16;

use super::host::Elements;
use crate::error::Result;

/// Softmax of the scores of `q [batch · heads, rows, d]` and `k [batch · kv heads, keys, d]` times `v`, which is as `k`:
/// `[batch, rows, heads · d]`, and the log-sum-exp of every row of scores `[batch · heads, rows]` in f32. Query head
/// `h` reads key head `h · kv heads / heads`. `None` where it cannot be computed in this way: on other devices, in other
/// types, with gradients, on CUDA also for other scores than causal ones and sizes without a kernel.
pub(crate) fn fused_attention(
    [q, k, v]: [&Tensor; 3],
    batch: usize,
    scores: Scores,
) -> Result<Option<(Tensor, Tensor)>> {
    #[cfg(feature = "cuda")]
    if q.device().is_cuda() {
        return match scores {
            Scores::Causal => Ok(flmm_cuda::causal_attention([q, k, v], batch)?),
            Scores::Full { .. } | Scores::Relative { .. } => Ok(None),
        };
    }
    let dtype = q.dtype();
    if ![q, k, v].iter().all(|t| t.device().is_cpu() && t.dtype() == dtype && !t.track_op()) {
        return Ok(None);
    }
    Ok(match dtype {
        DType::BF16 => Some(run::<bf16>([q, k, v], batch, scores, attention_bf16)?),
        DType::F32 => Some(run::<f32>([q, k, v], batch, scores, attention_f32)?),
        _ => None,
    })
}

type Kernel<T> = fn(&[T], [Heads<T>; 2], AttentionSizes, Scores, &mut [T], &mut [f32]);

fn run<T: WithDType + Zeroable>(
    [q, k, v]: [&Tensor; 3],
    batch: usize,
    scores: Scores,
    kernel: Kernel<T>,
) -> Result<(Tensor, Tensor)> {
    let ((queries, rows, head_dim), (groups, keys, _)) = (q.dims3()?, k.dims3()?);
    let (heads, kv_heads) = (queries / batch, groups / batch);
    let fitting = queries == batch * heads && groups == batch * kv_heads && heads % kv_heads.max(1) == 0;
    let visible = rows <= keys || matches!(scores, Scores::Full { .. });
    if !fitting || kv_heads == 0 || !visible || v.dims() != k.dims() || k.dim(2)? != head_dim {
        let what = format!("attention of {:?}, {:?} and {:?} in {batch}", q.dims(), k.dims(), v.dims());
        return Err(candle_core::Error::Msg(what).into());
    }
    let q = q.contiguous()?;
    let (q, k, v) = (Elements::of(&q), Elements::of(k), Elements::of(v));
    let [k, v] = [k.heads()?, v.heads()?].map(|(data, stride)| Heads { data, stride });
    let sizes = AttentionSizes { batch, heads, kv_heads, rows, keys, head_dim };
    let (mut mixed, mut lse) = (bytemuck::zeroed_vec(queries * rows * head_dim), vec![0f32; queries * rows]);
    kernel(q.get_as()?, [k, v], sizes, scores, &mut mixed, &mut lse);
    let device = &candle_core::Device::Cpu;
    Ok((
        Tensor::from_vec(mixed, (batch, rows, heads * head_dim), device)?,
        Tensor::from_vec(lse, (queries, rows), device)?,
    ))
}
