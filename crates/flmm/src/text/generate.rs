//! Token by token.

use std::ops::ControlFlow;

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

/// Continues the sequence in `cache`, whose last final-normed state is `last_hidden [1, hidden]`.
///
/// Returns the generated ids. The last one is never fed back, so it has no attention row and no state
/// (`spec/models.md` §12). Ends early when the context is full. `on_token` sees every id with the logits it was
/// chosen from, and may end the generation. `capture` observes: ids and logits do not depend on it.
pub fn generate(
    decoder: &Decoder,
    last_hidden: &Tensor,
    cache: &mut KvCache,
    mut capture: Option<&mut Capture>,
    limits: Limits,
    sampler: &mut Sampler,
    mut on_token: impl FnMut(u32, &[f32]) -> ControlFlow<()>,
) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    let mut hidden = last_hidden.clone();
    while ids.len() < limits.max_new_tokens {
        let logits = decoder.logits(&hidden)?.squeeze(0)?.to_vec1::<f32>()?;
        let id = sampler.sample(&logits);
        ids.push(id);
        let stopped = on_token(id, &logits).is_break() || limits.stop_ids.contains(&id);
        if stopped || ids.len() == limits.max_new_tokens || cache.len() == decoder.config().max_positions {
            break;
        }
        hidden = decoder.forward(&decoder.embed(&[id])?, cache, capture.as_deref_mut())?;
    }
    Ok(ids)
}
