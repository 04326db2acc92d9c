//! A look at unseen samples: masks and keyword selector measured, and some pictures drawn.

use std::path::{Path, PathBuf};

use candle_core::{D, Tensor};
use flmm::grounder::GroundingHead;
use flmm::masks::Mask;
use flmm::overlay::{self, Region};
use flmm::phrases::{LAMBDA, average_precision, select_keywords, token_texts, true_ranges};
use flmm::text::tokenizer::Tokenizer;
use flmm::{Error, Result};
use image::RgbImage;

use crate::config::ValidationConfig;
use crate::head::{HeadSample, decode_in_parts};
use crate::losses::{bce, dice, stats};
use crate::observed::Observed;
use crate::text::LabelledText;
use crate::tolerant::is_about_the_sample;

/// Validation of a run.
pub(crate) struct Validation<'a> {
    observed: &'a Observed<'a>,
    indices: Vec<usize>,
    overlays: usize,
    /// Where pictures are drawn: `<dir>/step-N/*.png`.
    dir: PathBuf,
    phrases_at_once: usize,
    /// Whether masks are judged, or the keyword selector alone.
    masks: bool,
}

/// What a validation found.
pub(crate) struct Found {
    /// Values for the log, by name.
    pub(crate) values: Vec<(String, f64)>,
    /// Pictures that were drawn, by the key of their sample.
    pub(crate) pictures: Vec<(String, RgbImage)>,
}

impl<'a> Validation<'a> {
    /// Validation on samples spread evenly over the parts of `observed`.
    pub(crate) fn new(
        observed: &'a Observed<'a>,
        config: &ValidationConfig,
        out: &Path,
        phrases_at_once: usize,
        masks: bool,
    ) -> Self {
        let parts = observed.mixture.parts();
        let each = config.samples.div_ceil(parts.len().max(1));
        let (mut indices, mut start) = (Vec::new(), 0);
        for (_, len) in parts {
            let count = each.min(len);
            indices.extend((0..count).map(|i| start + i * len / count));
            start += len;
        }
        let dir = out.join("validation");
        Self { observed, indices, overlays: config.overlays, dir, phrases_at_once, masks }
    }

    /// Measures `head` and draws some samples for `step`. Samples that cannot be used are passed over.
    pub(crate) fn look(&self, head: &GroundingHead, step: u64) -> Result<Found> {
        let (mut masks, mut words) = (MaskSums::default(), Words::default());
        let mut pictures = Vec::new();
        let mut last = None;
        // Every n-th sample is drawn, so that all parts are seen.
        let stride = self.indices.len().div_ceil(self.overlays.max(1)).max(1);
        for (number, &index) in self.indices.iter().enumerate() {
            let draw = self.masks && self.overlays > 0 && number % stride == 0;
            match self.sample(head, index, draw, &mut masks, &mut words) {
                Ok(Some((key, picture))) => {
                    let name = format!("{}.png", key.replace('/', "-"));
                    let folder = self.dir.join(format!("step-{step:07}"));
                    std::fs::create_dir_all(&folder).map_err(|e| Error::io(&folder, e))?;
                    overlay::save_png(&picture, &folder.join(name))?;
                    pictures.push((key, picture));
                }
                Ok(None) => {}
                Err(error) if is_about_the_sample(&error) => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        let mut values = masks.values();
        values.extend(words.values());
        match (values.is_empty(), last) {
            (true, Some(error)) => Err(error),
            _ => Ok(Found { values, pictures }),
        }
    }

    fn sample(
        &self,
        head: &GroundingHead,
        index: usize,
        draw: bool,
        masks: &mut MaskSums,
        words: &mut Words,
    ) -> Result<Option<(String, RgbImage)>> {
        let text = self.observed.text(index, 0)?;
        let tokenizer = self.observed.frozen.grounder()?.lmm().tokenizer();
        if !self.masks {
            if text.is_narrative {
                let sample = self.observed.observe_words(&text)?;
                words.add(head, &sample.hidden, &text, tokenizer)?;
            }
            return Ok(None);
        }
        let sample = self.observed.observe(&text)?;
        if text.is_narrative {
            words.add(head, &sample.observation.hidden, &text, tokenizer)?;
        }
        let refined = masks.add(head, &sample, self.phrases_at_once)?;
        if !draw {
            return Ok(None);
        }
        let picture = drawn(&text, &refined, &self.observed.picture(&text)?)?;
        Ok(Some((text.key, picture)))
    }
}

/// The picture with the masks of refined logits `[N, H, W]`, and the text.
fn drawn(text: &LabelledText, refined: &Tensor, picture: &RgbImage) -> Result<RgbImage> {
    let masks =
        (0..refined.dim(0)?).map(|n| Mask::from_logits(&refined.get(n)?)).collect::<Result<Vec<_>>>()?;
    let (mut answer, mut ranges) = (String::new(), vec![0..0; masks.len()]);
    let mut at = 0;
    for (piece, phrase) in &text.pieces {
        let chars = piece.chars().count();
        if let Some(range) = phrase.and_then(|phrase| ranges.get_mut(phrase)) {
            *range = at..at + chars;
        }
        answer.push_str(piece);
        at += chars;
    }
    let regions: Vec<Region> =
        masks.iter().zip(&ranges).map(|(mask, chars)| Region { mask, chars: chars.clone() }).collect();
    overlay::draw(picture, &answer, &regions)
}

/// Losses and IoU over masks.
#[derive(Default)]
struct MaskSums {
    count: f64,
    /// Sums over masks: coarse cross-entropy, dice and IoU, and the refined ones.
    sums: [f64; 6],
    intersection: f64,
    union: f64,
}

impl MaskSums {
    /// Adds the masks of a sample and gives their refined logits `[N, H, W]`.
    fn add(&mut self, head: &GroundingHead, sample: &HeadSample, phrases_at_once: usize) -> Result<Tensor> {
        let logits = decode_in_parts(head, &sample.observation, phrases_at_once)?;
        let n = sample.observation.phrases.len() as f64;
        let (_, h, w) = logits.coarse.dims3()?;
        let small = flmm::nn::nearest(&sample.masks, h, w)?;
        self.count += n;
        let pairs = [(&logits.coarse, &small), (&logits.refined, &sample.masks)];
        for ((logits, target), sums) in pairs.into_iter().zip(self.sums.chunks_exact_mut(3)) {
            let value = |x: Tensor| x.to_scalar::<f32>().map(f64::from);
            sums[0] += n * value(bce(logits, target)?)?;
            sums[1] += n * value(dice(logits, target)?)?;
            sums[2] += n * stats(logits, target)?.aiou;
        }
        let inside = logits.refined.gt(0f32)?;
        let both = inside.mul(&sample.masks)?;
        let area = |x: &Tensor| -> Result<f64> {
            Ok(f64::from(x.to_dtype(candle_core::DType::F32)?.sum(D::Minus1)?.sum_all()?.to_scalar::<f32>()?))
        };
        let shared = area(&both)?;
        self.intersection += shared;
        self.union += area(&inside)? + area(&sample.masks)? - shared;
        Ok(logits.refined)
    }

    fn values(&self) -> Vec<(String, f64)> {
        if self.count == 0.0 {
            return Vec::new();
        }
        let names = ["loss_mask", "loss_dice", "aiou", "sam_loss_mask", "sam_loss_dice", "sam_aiou"];
        let means = names.iter().zip(self.sums).map(|(name, sum)| (format!("val_{name}"), sum / self.count));
        let ciou = ("val_sam_ciou".to_owned(), self.intersection / self.union.max(1.0));
        means.chain([ciou]).collect()
    }
}

/// Scores of tokens and phrases found by the keyword selector (`spec/training.md` §8.2).
#[derive(Default)]
pub struct Words {
    /// Probability and whether the token belongs to a phrase.
    tokens: Vec<(f32, bool)>,
    /// Phrases that were found, that there are, and that are both.
    phrases: [usize; 3],
}

impl Words {
    fn add(
        &mut self,
        head: &GroundingHead,
        hidden: &Tensor,
        text: &LabelledText,
        tokenizer: &Tokenizer,
    ) -> Result<()> {
        let Some(probs) = head.keyword_probs(hidden)? else { return Ok(()) };
        let ids = &text.caption.token_ids[..probs.len()];
        self.count(&probs, &text.caption.mask_ids[..probs.len()], &token_texts(tokenizer, ids));
        Ok(())
    }

    /// Adds a text: probabilities, phrase numbers (−1: none) and texts of its tokens.
    pub fn count(&mut self, probs: &[f32], mask_ids: &[i32], words: &[String]) {
        self.tokens.extend(probs.iter().zip(mask_ids).map(|(&p, &id)| (p, id >= 0)));
        let found = select_keywords(probs, words, LAMBDA);
        let wanted = true_ranges(mask_ids);
        let both = found.iter().filter(|range| wanted.contains(range)).count();
        for (sum, count) in self.phrases.iter_mut().zip([found.len(), wanted.len(), both]) {
            *sum += count;
        }
    }

    /// Token precision, recall and F1 at λ, average precision, phrase F1; empty if no token was counted.
    pub fn values(&self) -> Vec<(String, f64)> {
        if self.tokens.is_empty() {
            return Vec::new();
        }
        let positive = |&&(p, _): &&(f32, bool)| p > LAMBDA;
        let found = self.tokens.iter().filter(positive).count();
        let wanted = self.tokens.iter().filter(|(_, wanted)| *wanted).count();
        let both = self.tokens.iter().filter(positive).filter(|(_, wanted)| *wanted).count();
        let ratio = |a: usize, b: usize| if b == 0 { 0.0 } else { a as f64 / b as f64 };
        let [phrases_found, phrases_wanted, phrases_both] = self.phrases;
        [
            ("val_token_precision", ratio(both, found)),
            ("val_token_recall", ratio(both, wanted)),
            ("val_token_f1", ratio(2 * both, found + wanted)),
            ("val_token_ap", average_precision(&self.tokens)),
            ("val_phrase_f1", ratio(2 * phrases_both, phrases_found + phrases_wanted)),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selector_metrics_of_a_small_text() {
        let mut words = Words::default();
        let texts = ["a", "cat", "sits", "on", "the", "mat", "."].map(str::to_owned);
        // Two phrases; the first is found exactly, the second one token too long.
        words.count(&[0.9, 0.8, 0.1, 0.6, 0.7, 0.5, 0.05], &[0, 0, -1, -1, 1, 1, -1], &texts);
        let values: std::collections::BTreeMap<String, f64> = words.values().into_iter().collect();
        let close =
            |name: &str, value: f64| assert!((values[name] - value).abs() < 1e-9, "{name}: {}", values[name]);
        close("val_token_precision", 4.0 / 5.0);
        close("val_token_recall", 1.0);
        close("val_token_f1", 8.0 / 9.0);
        // Positives at ranks 1, 2, 3 and 5.
        close("val_token_ap", (1.0 + 1.0 + 1.0 + 4.0 / 5.0) / 4.0);
        close("val_phrase_f1", 0.5);
        assert!(Words::default().values().is_empty());
    }
}
