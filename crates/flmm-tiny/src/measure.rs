//! What evaluations count: overlaps of masks, phrases found, numbers as the model card prints them.

use anyhow::Result;
use flmm::masks::Mask;
use flmm_data::world::{Scene, SegmentRef};
use flmm_eval::png;
use flmm_eval::runs::Overlap as Pixels;
use serde_json::{Value, json};

use crate::stage_head::union;

/// Right and all.
pub(crate) type Count = (usize, usize);

/// Intersection and union pixels, and the sum of single IoUs.
#[derive(Debug, Default)]
pub(crate) struct Overlap {
    intersection: usize,
    union: usize,
    ious: f64,
    masks: usize,
}

impl Overlap {
    /// Adds a mask and returns how it overlaps with the truth.
    pub(crate) fn add(&mut self, found: &Mask, truth: &Mask) -> Result<Pixels> {
        let intersection = found.intersection(truth)?.area();
        let union = found.area() + truth.area() - intersection;
        self.intersection += intersection;
        self.union += union;
        self.ious += if union == 0 { 1.0 } else { intersection as f64 / union as f64 };
        self.masks += 1;
        Ok(Pixels { intersection: intersection as u64, union: union as u64 })
    }

    /// Intersection of all masks over their union, percent.
    pub(crate) fn ciou(&self) -> f64 {
        percent(self.intersection, self.union)
    }

    /// Mean IoU, percent.
    pub(crate) fn miou(&self) -> f64 {
        round(100.0 * self.ious / self.masks.max(1) as f64)
    }

    pub(crate) fn json(&self) -> Value {
        json!({ "cIoU": self.ciou(), "mIoU": self.miou(), "masks": self.masks })
    }
}

/// Masks of narrations' phrases: overlap, and average recall as in panoptic narrative grounding.
#[derive(Debug, Default)]
pub(crate) struct Narrated {
    overlap: Overlap,
    score: png::Score,
}

impl Narrated {
    /// Adds the mask of a phrase that means `segments` of `scene`.
    pub(crate) fn add(&mut self, found: &Mask, scene: &Scene, segments: &[SegmentRef]) -> Result<()> {
        let overlap = self.overlap.add(found, &truth(scene, segments)?)?;
        let thing = segments.iter().all(|segment| matches!(segment, SegmentRef::Object(_)));
        self.score.push(overlap, (found.width() * found.height()) as u64, thing, segments.len() > 1);
        Ok(())
    }

    pub(crate) fn json(&self) -> Value {
        let metrics = png::metrics(std::slice::from_ref(&self.score)).metrics;
        let recall = |kind: &str| round(metrics.get(&format!("AR {kind}")).unwrap_or_default());
        let things = self.score.thing.iter().filter(|thing| **thing).count();
        json!({
            "cIoU": self.overlap.ciou(),
            "mIoU": self.overlap.miou(),
            "average_recall": recall("all"),
            "average_recall_thing": recall("thing"),
            "average_recall_stuff": recall("stuff"),
            "masks": self.overlap.masks,
            "things": things,
            "stuff": self.overlap.masks - things,
        })
    }
}

/// Phrases found, predicted and true.
#[derive(Debug, Default)]
pub(crate) struct Phrases([usize; 3]);

impl Phrases {
    /// Counts the ranges that are predicted exactly.
    pub(crate) fn add<T: PartialEq>(&mut self, predicted: &[T], truth: &[T]) {
        self.0[0] += predicted.iter().filter(|range| truth.contains(range)).count();
        self.0[1] += predicted.len();
        self.0[2] += truth.len();
    }

    pub(crate) fn json(&self) -> Value {
        let [found, predicted, truth] = self.0;
        json!({
            "precision": percent(found, predicted),
            "recall": percent(found, truth),
            "f1": percent(2 * found, predicted + truth),
        })
    }
}

/// The union of segments.
pub(crate) fn truth(scene: &Scene, segments: &[SegmentRef]) -> Result<Mask> {
    let (height, width) = (scene.image.height() as usize, scene.image.width() as usize);
    Ok(Mask::new(width, height, union(scene, segments).iter().map(|v| *v > 0).collect())?)
}

/// A share in percent, one decimal.
pub(crate) fn percent(part: usize, whole: usize) -> f64 {
    round(100.0 * part as f64 / whole.max(1) as f64)
}

/// One decimal.
pub(crate) fn round(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

/// The middle one of `values`; 0 without any.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlaps_are_pooled_and_averaged() -> Result<()> {
        let mask = |bits: [u8; 4]| Mask::new(4, 1, bits.map(|b| b > 0).to_vec());
        let mut overlap = Overlap::default();
        overlap.add(&mask([1, 1, 0, 0])?, &mask([0, 1, 1, 1])?)?;
        overlap.add(&mask([1, 1, 1, 1])?, &mask([1, 1, 1, 1])?)?;
        assert_eq!((overlap.ciou(), overlap.miou()), (62.5, 62.5));
        overlap.add(&mask([0, 0, 0, 0])?, &mask([1, 0, 0, 0])?)?;
        assert_eq!((overlap.ciou(), overlap.miou()), (55.6, 41.7));
        Ok(())
    }

    #[test]
    fn only_exact_phrases_are_found() {
        let mut phrases = Phrases::default();
        phrases.add(&[0..2, 3..4], &[0..2, 3..5, 6..7]);
        assert_eq!(phrases.json(), json!({ "precision": 50.0, "recall": 33.3, "f1": 40.0 }));
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(Vec::new()), 0.0);
    }
}
