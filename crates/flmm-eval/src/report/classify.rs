//! In which way a phrase failed.

use flmm::Result;
use serde::Serialize;

use crate::record::Prediction;
use crate::runs::Runs;
use crate::task::Truth;

/// Below this IoU a mask does not show the same thing at all.
const ELSEWHERE: f64 = 0.1;

/// What went wrong with a phrase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Kind {
    /// The answer does not speak of it, or gives it no mask.
    PhraseMissed,
    /// It has a mask without a single pixel.
    MaskEmpty,
    /// The mask lies elsewhere, or on what another phrase speaks of.
    WrongObject,
    /// The right place, but badly covered.
    LowIou,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 4] = [Self::PhraseMissed, Self::MaskEmpty, Self::WrongObject, Self::LowIou];

    /// What a reader sees.
    pub fn name(self) -> &'static str {
        match self {
            Self::PhraseMissed => "phrase missed",
            Self::MaskEmpty => "mask empty",
            Self::WrongObject => "wrong object",
            Self::LowIou => "low IoU",
        }
    }
}

/// The judgement of one true phrase.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// What went wrong; `None` if nothing did.
    pub kind: Option<Kind>,
    /// IoU with the predicted mask, 0 without one.
    pub iou: f64,
    /// Number and mask of the predicted phrase that was compared.
    pub predicted: Option<(usize, Runs)>,
}

/// One verdict per true phrase. A phrase with no true pixel that got no pixel is right.
pub(super) fn classify(prediction: &Prediction, truth: &Truth, threshold: f64) -> Result<Vec<Verdict>> {
    let mut masks = Vec::with_capacity(prediction.phrases.len());
    for phrase in &prediction.phrases {
        masks.push(phrase.segmentation.as_ref().map(Runs::from_coco).transpose()?);
    }
    let one = |number: usize| -> Result<Verdict> {
        let (text, mask) = &truth.phrases[number];
        let at = match truth.given {
            true => (number < masks.len()).then_some(number),
            false => nearest(text, mask, prediction, &masks)?,
        };
        let found = at.and_then(|at| Some((at, masks.get(at)?.clone()?)));
        let Some((at, predicted)) = found else {
            return Ok(Verdict { kind: Some(Kind::PhraseMissed), iou: 0.0, predicted: None });
        };
        let iou = predicted.overlap(mask)?.iou();
        let kind = if iou >= threshold || (predicted.is_empty() && mask.is_empty()) {
            None
        } else if predicted.is_empty() {
            Some(Kind::MaskEmpty)
        } else if iou < ELSEWHERE || fits_better(number, &predicted, iou, truth)? {
            Some(Kind::WrongObject)
        } else {
            Some(Kind::LowIou)
        };
        Ok(Verdict { kind, iou, predicted: Some((at, predicted)) })
    };
    (0..truth.phrases.len()).map(one).collect()
}

/// Whether the mask shows what another phrase of the sample speaks of.
fn fits_better(number: usize, predicted: &Runs, iou: f64, truth: &Truth) -> Result<bool> {
    for (other, (_, mask)) in truth.phrases.iter().enumerate() {
        // Phrases may share their mask.
        if other != number && *mask != truth.phrases[number].1 {
            let fits = predicted.overlap(mask)?.iou();
            if fits >= 0.5 && fits > iou {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// The predicted phrase that a true one is compared with: the mask that overlaps most; if none does, the phrase whose words
/// are the same, without regard to case and articles.
fn nearest(
    text: &str,
    truth: &Runs,
    prediction: &Prediction,
    masks: &[Option<Runs>],
) -> Result<Option<usize>> {
    let mut best: Option<(usize, f64)> = None;
    for (at, mask) in masks.iter().enumerate() {
        if let Some(mask) = mask {
            let iou = mask.overlap(truth)?.iou();
            if iou > best.map_or(ELSEWHERE, |(_, best)| best) {
                best = Some((at, iou));
            }
        }
    }
    let wanted = content(text);
    let same =
        || prediction.phrases.iter().position(|phrase| !wanted.is_empty() && content(&phrase.text) == wanted);
    Ok(best.map(|(at, _)| at).or_else(same))
}

/// The words of a phrase without articles, lower case.
fn content(text: &str) -> Vec<String> {
    let words = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_lowercase).filter(|word| !matches!(word.as_str(), "a" | "an" | "the")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Phrase;

    fn square(x0: u32, y0: u32, side: u32) -> Runs {
        Runs::from_fn(20, 20, |x, y| (x0..x0 + side).contains(&x) && (y0..y0 + side).contains(&y))
    }

    fn kinds(given: bool, predicted: &[(&str, Option<Runs>)]) -> Vec<Option<Kind>> {
        let phrases = vec![("the dog".to_owned(), square(0, 0, 8)), ("A cat".to_owned(), square(10, 10, 8))];
        let truth = Truth { phrases, given };
        let phrases = predicted.iter().map(|(text, mask)| Phrase {
            text: (*text).to_owned(),
            segmentation: mask.as_ref().map(Runs::to_coco),
            score: None,
        });
        let prediction = Prediction { phrases: phrases.collect(), ..Prediction::default() };
        classify(&prediction, &truth, 0.5).unwrap().into_iter().map(|verdict| verdict.kind).collect()
    }

    #[test]
    fn given_phrases_are_compared_in_order() {
        let (dog, cat) = (square(0, 0, 8), square(10, 10, 8));
        assert_eq!(kinds(true, &[("", Some(dog.clone())), ("", Some(cat.clone()))]), [None, None]);
        assert_eq!(
            kinds(true, &[("", Some(cat.clone())), ("", None)]),
            [Some(Kind::WrongObject), Some(Kind::PhraseMissed)]
        );
        assert_eq!(
            kinds(true, &[("", Some(Runs::empty(20, 20))), ("", Some(square(10, 10, 4)))]),
            [Some(Kind::MaskEmpty), Some(Kind::LowIou)]
        );
    }

    #[test]
    fn own_phrases_are_compared_by_place_then_by_words() {
        let (dog, cat) = (square(0, 0, 8), square(10, 10, 8));
        assert_eq!(kinds(false, &[("cats", Some(cat)), ("x", Some(dog.clone()))]), [None, None]);
        // The cat is named, but marked where the dog is; the dog's place is marked by it.
        assert_eq!(kinds(false, &[("The Cat", Some(dog))]), [None, Some(Kind::WrongObject)]);
        assert_eq!(kinds(false, &[]), [Some(Kind::PhraseMissed); 2]);
    }
}
