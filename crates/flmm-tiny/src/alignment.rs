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

/// The heads (layer, head) that are aligned: one that sees a word alone, and late ones that know its sentence.
const HEADS: [(usize, usize); 4] = [(0, 1), (3, 0), (4, 0), (5, 0)];
/// Keeps the logarithm finite where a phrase ignores its target.
const EPS: f64 = 1e-4;

/// Mean over phrases and aligned heads of `−log` of the share of image attention that lies on the phrase's target;
/// `attention` is `[B, H, S, S]` per layer. `None` if no phrase has a visible target.
pub(crate) fn loss(samples: &[Sample], attention: &[Tensor]) -> Result<Option<Tensor>> {
    let (mut terms, mut count) = (Vec::new(), 0);
    for (index, sample) in samples.iter().enumerate() {
        let Some((rows, targets)) = (match attention.first() {
            Some(probs) => selection(sample, probs.dim(3)?)?,
            None => None,
        }) else {
            continue;
        };
        let (first, tokens) = (sample.packed.prefix.len(), sample.things.len());
        for (layer, head) in HEADS {
            let Some(probs) = attention.get(layer) else { continue };
            let map = probs.get(index)?.get(head)?.narrow(1, first, tokens)?.contiguous()?;
            let map = rows.matmul(&map)?;
            count += rows.dim(0)?;
            let share = ((&map * &targets)?.sum(D::Minus1)? / (map.sum(D::Minus1)? + 1e-6)?)?;
            terms.push((share + EPS)?.log()?.neg()?.sum_all()?);
        }
    }
    if terms.is_empty() {
        return Ok(None);
    }
    let sum = Tensor::stack(&terms, 0)?.sum_all()?;
    Ok(Some((sum / count as f64)?))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::{Packed, Phrase};

    /// Two prefix tokens, four patches of which two show object 0, a phrase of two tokens.
    fn sample() -> Sample {
        let packed = Packed {
            prefix: vec![1, 2],
            phrases: vec![
                Phrase { rows: 6..8, segments: vec![SegmentRef::Object(0)], from_image: true },
                // Nothing of it is visible: no term.
                Phrase { rows: 7..8, segments: vec![SegmentRef::Object(9)], from_image: true },
            ],
            ..Packed::default()
        };
        let things = vec![Thing::Object(0), Thing::Object(0), Thing::Object(1), Thing::Padding];
        Sample { packed, things, image: Vec::new() }
    }

    /// Attention of one layer and one head in which every row but those of the phrase is zero.
    fn attention(rows: [[f32; 8]; 2]) -> Result<Tensor> {
        let mut data = vec![0f32; 64];
        data[48..64].copy_from_slice(rows.as_flattened());
        Ok(Tensor::from_vec(data, (1, 1, 8, 8), &Device::Cpu)?)
    }

    #[test]
    fn the_share_on_the_target_counts() -> Result<()> {
        // One layer of two heads: of the aligned ones only (0, 1) is there.
        let value = |rows| -> Result<f32> {
            let probs = attention(rows)?;
            let layer = Tensor::cat(&[&probs, &probs], 1)?;
            Ok(loss(&[sample()], &[layer])?.map_or(Ok(f32::NAN), |loss| loss.to_scalar())?)
        };
        // What the text receives does not matter; over both rows half of the image's share is on the target.
        let half = [[0.5, 0.0, 0.25, 0.25, 0.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.0, 0.25, 0.25, 0.0, 0.0]];
        assert!((value(half)? - 2f32.ln()).abs() < 1e-3);
        let all = [[0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]; 2];
        assert!(value(all)?.abs() < 1e-3);
        Ok(())
    }

    #[test]
    fn without_phrases_there_is_no_loss() -> Result<()> {
        let mut sample = sample();
        sample.packed.phrases.clear();
        let probs = attention([[0.0; 8]; 2])?;
        assert!(loss(&[sample], &[Tensor::cat(&[&probs, &probs], 1)?])?.is_none());
        Ok(())
    }
}
