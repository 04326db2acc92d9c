//! Token by token.

use candle_core::Tensor;

use crate::capture::Capture;
use crate::error::Result;
use crate::text::sampling::Sampler;
use crate::text::{Decoder, KvCache};

/// When generation ends.
#[derive(Debug, Clone, Copy)]
pub struct Limits<'a> {
    /// Most tokens to generate.
    pub max_new_tokens: usize,
    /// Ids that end the answer; the stopping token is part of what is returned.
    pub stop_ids: &'a [u32],
}

/// Continues the sequence in a cache, one token per [`Generation::step`].
///
/// The last id is never fed back, so it has no attention row and no state (`spec/models.md` §12). Whoever follows may
/// stop at any token.
#[derive(Debug)]
pub struct Generation<'a> {
    limits: Limits<'a>,
    sampler: Sampler,
    /// Final-normed state of the last token that was read, `[1, hidden]`.
    hidden: Tensor,
    ids: Vec<u32>,
}

impl<'a> Generation<'a> {
    /// Continues behind the token whose final-normed state is `last_hidden [1, hidden]`.
    pub fn new(last_hidden: Tensor, limits: Limits<'a>, sampler: Sampler) -> Self {
        Self { limits, sampler, hidden: last_hidden, ids: Vec::new() }
    }

    /// The next id and the logits that it was chosen from; `None` behind a stop id, the most tokens, or when the context
    /// is full.
    ///
    /// `cache` holds everything before the last id that was given out. `capture` observes: ids and logits do not depend
    /// on it.
    pub fn step(
        &mut self,
        decoder: &Decoder,
        cache: &mut KvCache,
        capture: Option<&mut Capture>,
    ) -> Result<Option<(u32, Vec<f32>)>> {
        let full = cache.len() == decoder.config().max_positions;
        match self.ids.last() {
            _ if self.ids.len() >= self.limits.max_new_tokens => return Ok(None),
            Some(id) if full || self.limits.stop_ids.contains(id) => return Ok(None),
            Some(&id) => self.hidden = decoder.forward(&decoder.embed(&[id])?, cache, capture)?,
            None => {}
        }
        let logits = decoder.logits(&self.hidden)?.squeeze(0)?.to_vec1::<f32>()?;
        let id = self.sampler.sample(&logits);
        self.ids.push(id);
        Ok(Some((id, logits)))
    }

    /// The ids so far.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Whether the last id is one that ends the answer.
    pub fn stopped(&self) -> bool {
        self.ids.last().is_some_and(|id| self.limits.stop_ids.contains(id))
    }
}
