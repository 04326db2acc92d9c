//! What is kept of a forward pass, and the maps and states that grounding makes from it.
//!
//! Kept per layer: the rotated queries and the log-sum-exp of the score rows, and the hidden states. Keys stay
//! in the KV cache. When the phrases are known, the probabilities of just their rows on just the image's
//! columns are `exp(q·k / √d − lse)`, so no attention matrix is ever stored and no second pass is needed.
//! Where they are known before the pass, each layer's maps are made within it, and neither rows nor keys are kept.

use std::ops::Range;

use candle_core::{D, DType, Device, Tensor};

use crate::error::{Error, Result};
use crate::layout::{Folding, ImageLayout, Merge};
use crate::nn::softmax_last_dim;
use crate::text::{KvCache, round_to, scaled_scores};

/// Raised whenever maps or hidden states of the same model change: feature caches of another version are refused.
pub const VERSION: u32 = 1;

/// Attention rows and hidden states of the tokens at positions `first..first + len`.
#[derive(Debug, Clone, Default)]
pub struct Capture {
    first: usize,
    attention: Kept,
    /// Embeddings, outputs of layers 1..L−1, final-normed output of layer L: pieces `[t, hidden]`.
    hidden: Vec<Vec<Tensor>>,
}

/// What is kept of the attention.
#[derive(Debug, Clone)]
enum Kept {
    Rows {
        /// Per layer: pieces `[heads, t, head_dim]`.
        queries: Vec<Vec<Tensor>>,
        /// Per layer: pieces `[heads, t]`, f32.
        lse: Vec<Vec<Tensor>>,
    },
    /// Maps of phrases that were known before the pass.
    Maps {
        image: ImageLayout,
        /// Positions of the phrases' tokens.
        phrases: Vec<Vec<usize>>,
        merge: Merge,
        /// The phrases' rows, counted from the first row of a layer, which is at this position: the last layer may leave rows
        /// out. Kept, because every copy to a device waits for it.
        indices: Option<(usize, Vec<Tensor>)>,
        /// Begun with the first layer, which tells the model's type.
        folding: Option<Folding>,
    },
}

impl Default for Kept {
    fn default() -> Self {
        Self::Rows { queries: Vec::new(), lse: Vec::new() }
    }
}

impl Capture {
    /// Keeps every row at position `first` or later.
    pub fn from_position(first: usize) -> Self {
        Self { first, ..Self::default() }
    }

    /// Keeps the maps of `phrases`, positions of tokens, on `image`, and of every row at position `first` or later the hidden
    /// states. Nothing else can be asked for afterwards, and the KV cache need not keep the keys ([`KvCache::passing`]).
    pub fn of_phrases(first: usize, image: ImageLayout, phrases: Vec<Vec<usize>>, merge: Merge) -> Self {
        let attention = Kept::Maps { image, phrases, merge, indices: None, folding: None };
        Self { first, attention, ..Self::default() }
    }

    /// Whether maps are made from the KV cache's keys after the pass.
    pub(crate) fn needs_keys(&self) -> bool {
        matches!(self.attention, Kept::Rows { .. })
    }

    /// Positions of the rows kept.
    pub fn positions(&self) -> Range<usize> {
        let rows = |pieces: &Vec<Tensor>| pieces.iter().map(|piece| piece.dims()[0]).sum::<usize>();
        self.first..self.first + self.hidden.first().map_or(0, rows)
    }

    /// Bytes of all that is kept.
    pub fn bytes(&self) -> usize {
        let bytes = |lists: &[Vec<Tensor>]| -> usize {
            lists.iter().flatten().map(|piece| piece.elem_count() * piece.dtype().size_in_bytes()).sum()
        };
        let attention = match &self.attention {
            Kept::Rows { queries, lse } => bytes(queries) + bytes(lse),
            Kept::Maps { folding, .. } => folding.as_ref().map_or(0, Folding::bytes),
        };
        attention + bytes(&self.hidden)
    }

    /// The first row that is kept of those read from position `start` on, counted from there.
    pub(crate) fn first_from(&self, start: usize) -> usize {
        self.first.saturating_sub(start)
    }

    /// Forgets the rows at position `end` and later; maps that were made of them stay.
    pub fn truncate(&mut self, end: usize) -> Result<()> {
        let keep = end.saturating_sub(self.first);
        let mut kept = vec![(&mut self.hidden, 0)];
        if let Kept::Rows { queries, lse } = &mut self.attention {
            kept.extend([(queries, 1), (lse, 1)]);
        }
        for (lists, axis) in kept {
            for pieces in lists.iter_mut() {
                let mut left = keep;
                for piece in pieces.iter_mut() {
                    let rows = piece.dim(axis)?.min(left);
                    *piece = piece.narrow(axis, 0, rows)?;
                    left -= rows;
                }
                pieces.retain(|piece| piece.dims()[axis] > 0);
            }
        }
        Ok(())
    }

    /// Keeps what is wanted of the rows of `queries [heads, T, d]` and `lse [heads, T]`, whose first is at `start`, on
    /// `keys [kv heads, S, d]`, which begin at position 0. Layers come in their order.
    pub(crate) fn keep_attention(
        &mut self,
        layer: usize,
        start: usize,
        queries: &Tensor,
        lse: &Tensor,
        keys: &Tensor,
    ) -> Result<()> {
        let skip = self.skip(start, queries.dim(1)?);
        match &mut self.attention {
            Kept::Rows { queries: kept, lse: kept_lse } => {
                let Some(skip) = skip else { return Ok(()) };
                let wanted = queries.dim(1)? - skip;
                // Copied, so that the rows before the answer are not kept alive.
                push(kept, layer, queries.narrow(1, skip, wanted)?.force_contiguous()?);
                push(kept_lse, layer, lse.narrow(1, skip, wanted)?.force_contiguous()?);
            }
            Kept::Maps { image, phrases, merge, indices, folding } => {
                let indices = match indices {
                    Some((first, indices)) if *first == start => &*indices,
                    _ => {
                        let rows = start..start + queries.dim(1)?;
                        let made = phrases.iter().map(|phrase| row_index(phrase, &rows, lse.device()));
                        &indices.insert((start, made.collect::<Result<_>>()?)).1
                    }
                };
                let keys = keys.narrow(1, image.start, image.tokens)?;
                let rows = indices.iter().map(|index| probabilities(queries, lse, index, &keys));
                let folding =
                    folding.get_or_insert_with(|| Folding::new(image.clone(), *merge, queries.dtype()));
                folding.push(&rows.collect::<Result<Vec<_>>>()?)?;
            }
        }
        Ok(())
    }

    /// Keeps the wanted rows of `hidden [T, hidden]`, whose first row is at `start`, as state number `index`.
    pub(crate) fn keep_hidden(&mut self, index: usize, start: usize, hidden: &Tensor) -> Result<()> {
        let Some(skip) = self.skip(start, hidden.dim(0)?) else { return Ok(()) };
        let wanted = hidden.dim(0)? - skip;
        push(&mut self.hidden, index, hidden.narrow(0, skip, wanted)?.force_contiguous()?);
        Ok(())
    }

    /// How many of `rows` rows from `start` on lie before the first wanted one; `None` if all do.
    fn skip(&self, start: usize, rows: usize) -> Option<usize> {
        let skip = self.first_from(start);
        (skip < rows).then_some(skip)
    }

    /// Hidden states at `positions`: `[L, rows, hidden]`, the embedding state left out (`spec/pipeline.md` §2.4).
    pub fn hidden_rows(&self, positions: &[usize]) -> Result<Tensor> {
        let index = self.index(positions)?;
        // While an answer grows, its newest rows are asked for again and again: older pieces are not touched then.
        let in_a_row = positions.windows(2).all(|pair| pair[1] == pair[0] + 1);
        let states = self.hidden.iter().skip(1).map(|pieces| match positions.first() {
            Some(position) if in_a_row => {
                let from = position - self.first;
                piece_rows(pieces, from, from + positions.len())
            }
            _ => {
                let rows = Tensor::cat(pieces, 0)?;
                Ok(rows.index_select(&index.to_device(rows.device())?, 0)?)
            }
        });
        Ok(Tensor::stack(&states.collect::<Result<Vec<_>>>()?, 0)?)
    }

    /// Probabilities of the rows at `positions` on the image's tokens in `layer`: `[heads, rows, image tokens]`
    /// in f32, rounded to the model's type.
    pub fn image_attention(
        &self,
        cache: &KvCache,
        layer: usize,
        image: &ImageLayout,
        positions: &[usize],
    ) -> Result<Tensor> {
        let (queries, lse) = self.rows(layer)?;
        probabilities(&queries, &lse, &self.index(positions)?, &cache.keys(layer, image.start, image.tokens)?)
    }

    /// The mask head's input `[N, C, gh, gw]` in f32: per phrase, the merged attention of the rows at its
    /// positions on the image's tokens, for every layer and head (`spec/pipeline.md` §2.2).
    ///
    /// A capture [of phrases](Capture::of_phrases) has the maps already, of those phrases alone.
    pub fn phrase_maps(
        &self,
        cache: &KvCache,
        image: &ImageLayout,
        phrases: &[Vec<usize>],
        merge: Merge,
    ) -> Result<Tensor> {
        let queries = match &self.attention {
            Kept::Rows { queries, .. } => queries,
            Kept::Maps { image: of, phrases: known, merge: by, folding: Some(folding), .. }
                if (of, &known[..], *by) == (image, phrases, merge) =>
            {
                return folding.maps();
            }
            Kept::Maps { .. } => return Err(not_kept("maps of other phrases than those it was told before")),
        };
        let indices = phrases.iter().map(|positions| self.index(positions)).collect::<Result<Vec<_>>>()?;
        let dtype = queries.first().and_then(|pieces| pieces.first()).map_or(DType::F32, Tensor::dtype);
        let maps = image.fold(queries.len(), merge, dtype, |layer| {
            let (queries, lse) = self.rows(layer)?;
            let keys = cache.keys(layer, image.start, image.tokens)?;
            indices.iter().map(|index| probabilities(&queries, &lse, index, &keys)).collect()
        })?;
        Ok(maps)
    }

    /// All kept queries `[heads, rows, head_dim]` and log-sum-exps `[heads, rows]` of `layer`.
    fn rows(&self, layer: usize) -> Result<(Tensor, Tensor)> {
        match &self.attention {
            Kept::Rows { queries, lse } if layer < queries.len().min(lse.len()) => {
                Ok((Tensor::cat(&queries[layer], 1)?, Tensor::cat(&lse[layer], 1)?))
            }
            _ => Err(not_kept(&format!("rows of layer {layer}"))),
        }
    }

    /// `positions` as row numbers of the kept tensors.
    fn index(&self, positions: &[usize]) -> Result<Tensor> {
        let state = self.hidden.first().and_then(|pieces| pieces.first()).map(Tensor::device);
        row_index(positions, &self.positions(), state.unwrap_or(&Device::Cpu))
    }
}

/// `positions` counted from the first of `rows`, which must hold them.
fn row_index(positions: &[usize], rows: &Range<usize>, device: &Device) -> Result<Tensor> {
    if let Some(position) = positions.iter().find(|position| !rows.contains(position)) {
        return Err(Error::request(
            format!("token {position} has no attention row: rows {}..{} were kept", rows.start, rows.end),
            "ground only tokens of the answer that were fed to the model",
        ));
    }
    let numbers: Vec<u32> = positions.iter().map(|position| (position - rows.start) as u32).collect();
    Ok(Tensor::from_vec(numbers, positions.len(), device)?)
}

fn not_kept(what: &str) -> Error {
    candle_core::Error::Msg(format!("the pass did not keep {what}")).into()
}

/// Rows `from..to` of `pieces [t, hidden]`, counted through.
fn piece_rows(pieces: &[Tensor], from: usize, to: usize) -> Result<Tensor> {
    let (mut wanted, mut start) = (Vec::new(), 0);
    for piece in pieces {
        let end = start + piece.dim(0)?;
        let (first, last) = (from.max(start), to.min(end));
        if first < last {
            wanted.push(piece.narrow(0, first - start, last - first)?);
        }
        start = end;
    }
    Ok(Tensor::cat(&wanted, 0)?)
}

fn push(lists: &mut Vec<Vec<Tensor>>, index: usize, piece: Tensor) {
    if lists.len() <= index {
        lists.resize_with(index + 1, Vec::new);
    }
    lists[index].push(piece);
}

/// `exp(q·k / √d − lse)` of the rows `index`, rounded to the model's type and held in f32.
fn probabilities(queries: &Tensor, lse: &Tensor, index: &Tensor, keys: &Tensor) -> Result<Tensor> {
    let scores = scaled_scores(&queries.index_select(index, 1)?, keys)?;
    let lse = lse.index_select(index, 1)?.unsqueeze(D::Minus1)?;
    let probs = scores.broadcast_sub(&lse)?.exp()?;
    // The mask head checks 0 ≤ p ≤ 1; a row whose mass is on one key may come out one rounding above 1.
    round_to(&probs.minimum(1f32)?, queries.dtype())
}

/// Layer-weighted hidden states: `hidden [L, T, D]`, `text_layer_weights [L]` → `[T, D]` in f32.
///
/// The weights go through a softmax (`spec/pipeline.md` §2.4). Differentiable in `text_layer_weights`.
pub fn weighted_hidden(hidden: &Tensor, text_layer_weights: &Tensor) -> Result<Tensor> {
    let (layers, tokens, width) = hidden.dims3()?;
    let weights = softmax_last_dim(&text_layer_weights.to_dtype(DType::F32)?.reshape((1, layers))?)?;
    let hidden = hidden.to_dtype(DType::F32)?.reshape((layers, tokens * width))?;
    Ok(weights.matmul(&hidden)?.reshape((tokens, width))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_rows_are_those_that_were_asked_for() -> Result<()> {
        let piece = |from: u32, to: u32| Tensor::arange(from, to, &Device::Cpu)?.unsqueeze(1);
        let pieces = vec![piece(4, 6)?, piece(6, 7)?, piece(7, 10)?];
        let capture = Capture { first: 4, hidden: vec![pieces.clone(), pieces], ..Capture::default() };
        // In a row, within a piece and across; backwards, repeated and with gaps.
        for wanted in [&[4][..], &[5, 6, 7], &[4, 5, 6, 7, 8, 9], &[7, 6], &[5, 5, 7], &[4, 6]] {
            let rows = capture.hidden_rows(wanted)?.flatten_all()?.to_vec1::<u32>()?;
            assert_eq!(rows.iter().map(|&row| row as usize).collect::<Vec<_>>(), wanted);
        }
        assert!(capture.hidden_rows(&[3]).is_err() && capture.hidden_rows(&[9, 10]).is_err());
        Ok(())
    }
}
