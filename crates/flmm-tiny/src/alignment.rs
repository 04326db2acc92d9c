//! Contrastive alignment of phrases with patches in the decoder's own space.
//!
//! A large multimodal model inherits from CLIP and from region-level instruction data that the words of a phrase find
//! the patches they mean. flmm-tiny has neither, so a few heads of its decoder get a contrastive loss: of all patches,
//! the ones under the thing a phrase refers to must score highest against the phrase's tokens. The grounding head is
//! not involved; it is trained later, on the frozen model.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::{D, DType, Device, Tensor};
use flmm_data::world::SegmentRef;

use crate::lmm::Sample;
use crate::pack::Phrase;
use crate::symbolic::Thing;

/// The heads (layer, head) that are aligned: one that sees a word alone, and late ones that know its sentence.
pub(crate) const HEADS: [(usize, usize); 4] = [(0, 1), (3, 0), (4, 0), (5, 0)];
/// Keeps the logarithm finite where a phrase ignores its target.
const EPS: f64 = 1e-4;

/// Mean over phrases and aligned heads of `−log` of the share of image attention that lies on the phrase's target;
/// `attention` has their maps, `[B, S, image tokens]`. `None` if no phrase has a visible target.
pub(crate) fn loss(
    samples: &[Sample],
    attention: &BTreeMap<(usize, usize), Tensor>,
) -> Result<Option<Tensor>> {
    let Some(rows) = attention.values().next().map(|map| map.dim(1)).transpose()? else { return Ok(None) };
    let Some(Selection { means, targets, counted, count }) = Selection::new(samples, rows)? else {
        return Ok(None);
    };
    let (mut sum, mut terms) = (Tensor::zeros((), DType::F32, &Device::Cpu)?, 0);
    for map in HEADS.iter().filter_map(|head| attention.get(head)) {
        let maps = means.matmul(map)?;
        let share = ((&maps * &targets)?.sum(D::Minus1)? / (maps.sum(D::Minus1)? + 1e-6)?)?;
        sum = (sum - ((share + EPS)?.log()? * &counted)?.sum_all()?)?;
        terms += count;
    }
    Ok(if terms == 0 { None } else { Some((sum / terms as f64)?) })
}

/// The phrases of a batch that have a visible target, filled up to the same number `P` in every sample.
struct Selection {
    /// Averages a phrase's rows, `[B, P, S]`.
    means: Tensor,
    /// 1 on the patches of a phrase's target, `[B, P, tokens]`.
    targets: Tensor,
    /// 1 for phrases, 0 for what fills up, `[B, P]`.
    counted: Tensor,
    /// Phrases.
    count: usize,
}

impl Selection {
    fn new(samples: &[Sample], rows: usize) -> Result<Option<Self>> {
        let phrases: Vec<Vec<(&Phrase, Vec<f32>)>> = samples.iter().map(visible).collect();
        let most = phrases.iter().map(Vec::len).max().unwrap_or(0);
        if most == 0 {
            return Ok(None);
        }
        let (batch, tokens) = (samples.len(), samples[0].things.len());
        let mut means = vec![0f32; batch * most * rows];
        let mut targets = vec![0f32; batch * most * tokens];
        let mut counted = vec![0f32; batch * most];
        for (sample, phrases) in phrases.iter().enumerate() {
            for (at, (phrase, target)) in phrases.iter().enumerate() {
                let at = sample * most + at;
                means[at * rows..][phrase.rows.clone()].fill(1.0 / phrase.rows.len() as f32);
                targets[at * tokens..][..tokens].copy_from_slice(target);
                counted[at] = 1.0;
            }
        }
        Ok(Some(Self {
            means: Tensor::from_vec(means, (batch, most, rows), &Device::Cpu)?,
            targets: Tensor::from_vec(targets, (batch, most, tokens), &Device::Cpu)?,
            counted: Tensor::from_vec(counted, (batch, most), &Device::Cpu)?,
            count: phrases.iter().map(Vec::len).sum(),
        }))
    }
}

/// Phrases of which something is visible, and 1 on the patches that show it.
fn visible(sample: &Sample) -> Vec<(&Phrase, Vec<f32>)> {
    let target = |phrase: &Phrase| -> Vec<f32> {
        let inside = |thing: &Thing| match thing {
            Thing::Object(i) => phrase.segments.contains(&SegmentRef::Object(*i)),
            Thing::Stuff(i) => phrase.segments.contains(&SegmentRef::Stuff(*i)),
            Thing::Padding => false,
        };
        sample.things.iter().map(|thing| f32::from(u8::from(inside(thing)))).collect()
    };
    let phrases = sample.packed.phrases.iter().map(|phrase| (phrase, target(phrase)));
    phrases.filter(|(_, target)| target.contains(&1.0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::Packed;

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

    /// Attention to the image of an aligned head, in which every row but those of the phrase is zero.
    fn attention(rows: [[f32; 4]; 2]) -> Result<Tensor> {
        let mut data = vec![0f32; 32];
        data[24..32].copy_from_slice(rows.as_flattened());
        Ok(Tensor::from_vec(data, (1, 8, 4), &Device::Cpu)?)
    }

    #[test]
    fn the_share_on_the_target_counts() -> Result<()> {
        let value = |samples: &[Sample], map: Tensor| -> Result<f32> {
            // Of the aligned heads only one is there.
            let attention = BTreeMap::from([((0, 0), map.zeros_like()?), (HEADS[0], map)]);
            Ok(loss(samples, &attention)?.map_or(Ok(f32::NAN), |loss| loss.to_scalar())?)
        };
        // Over both rows half of the image's share is on the target.
        let half = attention([[0.25, 0.25, 0.0, 0.0], [0.0, 0.0, 0.25, 0.25]])?;
        assert!((value(&[sample()], half.clone())? - 2f32.ln()).abs() < 1e-3);
        // Phrases count the same, however many their sample has; one that sees its target alone adds nothing.
        let mut twice = sample();
        twice.packed.phrases.push(Phrase { rows: 6..7, ..twice.packed.phrases[0].clone() });
        let both = value(&[sample(), twice], Tensor::cat(&[&half, &half], 0)?)?;
        assert!((both - 2.0 / 3.0 * 2f32.ln()).abs() < 1e-3);
        assert!(value(&[sample()], attention([[1.0, 0.0, 0.0, 0.0]; 2])?)?.abs() < 1e-3);
        Ok(())
    }

    #[test]
    fn without_phrases_there_is_no_loss() -> Result<()> {
        let mut sample = sample();
        sample.packed.phrases.clear();
        let attention = BTreeMap::from([(HEADS[0], attention([[0.0; 4]; 2])?)]);
        assert!(loss(&[sample], &attention)?.is_none());
        Ok(())
    }
}
