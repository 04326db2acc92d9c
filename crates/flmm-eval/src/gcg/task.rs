//! The tasks `gcg_val` and `gcg_test`: describe a picture, mark what is spoken of (`spec/evaluation.md` §4).

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flmm::grounder::{AnswerOptions, GroundOptions, GroundedPhrase};
use flmm::lmm::Turn;
use flmm::masks::Mask;
use flmm::phrases::PhraseChoice;
use flmm::weights::fingerprint;
use flmm::{Error, Grounder, Result};
use flmm_data::coco::RunLengths;
use flmm_data::gcg::{Gcg, GcgSample};
use flmm_data::images::ImageStore;
use image::RgbImage;
use serde_json::{Value, json};

use super::ap::Detections;
use super::matching::{Variant, ious, matched_iou, recalled, side_by_side, transposed};
use super::score::{Recalled, Score, metrics};
use super::similarity::Similarity;
use crate::captions::meteor::{Meteor, MeteorData};
use crate::marks::better_cluster;
use crate::record::{Phrase, Prediction};
use crate::runs::Runs;
use crate::task::{Aggregate, Need, Predicted, Rows, Samples, Settings, Task, Truth, parse_scores};

/// What the model is asked.
pub const INSTRUCTION: &str = "Briefly describe the objects that appear in this image.";
/// Longest caption, in tokens.
const MAX_NEW_TOKENS: usize = 100;

/// What of the procedure may be chosen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Protocol {
    /// METEOR's tables ([`MeteorData::open`]); without them METEOR is approximated, under another name.
    pub meteor: Option<PathBuf>,
    /// Where text similarities come from; without any, no mask recall is reported.
    pub similarity: Option<SimilaritySource>,
    /// How phrases are found in a caption.
    pub phrases: CaptionPhrases,
}

/// Where text similarities come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SimilaritySource {
    /// A folder with a BERT encoder.
    Model(PathBuf),
    /// A file with matrices.
    File(PathBuf),
}

impl SimilaritySource {
    fn path(&self) -> &Path {
        match self {
            Self::Model(path) | Self::File(path) => path,
        }
    }
}

/// How phrases are found in a caption.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CaptionPhrases {
    /// The head's keyword selector.
    #[default]
    Keywords,
    /// Noun-phrase rules.
    Nouns,
}

/// One split.
pub struct GcgTask {
    name: &'static str,
    split: &'static str,
}

/// Validation and test split.
pub fn tasks() -> impl Iterator<Item = Box<dyn Task>> {
    [("gcg_val", "val"), ("gcg_test", "test")]
        .into_iter()
        .map(|(name, split)| Box::new(GcgTask { name, split }) as Box<dyn Task>)
}

impl Task for GcgTask {
    fn name(&self) -> &str {
        self.name
    }

    fn about(&self) -> String {
        format!("grounded captions, {}: METEOR, CIDEr, AP50, mIoU, mask recall", self.split)
    }

    fn needs(&self) -> Vec<Need> {
        let source = "GranD-f of GLaMM";
        let file = |kind: &str| format!("GranDf/val_test/{}_gcg_coco_{kind}_gt.json", self.split);
        vec![
            Need::new(file("caption"), source),
            Need::new(file("mask"), source),
            Need::pictures("GranDf/images", "the pictures of GranD-f's val and test split, <id>.jpg"),
        ]
    }

    fn open(&self, settings: &Settings) -> Result<Box<dyn Samples>> {
        let data = Gcg::open_split(&settings.data, self.split)?;
        let ids: Vec<String> = data.samples.iter().map(|sample| sample.image_id.to_string()).collect();
        let mut seen = HashSet::new();
        if let Some(twice) = ids.iter().find(|id| !seen.insert(id.as_str())) {
            return Err(Error::config(
                settings.data.join(&self.needs()[0].path),
                format!("picture {twice} has two captions"),
                "grounded captions have one caption per picture",
            ));
        }
        let protocol = settings.gcg.clone();
        let meteor_data = match &protocol.meteor {
            Some(path) => MeteorData::open(path)?,
            None => MeteorData::lite(),
        };
        let references: Vec<&str> = data.samples.iter().map(|sample| sample.caption.as_str()).collect();
        let meteor = Meteor::new(meteor_data, references)?;
        let similarity = match &protocol.similarity {
            Some(SimilaritySource::Model(folder)) => Some(Similarity::model(folder)?),
            Some(SimilaritySource::File(file)) => Some(Similarity::file(file)?),
            None => None,
        };
        let scoring = json!({
            "meteor": meteor.label(),
            "meteor_data": protocol.meteor.as_deref().map(fingerprint).transpose()?,
            "similarity": protocol.similarity.as_ref().map(|source| fingerprint(source.path())).transpose()?,
        });
        let pictures = settings.pictures()?;
        Ok(Box::new(GcgSamples {
            data,
            ids,
            pictures,
            meteor,
            similarity,
            scoring,
            phrases: protocol.phrases,
        }))
    }

    fn aggregate(&self, scores: &[Value]) -> Result<Aggregate> {
        metrics(parse_scores(scores)?)
    }
}

struct GcgSamples {
    data: Gcg,
    ids: Vec<String>,
    pictures: Arc<ImageStore>,
    meteor: Meteor,
    similarity: Option<Similarity>,
    /// What scores depend on, as it is kept with them.
    scoring: Value,
    phrases: CaptionPhrases,
}

fn picture(sample: &GcgSample) -> String {
    format!("GranDf/images/{}.jpg", sample.image_id)
}

impl GcgSamples {
    fn truth_masks(&self, sample: &GcgSample) -> Result<Vec<Runs>> {
        Ok(self.data.runs(sample)?.into_iter().map(Runs::from).collect())
    }

    /// Other masks of the same phrases.
    fn rows(
        &self,
        rows: Rows,
        (sample, image): (&GcgSample, &RgbImage),
        grounder: &Grounder,
        phrases: &[GroundedPhrase],
    ) -> Result<Vec<(&'static str, Vec<RunLengths>)>> {
        let mut out = Vec::new();
        if rows.kmeans {
            let geometry = grounder.lmm().prepare_image(image)?.geometry;
            let truth: Vec<Mask> = self.data.masks(sample)?.iter().map(Mask::from).collect();
            let cluster = |phrase: &GroundedPhrase| {
                // No true mask belongs to a phrase of the model's own; the one that fits its mask best chooses.
                let overlap = |mask: &&Mask| mask.iou(&phrase.mask).unwrap_or(0.0);
                let nearest = truth.iter().max_by(|a, b| overlap(a).total_cmp(&overlap(b)));
                let reference = nearest.filter(|mask| overlap(mask) > 0.0).unwrap_or(&phrase.mask);
                match &phrase.maps {
                    Some(maps) => Ok(better_cluster(maps, &geometry, reference)?.to_coco()),
                    None => Ok(Runs::from(&phrase.mask).to_coco()),
                }
            };
            out.push(("kmeans", phrases.iter().map(cluster).collect::<Result<_>>()?));
        }
        if rows.coarse {
            let coarse = |phrase: &GroundedPhrase| Runs::from(&phrase.coarse_mask).to_coco();
            out.push(("coarse", phrases.iter().map(coarse).collect()));
        }
        Ok(out)
    }
}

impl Samples for GcgSamples {
    fn ids(&self) -> &[String] {
        &self.ids
    }

    fn settings(&self) -> Value {
        let phrases = match self.phrases {
            CaptionPhrases::Keywords => "keywords",
            CaptionPhrases::Nouns => "nouns",
        };
        json!({ "phrases": phrases })
    }

    fn scoring(&self) -> Value {
        self.scoring.clone()
    }

    fn template(&self, index: usize) -> Result<Value> {
        let sample = &self.data.samples[index];
        Ok(json!({
            "id": self.ids[index], "image_id": self.ids[index], "image": picture(sample), "size": sample.size,
            "prompt": INSTRUCTION,
        }))
    }

    fn truth(&self, index: usize) -> Result<Option<Truth>> {
        let sample = &self.data.samples[index];
        let phrases = sample.phrases.iter().cloned().zip(self.truth_masks(sample)?).collect();
        Ok(Some(Truth { phrases, given: false }))
    }

    fn predict(&self, index: usize, grounder: &Grounder, rows: Rows) -> Result<Predicted> {
        let sample = &self.data.samples[index];
        let image = self.pictures.read(&picture(sample))?;
        if [image.height(), image.width()] != sample.size {
            return Err(Error::image(
                format!(
                    "{} is {}×{}, the caption file says {}×{}",
                    picture(sample),
                    image.width(),
                    image.height(),
                    sample.size[1],
                    sample.size[0]
                ),
                "the pictures and the caption file must belong together",
            ));
        }
        let phrases = match self.phrases {
            CaptionPhrases::Keywords => PhraseChoice::Keywords,
            CaptionPhrases::Nouns => PhraseChoice::NounPhrases,
        };
        let options = AnswerOptions {
            max_new_tokens: MAX_NEW_TOKENS,
            phrases: Some(phrases),
            ground: GroundOptions { keep_maps: rows.kmeans, ..GroundOptions::default() },
            ..AnswerOptions::default()
        };
        let answer = grounder.answer(&image, &[Turn::user(INSTRUCTION)], &options)?;
        let marked = answer.phrases.iter().map(|phrase| Phrase {
            text: phrase.text.clone(),
            segmentation: Some(Runs::from(&phrase.mask).to_coco()),
            score: Some(f64::from(phrase.score)),
        });
        let prediction = Prediction {
            id: self.ids[index].clone(),
            image_id: Some(self.ids[index].clone()),
            prompt: INSTRUCTION.to_owned(),
            answer: answer.answer.trim().to_owned(),
            phrases: marked.collect(),
            ..Prediction::default()
        };
        let rows = self.rows(rows, (sample, &image), grounder, &answer.phrases)?;
        Ok(Predicted { prediction, rows })
    }

    /// A phrase without a mask, or a mask without a text, counts as missing in the one list only.
    fn score(&self, index: usize, prediction: &Prediction) -> Result<Value> {
        let sample = &self.data.samples[index];
        prediction.check_picture(&self.ids[index])?;
        let truth = self.truth_masks(sample)?;
        let (mut masks, mut texts, mut text_of) = (Vec::new(), Vec::new(), Vec::new());
        for (at, phrase) in prediction.phrases.iter().enumerate() {
            if phrase.segmentation.is_some() {
                masks.push(prediction.mask(at, sample.size)?);
                text_of.push((!phrase.text.is_empty()).then_some(texts.len()));
            }
            if !phrase.text.is_empty() {
                texts.push(phrase.text.clone());
            }
        }
        let ious = ious(&masks, &truth)?;
        let by_truth = transposed(&ious, truth.len());
        let count = |ious: &[Vec<f64>], similarity: &[Vec<f64>], variant| {
            recalled(ious, similarity, variant).map_or(0, |matches| matches.len())
        };
        let mut found = Recalled {
            masks: count(&by_truth, &vec![vec![1.0; masks.len()]; truth.len()], Variant::Glamm),
            ..Recalled::default()
        };
        if let Some(similarity) = &self.similarity {
            let alike = similarity.between(&self.ids[index], &sample.phrases, &texts)?;
            let (by_truth, alike) = side_by_side(&by_truth, &alike, &text_of);
            found.glamm = Some(count(&by_truth, &alike, Variant::Glamm));
            found.flmm = Some(count(&by_truth, &alike, Variant::Flmm));
        }
        let areas = |masks: &[Runs]| masks.iter().map(|mask| mask.area() as f64).collect();
        let score = Score {
            image_id: sample.image_id,
            caption: prediction.answer.clone(),
            reference: sample.caption.clone(),
            meteor: self.meteor.compare(&prediction.answer, &[&sample.caption]),
            meteor_label: self.meteor.label().to_owned(),
            iou: matched_iou(&ious),
            detections: Detections {
                predicted_areas: areas(&masks),
                true_areas: areas(&truth),
                ious,
                scores: Vec::new(),
            },
            phrases: sample.phrases.len(),
            recalled: found,
        };
        Ok(json!(score))
    }
}
