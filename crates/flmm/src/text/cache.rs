//! Keys and values of the tokens read so far.

use candle_core::Tensor;

use crate::error::{Error, Result};
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
    /// once and in one piece: reading something behind it is an error.
    pub fn passing(config: &DecoderConfig) -> Self {
        Self { passing: true, ..Self::new(config, 1) }
    }

    /// Number of tokens read.
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
            return match self.len {
                0 => Ok((keys.clone(), values.clone())),
                read => Err(Error::request(
                    format!(
                        "{read} tokens were read without keeping their keys and values, and more are to follow"
                    ),
                    "read all in one piece, or with a cache made by `KvCache::new`",
                )),
            };
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
        self.len += tokens;
    }

    /// The keys of `layer` at positions `start..start + len`: `[kv heads, len, head_dim]`.
    pub fn keys(&self, layer: usize, start: usize, len: usize) -> Result<Tensor> {
        match self.layers.get(layer) {
            Some(Some(buffers)) if start + len <= self.len => Ok(buffers.keys.narrow(1, start, len)?),
            _ => {
                let held = if self.passing { 0 } else { self.len };
                let what = format!("keys {start}..{} of layer {layer}: {held} tokens are held", start + len);
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use candle_core::{DType, Device};
    use serde_json::json;

    use super::*;
    use crate::config::Config;

    #[test]
    fn nothing_is_read_behind_a_text_that_was_not_kept() -> Result<()> {
        let config = Config::new(Path::new("config.json"), json!({ "model_type": "llama" }))?;
        let mut cache = KvCache::passing(&DecoderConfig::from_config(&config)?);
        let keys = Tensor::zeros((1, 3, 4), DType::F32, &Device::Cpu)?;
        for layer in 0..2 {
            assert_eq!(cache.append(layer, &keys, &keys)?.0.dims(), keys.dims());
        }
        cache.advance(3);
        assert_eq!((cache.len(), cache.bytes()), (3, 0));
        assert!(cache.append(0, &keys, &keys).unwrap_err().to_string().contains("3 tokens"));
        assert!(cache.keys(0, 0, 1).unwrap_err().to_string().contains("0 tokens are held"));
        cache.truncate(0);
        assert!(cache.append(0, &keys, &keys).is_ok());
        Ok(())
    }
}
