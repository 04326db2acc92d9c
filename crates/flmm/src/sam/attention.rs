//! Attention of SAM's image encoder over a square of tokens, with decomposed relative positions (`spec/pipeline.md` §5.1).

use candle_core::{DType, Tensor};
use flmm_kernels::Scores;
use rayon::prelude::*;

use super::numbers::Numbers;
use crate::error::{Error, Result};
use crate::nn::host::Elements;
use crate::nn::{Linear, fused_attention, softmax_last_dim};
use crate::weights::Params;

/// Attention scores held at a time, per worker, when no gradient is tracked: 16 MB in f32. Global attention of a
/// public SAM has 4096² scores per head and 12 to 16 heads.
const SCORES_AT_ONCE: usize = 1 << 22;

/// Queries, keys and values.
#[derive(Debug, Clone)]
enum Qkv {
    /// As in files, `[3·D, D]` and `[3·D]`, rows in the order q, k, v: all in one can be trained.
    Together { weight: Tensor, bias: Tensor },
    /// One after the other, in bf16 or packed.
    Apart([Linear; 3]),
}

impl Qkv {
    /// What is computed in.
    fn dtype(&self) -> DType {
        match self {
            Self::Together { weight, .. } => weight.dtype(),
            Self::Apart(_) => DType::BF16,
        }
    }

    /// The map to queries (0), keys (1) or values (2).
    fn part(&self, part: usize) -> Result<Linear> {
        match self {
            Self::Together { weight, bias } => {
                let width = weight.dim(1)?;
                let bias = bias.narrow(0, part * width, width)?;
                Ok(Linear::new(weight.narrow(0, part * width, width)?, Some(bias)))
            }
            Self::Apart(parts) => Ok(parts[part].clone()),
        }
    }

    fn frozen(&self, numbers: Numbers) -> Result<Self> {
        let part = |part| numbers.of(&self.part(part)?);
        Ok(Self::Apart([part(0)?, part(1)?, part(2)?]))
    }
}

/// Self-attention over a square of tokens with decomposed relative positions.
#[derive(Debug, Clone)]
pub(super) struct Attention {
    qkv: Qkv,
    proj: Linear,
    /// `[2·side − 1, head dim]`
    rel_pos_h: Tensor,
    /// `[2·side − 1, head dim]`
    rel_pos_w: Tensor,
    /// `[side²]`: row of the table for every (query position, key position).
    offsets: Tensor,
    /// `[1, side², 2·side]`: which row and which column each key lies in.
    key_position: Tensor,
    heads: usize,
    side: usize,
}

impl Attention {
    pub(super) fn load(width: usize, heads: usize, side: usize, params: &Params) -> Result<Self> {
        let table = [2 * side - 1, width / heads];
        let weight = params.get(&[3 * width, width], "qkv.weight")?;
        let device = weight.device();
        let position = |i: usize| i % side;
        let offsets: Vec<u32> =
            (0..side * side).map(|i| (i / side + side - 1 - position(i)) as u32).collect();
        let key_position = (0..side * side).flat_map(|key| {
            let (row, column) = (key / side, position(key));
            (0..2 * side).map(move |i| f32::from(u8::from(i == row || i == side + column)))
        });
        let key_position: Vec<f32> = key_position.collect();
        Ok(Self {
            offsets: Tensor::from_vec(offsets, side * side, device)?,
            key_position: Tensor::from_vec(key_position, (1, side * side, 2 * side), device)?,
            proj: Linear::load(width, width, true, &params.pp("proj"))?,
            rel_pos_h: params.get(&table, "rel_pos_h")?,
            rel_pos_w: params.get(&table, "rel_pos_w")?,
            qkv: Qkv::Together { weight, bias: params.get(&[3 * width], "qkv.bias")? },
            heads,
            side,
        })
    }

    /// What is computed in.
    pub(super) fn dtype(&self) -> DType {
        self.qkv.dtype()
    }

    /// The tables of relative positions stay as they are: they are small, and read in f32.
    pub(super) fn frozen(&self, numbers: Numbers) -> Result<Self> {
        Ok(Self { qkv: self.qkv.frozen(numbers)?, proj: numbers.of(&self.proj)?, ..self.clone() })
    }

    /// `[G, side, side, D]` → same; each of the G squares attends to itself.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (squares, side, _, width) = x.dims4()?;
        let (tokens, head_dim) = (side * side, width / self.heads);
        let split = |part: usize| {
            let y = self.qkv.part(part)?.forward(x)?;
            let y = y.reshape((squares, tokens, self.heads, head_dim))?.transpose(1, 2)?.contiguous()?;
            Ok::<_, Error>(y.reshape((squares * self.heads, tokens, head_dim))?)
        };
        let (q, k, v) = (split(0)?, split(1)?, split(2)?);
        if let Some(y) = self.fused(&q, &k, &v, squares)? {
            return self.proj.forward(&y.reshape((squares, side, side, width))?);
        }

        // scores = q·k/√d + q·R_h[row offset] + q·R_w[column offset], the last two with the unscaled q. As one
        // product: queries carry their score against every row and column, keys say which ones they lie in.
        let (by_row, by_column) = self.position_scores(&q)?;
        let q = Tensor::cat(&[(&q * (head_dim as f64).powf(-0.5))?, by_row, by_column], 2)?;
        let position = self.key_position.broadcast_as((squares * self.heads, tokens, 2 * side))?;
        let k = Tensor::cat(&[k, position.to_dtype(x.dtype())?.contiguous()?], 2)?;

        let y = attend(&q, &k, &v, SCORES_AT_ONCE)?.reshape((squares, self.heads, tokens, head_dim))?;
        let y = y.transpose(1, 2)?.contiguous()?.reshape((squares, side, side, width))?;
        self.proj.forward(&y)
    }

    /// The same without a matrix of scores, where there is a kernel for it: `[squares, side², D]`.
    fn fused(&self, q: &Tensor, k: &Tensor, v: &Tensor, squares: usize) -> Result<Option<Tensor>> {
        let operands = [q, k, v, &self.rel_pos_h, &self.rel_pos_w];
        if !q.device().is_cpu() || operands.iter().any(|t| t.track_op()) {
            return Ok(None);
        }
        let (groups, tokens, dim) = q.dims3()?;
        let wide = q.to_dtype(DType::F32)?.reshape((groups * tokens, dim))?;
        // Of every query with every line of a table, of which the kernel takes those of its keys.
        let against = |table: &Tensor| wide.matmul(&table.to_dtype(DType::F32)?.flip(&[0])?.t()?);
        let (by_row, by_column) = (against(&self.rel_pos_h)?, against(&self.rel_pos_w)?);
        let (by_row, by_column) = (Elements::of(&by_row), Elements::of(&by_column));
        let scores =
            Scores::Relative { by_row: by_row.get()?, by_column: by_column.get()?, columns: self.side };
        Ok(fused_attention([q, k, v], squares, scores)?.map(|(y, _)| y))
    }

    /// `q [G, side², d]` → scores against each key row and each key column, both `[G, side², side]`.
    fn position_scores(&self, q: &Tensor) -> Result<(Tensor, Tensor)> {
        let (groups, tokens, dim) = q.dims3()?;
        let side = self.side;
        let q = q.reshape((groups, side, side, dim))?;
        // `axis`: of (row, column), the one that is compared; it becomes the batch of the product.
        let along = |table: &Tensor, axis: usize| {
            let order = if axis == 1 { [1, 0, 2, 3] } else { [2, 0, 1, 3] };
            let back = if axis == 1 { [1, 0, 2, 3] } else { [1, 2, 0, 3] };
            let table = table.index_select(&self.offsets, 0)?.reshape((side, side, dim))?;
            let q = q.permute(order)?.contiguous()?.reshape((side, groups * side, dim))?;
            let scores = q.matmul(&table.transpose(1, 2)?.contiguous()?)?;
            let scores = scores.reshape((side, groups, side, side))?.permute(back)?.contiguous()?;
            Ok::<_, Error>(scores.reshape((groups, tokens, side))?)
        };
        Ok((along(&self.rel_pos_h, 1)?, along(&self.rel_pos_w, 2)?))
    }
}

/// softmax(`q [G, L, c]` · `k [G, L, c]`ᵀ) · `v [G, L, d]` → `[G, L, d]`.
///
/// Without gradients the scores are made in blocks of at most `at_once`; with gradients all of them are
/// kept for the backward pass anyway.
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, at_once: usize) -> Result<Tensor> {
    let plain = |q: &Tensor, k: &Tensor, v: &Tensor| {
        let scores = q.matmul(&k.transpose(1, 2)?)?;
        Ok::<_, Error>(softmax_last_dim(&scores)?.matmul(v)?)
    };
    let (groups, tokens, _) = q.dims3()?;
    if q.track_op() || k.track_op() || v.track_op() || groups * tokens * tokens <= at_once {
        return plain(q, k, v);
    }
    let groups_at_once = (at_once / (tokens * tokens)).clamp(1, groups);
    let rows_at_once = (at_once / tokens).clamp(1, tokens);
    let starts: Vec<(usize, usize)> = (0..groups)
        .step_by(groups_at_once)
        .flat_map(|group| (0..tokens).step_by(rows_at_once).map(move |row| (group, row)))
        .collect();
    let parts = starts
        .into_par_iter()
        .map(|(group, row)| {
            let count = groups_at_once.min(groups - group);
            let part = |x: &Tensor| x.narrow(0, group, count);
            let rows = part(q)?.narrow(1, row, rows_at_once.min(tokens - row))?.contiguous()?;
            let y = plain(&rows, &part(k)?, &part(v)?)?;
            // Either whole groups or rows of one group: both are runs of consecutive rows.
            Ok::<_, Error>(y.flatten(0, 1)?)
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(&parts, 0)?.reshape(v.dims())?)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    fn ramp(shape: &[usize], step: usize) -> Result<Tensor> {
        let values: Vec<f32> =
            (0..shape.iter().product()).map(|i| ((i * step) % 97) as f32 / 48.0 - 1.0).collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    #[test]
    fn attention_in_blocks_equals_attention_at_once() -> Result<()> {
        let (q, k, v) = (ramp(&[6, 10, 5], 31)?, ramp(&[6, 10, 5], 17)?, ramp(&[6, 10, 3], 41)?);
        let whole = attend(&q, &k, &v, usize::MAX)?;
        let tracked = attend(Var::from_tensor(&q)?.as_tensor(), &k, &v, 1)?;
        // Rows of one group, several groups with a remainder, fewer scores than one row.
        for at_once in [30, 400, 7] {
            for other in [&attend(&q, &k, &v, at_once)?, &tracked] {
                let difference = (&whole - other)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
                assert!(difference < 1e-6, "blocks of {at_once}: {difference}");
            }
        }
        Ok(())
    }
}
