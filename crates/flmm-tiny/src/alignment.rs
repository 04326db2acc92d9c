//! Contrastive alignment of phrases with patches in the decoder's own space.
//!
//! A large multimodal model inherits from CLIP and from region-level instruction data that the words of a phrase find
//! the patches they mean. flmm-tiny has neither, so a few heads of its decoder get a contrastive loss: of all patches,
//! the ones under the thing a phrase refers to must score highest against the phrase's tokens. The grounding head is
//! not involved; it is trained later, on the frozen model.

use anyhow::Result;
use candle_core::{D, Device, Tensor};
use flmm_data::world::SegmentRef;

use crate::lmm::Sample;
use crate::symbolic::Thing;

/// The heads (layer, head) that are aligned: late ones, so that a relation can be worked out before.
const HEADS: [(usize, usize); 3] = [(3, 0), (4, 0), (5, 0)];
/// Keeps the logarithm finite where a phrase ignores its target.
const EPS: f64 = 1e-4;

/// Mean over phrases and aligned heads of `−log` of the share of image attention that lies on the phrase's target;
/// `attention` is `[B, H, S, S]` per layer. `None` if no phrase has a visible target.
pub(crate) fn loss(samples: &[Sample], attention: &[Tensor]) -> Result<Option<Tensor>> {
    let (mut terms, mut phrases) = (Vec::new(), 0);
    for (index, sample) in samples.iter().enumerate() {
        let Some((rows, targets)) = (match attention.first() {
            Some(probs) => selection(sample, probs.dim(3)?)?,
            None => None,
        }) else {
            continue;
        };
        phrases += rows.dim(0)?;
        let (first, tokens) = (sample.packed.prefix.len(), sample.things.len());
        for (layer, head) in HEADS {
            let Some(probs) = attention.get(layer) else { continue };
            let map = probs.get(index)?.get(head)?.narrow(1, first, tokens)?.contiguous()?;
            let map = rows.matmul(&map)?;
            let share = ((&map * &targets)?.sum(D::Minus1)? / (map.sum(D::Minus1)? + 1e-6)?)?;
            terms.push((share + EPS)?.log()?.neg()?.sum_all()?);
        }
    }
    if terms.is_empty() {
        return Ok(None);
    }
    let sum = Tensor::stack(&terms, 0)?.sum_all()?;
    Ok(Some((sum / (phrases * HEADS.len()) as f64)?))
}

/// `[phrases, S]` that averages a phrase's rows, and `[phrases, tokens]` that is 1 on its target's patches.
fn selection(sample: &Sample, rows: usize) -> Result<Option<(Tensor, Tensor)>> {
    let (mut means, mut targets, mut count) = (Vec::new(), Vec::new(), 0);
    for phrase in &sample.packed.phrases {
        let inside = |thing: &Thing| match thing {
            Thing::Object(i) => phrase.segments.contains(&SegmentRef::Object(*i)),
            Thing::Stuff(i) => phrase.segments.contains(&SegmentRef::Stuff(*i)),
            Thing::Padding => false,
        };
        let target: Vec<f32> = sample.things.iter().map(|t| f32::from(u8::from(inside(t)))).collect();
        if target.iter().all(|v| *v == 0.0) {
            continue;
        }
        count += 1;
        targets.extend(target);
        let share = 1.0 / phrase.rows.len() as f32;
        means.extend((0..rows).map(|row| if phrase.rows.contains(&row) { share } else { 0.0 }));
    }
    if count == 0 {
        return Ok(None);
    }
    let means = Tensor::from_vec(means, (count, rows), &Device::Cpu)?;
    Ok(Some((means, Tensor::from_vec(targets, (count, sample.things.len()), &Device::Cpu)?)))
}
