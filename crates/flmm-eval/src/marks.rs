//! From an observation to the masks of its phrases.

use std::sync::{Mutex, PoisonError};

use candle_core::Tensor;
use flmm::clusters::{at_logit_size, better_side};
use flmm::grounder::{AnswerOptions, Caption, Observation, Session};
use flmm::lmm::Turn;
use flmm::masks::Mask;
use flmm::nn::sigmoid;
use flmm::{Geometry, Grounder, Result};
use flmm_data::coco::RunLengths;
use image::RgbImage;

use crate::record::{Phrase, Prediction};
use crate::runs::Runs;
use crate::task::{Predicted, Rows};

/// Seed of the clustering.
const CLUSTER_SEED: u64 = 0;

/// The masks of the phrases of one observation.
pub struct Marks {
    /// The refined ones.
    pub refined: Vec<Runs>,
    /// Mean probability of each refined mask's foreground, 0.5 to 1; 0 for an empty mask.
    pub confidence: Vec<f64>,
    /// Those of other rows.
    pub rows: Vec<(&'static str, Vec<RunLengths>)>,
}

impl Marks {
    /// Decodes all phrases. `truth` gives the true mask of a phrase, which chooses between the two K-means clusters;
    /// without one the refined mask does.
    pub fn of(
        grounder: &Grounder,
        observation: &Observation,
        rows: Rows,
        truth: &dyn Fn(usize) -> Result<Option<Mask>>,
    ) -> Result<Self> {
        let logits = grounder.decode(observation)?;
        let masks = grounder.binarise(&logits, observation)?;
        let mut marks = Self { refined: Vec::new(), confidence: Vec::new(), rows: Vec::new() };
        let (mut coarse, mut kmeans) = (Vec::new(), Vec::new());
        for (at, (refined, coarse_mask)) in masks.iter().enumerate() {
            let probs = sigmoid(&logits.refined.get(at)?)?.flatten_all()?.to_vec1::<f32>()?;
            let inside = probs.iter().zip(refined.bits()).filter(|(_, bit)| **bit);
            let (sum, count) = inside.fold((0.0, 0usize), |(sum, n), (p, _)| (sum + f64::from(*p), n + 1));
            marks.confidence.push(if count == 0 { 0.0 } else { sum / count as f64 });
            marks.refined.push(refined.into());
            if rows.coarse {
                coarse.push(Runs::from(coarse_mask).to_coco());
            }
            if rows.kmeans {
                let truth = truth(at)?;
                kmeans.push(clusters(observation, at, truth.as_ref().unwrap_or(refined))?.to_coco());
            }
        }
        if rows.kmeans {
            marks.rows.push(("kmeans", kmeans));
        }
        if rows.coarse {
            marks.rows.push(("coarse", coarse));
        }
        Ok(marks)
    }

    /// As a prediction whose phrases are called `texts`.
    pub fn predicted(
        self,
        prediction: Prediction,
        texts: impl IntoIterator<Item = impl Into<String>>,
    ) -> Predicted {
        let phrases = texts.into_iter().zip(&self.refined).zip(&self.confidence);
        let phrases = phrases.map(|((text, mask), confidence)| Phrase {
            text: text.into(),
            segmentation: Some(mask.to_coco()),
            score: Some(*confidence),
        });
        Predicted { prediction: Prediction { phrases: phrases.collect(), ..prediction }, rows: self.rows }
    }
}

/// The better of the two K-means clusters of a phrase's attention, by soft IoU with `reference`.
fn clusters(observation: &Observation, phrase: usize, reference: &Mask) -> Result<Runs> {
    better_cluster(&observation.maps.get(phrase)?, &observation.geometry, reference)
}

/// The better of the two K-means clusters of attention maps `[C, gh, gw]`, by soft IoU with `reference`.
pub fn better_cluster(maps: &Tensor, geometry: &Geometry, reference: &Mask) -> Result<Runs> {
    Ok(Runs::from(&better_side(&at_logit_size(maps, geometry)?, reference, CLUSTER_SEED)?.mask))
}

/// What the model says to the last of `turns`, and what it looks at while it says it: all tokens are one phrase. No
/// observation if it says nothing.
pub fn observe_reply(
    grounder: &Grounder,
    session: &mut Session,
    turns: &[Turn],
    options: &AnswerOptions,
) -> Result<(String, Option<Observation>)> {
    session.turns = turns.to_vec();
    let said = grounder.reply(session, options, &mut |_| {})?;
    if said.token_ids.is_empty() {
        return Ok((said.answer, None));
    }
    let observation = grounder.observe_in(session, turns, &one_phrase(said.token_ids))?;
    Ok((said.answer, Some(observation)))
}

/// All tokens as one phrase.
pub(crate) fn one_phrase(token_ids: Vec<u32>) -> Caption {
    Caption { mask_ids: vec![0; token_ids.len()], token_ids }
}

/// The session of the picture last asked about: samples of one picture follow each other, and share what is computed
/// once per picture.
#[derive(Default)]
pub struct LastSession(Mutex<Option<(String, Session)>>);

impl LastSession {
    /// Observes `caption` behind `turns` about the picture called `name`.
    pub fn observe(
        &self,
        grounder: &Grounder,
        name: &str,
        picture: impl FnOnce() -> Result<RgbImage>,
        turns: &[Turn],
        caption: &Caption,
    ) -> Result<Observation> {
        self.with(grounder, name, picture, |session| grounder.observe_in(session, turns, caption))
    }

    /// Does something with the session of the picture called `name`. A session that failed is not kept.
    pub fn with<T>(
        &self,
        grounder: &Grounder,
        name: &str,
        picture: impl FnOnce() -> Result<RgbImage>,
        act: impl FnOnce(&mut Session) -> Result<T>,
    ) -> Result<T> {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut session = match last.take() {
            Some((known, session)) if known == name => session,
            _ => grounder.start(&picture()?)?,
        };
        let result = act(&mut session)?;
        *last = Some((name.to_owned(), session));
        Ok(result)
    }
}
