//! Pictures of how masks come about: attention clusters, coarse mask, refined mask, ground truth
//! (`spec/evaluation.md` §9).

use std::ops::Range;

use candle_core::Tensor;
use flmm::clusters::{Side, at_logit_size, better_side};
use flmm::grounder::Observation;
use flmm::masks::Mask;
use flmm::overlay::{Region, draw, draw_mask, heat_map, panels};
use flmm::{Grounder, Result};
use flmm_data::narratives::NarrativeSample;
use image::RgbImage;

/// One phrase in four stages, and its numbers.
#[derive(Debug, Clone)]
pub struct PhraseStages {
    /// Its words.
    pub text: String,
    /// Its characters in the narrative.
    pub chars: Range<usize>,
    /// Its attention `[C, h, w]`, at the size of the mask head's logits, padding cut off, not normalised.
    pub stack: Tensor,
    /// The cluster of its attention that fits the ground truth better.
    pub clusters: Mask,
    /// Soft IoU of that cluster with the ground truth.
    pub soft_iou: f64,
    /// The mask head's mask.
    pub coarse: Mask,
    /// The refiner's mask.
    pub refined: Mask,
    /// The ground truth.
    pub truth: Mask,
}

impl PhraseStages {
    /// IoU with the ground truth: clusters, coarse, refined.
    pub fn ious(&self) -> Result<[f64; 3]> {
        Ok([self.clusters.iou(&self.truth)?, self.coarse.iou(&self.truth)?, self.refined.iou(&self.truth)?])
    }

    /// Side by side: picture, attention, clusters, coarse mask, refined mask, ground truth. `index` gives the colour.
    pub fn strip(&self, image: &RgbImage, index: usize) -> Result<RgbImage> {
        let (_, height, width) = self.stack.dims3()?;
        let mean = self.stack.mean(0)?.flatten_all()?.to_vec1::<f32>()?;
        let mask = |title: &str, mask: &Mask| -> Result<_> {
            Ok((title.to_owned(), draw_mask(image, mask, index)?))
        };
        Ok(panels(&[vec![
            (self.text.trim().to_owned(), image.clone()),
            ("mean attention".to_owned(), heat_map(image, &mean, (height, width))?),
            mask("K-means", &self.clusters)?,
            mask("coarse mask", &self.coarse)?,
            mask("refined mask", &self.refined)?,
            mask("ground truth", &self.truth)?,
        ]]))
    }
}

/// All phrases of a narrative in four stages. The clustering is the same for the same `seed`.
pub fn stages(
    grounder: &Grounder,
    observation: &Observation,
    sample: &NarrativeSample,
    seed: u64,
) -> Result<Vec<PhraseStages>> {
    let masks = grounder.segment(observation)?;
    let mut out = Vec::with_capacity(masks.len());
    for (index, ((refined, coarse), (text, chars))) in masks.into_iter().zip(phrases(sample)).enumerate() {
        let truth = Mask::from(&sample.phrases[index].mask);
        let stack = at_logit_size(&observation.maps.get(index)?, &observation.geometry)?;
        let Side { mask: clusters, soft_iou } = better_side(&stack, &truth, seed)?;
        out.push(PhraseStages { text, chars, stack, clusters, soft_iou, coarse, refined, truth });
    }
    Ok(out)
}

/// Words and characters of every phrase.
fn phrases(sample: &NarrativeSample) -> Vec<(String, Range<usize>)> {
    let mut start = 0;
    let mut found = Vec::new();
    for (text, phrase) in &sample.utterances {
        let end = start + text.chars().count();
        if phrase.is_some() {
            let blank = |c: &char| c.is_whitespace();
            let (before, after) = (text.chars().take_while(blank), text.chars().rev().take_while(blank));
            let trimmed = start + before.count()..(end - after.count()).max(start);
            found.push((text.clone(), trimmed));
        }
        start = end;
    }
    found
}

/// Four panels with all phrases in their colours, the narrative with the same colours below.
pub fn four_panels(image: &RgbImage, sample: &NarrativeSample, stages: &[PhraseStages]) -> Result<RgbImage> {
    let panel = |title: &str, mask: fn(&PhraseStages) -> &Mask| -> Result<(String, RgbImage)> {
        let regions: Vec<Region> =
            stages.iter().map(|stage| Region { mask: mask(stage), chars: stage.chars.clone() }).collect();
        Ok((title.to_owned(), draw(image, "", &regions)?))
    };
    let sheet = panels(&[
        vec![panel("attention clusters", |s| &s.clusters)?, panel("coarse masks", |s| &s.coarse)?],
        vec![panel("refined masks", |s| &s.refined)?, panel("ground truth", |s| &s.truth)?],
    ]);
    // The legend only: nothing is marked on the sheet itself.
    let nothing = Mask::empty(sheet.width() as usize, sheet.height() as usize);
    let legend: Vec<Region> =
        stages.iter().map(|stage| Region { mask: &nothing, chars: stage.chars.clone() }).collect();
    let narrative: String = sample.utterances.iter().map(|(text, _)| text.as_str()).collect();
    draw(&sheet, &narrative, &legend)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phrases_are_found_without_the_blanks_around_them() {
        let utterances = [("In ", None), ("the Käfer ", Some(0)), ("sits", None), (" a man", Some(1))];
        let sample = NarrativeSample {
            image_id: 1,
            file_name: "1.jpg".into(),
            size: [1, 1],
            utterances: utterances.map(|(text, phrase)| (text.to_owned(), phrase)).to_vec(),
            phrases: Vec::new(),
        };
        let ranges: Vec<Range<usize>> = phrases(&sample).into_iter().map(|(_, chars)| chars).collect();
        assert_eq!(ranges, [3..12, 18..23]);
    }
}
