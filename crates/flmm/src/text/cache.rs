//! Keys and values of the tokens read so far.

use candle_core::Tensor;

use crate::error::Result;
use crate::text::DecoderConfig;

/// Keys and values of every layer, kept in buffers that are allocated once and doubled when full.
///
/// One made by [`KvCache::passing`] keeps none. The cache is not `Clone`: two copies would share and overwrite one buffer.
#[derive(Debug)]
pub struct KvCache {
    passing: bool,
    layers: Vec<Option<Buffers>>,
    heads: usize,
    head_dim: usize,
    len: usize,
    capacity: usize,
    limit: usize,
}

#[derive(Debug)]
struct Buffers {
    /// `[kv heads, capacity, head_dim]`
    keys: Tensor,
    /// `[kv heads, capacity, head_dim]`
    values: Tensor,
}

impl KvCache {
    /// An empty cache with room for `capacity` tokens; it grows up to the context of `config`.
    pub fn new(config: &DecoderConfig, capacity: usize) -> Self {
        Self {
            passing: false,
            layers: (0..config.num_layers).map(|_| None).collect(),
            heads: config.num_kv_heads,
            head_dim: config.head_dim,
            len: 0,
            capacity: capacity.clamp(1, config.max_positions),
            limit: config.max_positions,
        }
    }

    /// A cache that stays empty: keys and values of a layer are let go when the next one begins. For a text that is read
    /// once and in one piece; nothing can be read behind it.
    pub fn passing(config: &DecoderConfig) -> Self {
        Self { passing: true, ..Self::new(config, 1) }
    }

    /// Number of tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token has been read.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Memory in bytes that is taken, for tokens to come too.
    pub fn bytes(&self) -> usize {
        let size = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        self.layers.iter().flatten().map(|buffers| size(&buffers.keys) + size(&buffers.values)).sum()
    }

    /// Forgets all tokens from position `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Appends `keys`/`values` `[kv heads, T, head_dim]` of `layer` behind the tokens held, and returns all keys
    /// and values `[kv heads, len + T, head_dim]` as views. [`KvCache::advance`] makes the tokens permanent.
    pub(crate) fn append(
        &mut self,
        layer: usize,
        keys: &Tensor,
        values: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        if self.passing {
            return Ok((keys.clone(), values.clone()));
        }
        let len = self.len + keys.dim(1)?;
        if len > self.capacity {
            self.grow(len)?;
        }
        let shape = (self.heads, self.capacity, self.head_dim);
        let slot = &mut self.layers[layer];
        let buffers = match slot {
            Some(buffers) => buffers,
            None => slot.insert(Buffers {
                keys: Tensor::zeros(shape, keys.dtype(), keys.device())?,
                values: Tensor::zeros(shape, values.dtype(), values.device())?,
            }),
        };
        buffers.keys.slice_set(&keys.contiguous()?, 1, self.len)?;
        buffers.values.slice_set(&values.contiguous()?, 1, self.len)?;
        Ok((buffers.keys.narrow(1, 0, len)?, buffers.values.narrow(1, 0, len)?))
    }

    /// Counts `tokens` that every layer has appended.
    pub(crate) fn advance(&mut self, tokens: usize) {
        if !self.passing {
            self.len += tokens;
        }
    }

    /// The keys of `layer` at positions `start..start + len`: `[kv heads, len, head_dim]`.
    pub fn keys(&self, layer: usize, start: usize, len: usize) -> Result<Tensor> {
        match self.layers.get(layer) {
            Some(Some(buffers)) if start + len <= self.len => Ok(buffers.keys.narrow(1, start, len)?),
            _ => {
                let what =
                    format!("keys {start}..{} of layer {layer}: {} tokens are held", start + len, self.len);
                Err(candle_core::Error::Msg(what).into())
            }
        }
    }

    fn grow(&mut self, needed: usize) -> Result<()> {
        let capacity = needed.max(self.capacity * 2).min(self.limit.max(needed));
        let extra = capacity - self.capacity;
        for buffers in self.layers.iter_mut().flatten() {
            buffers.keys = buffers.keys.pad_with_zeros(1, 0, extra)?.contiguous()?;
            buffers.values = buffers.values.pad_with_zeros(1, 0, extra)?.contiguous()?;
        }
        self.capacity = capacity;
        Ok(())
    }
}
