//! From the scores of single pictures to the numbers of grounded captions.

use flmm::{Error, Result};
use serde::{Deserialize, Serialize};

use super::ap::{Detections, coco_stats};
use crate::captions::meteor::Statistics;
use crate::captions::{CaptionPair, by_words};
use crate::record::Metrics;
use crate::task::Aggregate;

/// What is kept of one picture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// The picture's number, whose order average precision depends on.
    pub image_id: u64,
    /// The predicted caption.
    pub caption: String,
    /// The true one.
    pub reference: String,
    /// METEOR's statistics, and what METEOR may be called.
    pub meteor: Statistics,
    /// "METEOR", or a name that says what was missing.
    pub meteor_label: String,
    /// Mean IoU of the matched masks.
    pub iou: f64,
    /// For average precision.
    pub detections: Detections,
    /// Number of true phrases.
    pub phrases: usize,
    /// How many of them were recalled.
    pub recalled: Recalled,
}

/// Recalled phrases of one picture.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recalled {
    /// By masks alone.
    pub masks: usize,
    /// By masks and texts, as GLaMM's evaluator counts; absent without text similarities.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub glamm: Option<usize>,
    /// As F-LMM's evaluator counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flmm: Option<usize>,
}

/// Metrics in percent, CIDEr times 100.
pub fn metrics(mut scores: Vec<Score>) -> Result<Aggregate> {
    scores.sort_by_key(|score| score.image_id);
    let mut metrics = Metrics::default();
    if scores.is_empty() {
        return Ok(metrics.into());
    }
    let mut meteor = Statistics::default();
    scores.iter().for_each(|score| meteor.add(&score.meteor));
    let label = &scores[0].meteor_label;
    if let Some(other) = scores.iter().find(|score| score.meteor_label != *label) {
        return Err(Error::request(
            format!("some captions were scored with {label}, others with {}", other.meteor_label),
            "score all of them with the same --meteor-data",
        ));
    }
    let pair = |score: &Score| CaptionPair {
        candidate: score.caption.clone(),
        references: vec![score.reference.clone()],
    };
    let words = by_words(&scores.iter().map(pair).collect::<Vec<_>>());
    let phrases: usize = scores.iter().map(|score| score.phrases).sum();
    let recall = |count: &dyn Fn(&Recalled) -> Option<usize>| -> Option<f64> {
        let counts: Option<Vec<usize>> = scores.iter().map(|score| count(&score.recalled)).collect();
        Some(100.0 * counts?.iter().sum::<usize>() as f64 / phrases.max(1) as f64)
    };
    metrics.push(label, 100.0 * meteor.score());
    metrics.push("CIDEr", 100.0 * words.cider.all);
    let detections: Vec<Detections> = scores.iter().map(|score| score.detections.clone()).collect();
    metrics.push("AP50", 100.0 * coco_stats(&detections).ap50());
    metrics.push("mIoU", 100.0 * scores.iter().map(|score| score.iou).sum::<f64>() / scores.len() as f64);
    if let (Some(glamm), Some(flmm)) = (recall(&|r| r.glamm), recall(&|r| r.flmm)) {
        metrics.push("recall", glamm);
        metrics.push("recall, F-LMM", flmm);
    }
    metrics.push("recall of masks", recall(&|r| Some(r.masks)).unwrap_or_default());
    words.bleu.iter().enumerate().for_each(|(n, bleu)| metrics.push(format!("BLEU-{}", n + 1), 100.0 * bleu));
    metrics.push("ROUGE-L", 100.0 * words.rouge_l.all);
    Ok(metrics.into())
}
