//! Generalised referring expression segmentation: gRefCOCO, whose expressions mean several objects or none.
//!
//! A system abstains by an empty mask; flmm also where the mean probability of its mask's foreground is below
//! [`Abstention`]. What is measured, as the dataset's authors define it:
//!
//! - gIoU: mean IoU of all expressions; one without a target counts 1 if the system abstains, else 0,
//! - cIoU: Σ intersections / Σ unions,
//! - N-acc: of the expressions without a target, those for which the system abstains,
//! - T-acc: of the expressions with a target, those for which it does not.

use std::sync::Arc;

use flmm::grounder::Caption;
use flmm::lmm::{GROUNDING_INSTRUCTION, Turn};
use flmm::masks::Mask;
use flmm::{Grounder, Result};
use flmm_data::coco::Segmentation;
use flmm_data::grefcoco::{GrefCoco, GroupSample};
use flmm_data::images::ImageStore;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::marks::{LastSession, Marks};
use crate::record::{Metrics, Prediction};
use crate::runs::{Overlap, Runs};
use crate::task::{Aggregate, Need, Predicted, Rows, Samples, Settings, Task, Truth, parse_scores};

/// When a prediction with a mask counts as "not in the picture".
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Abstention {
    /// Phrases whose `score` is below this have no mask; unless set, every mask counts.
    pub below: Option<f64>,
}

/// Splits that are published.
const SPLITS: [&str; 3] = ["val", "testA", "testB"];

/// One split.
pub struct Grefcoco {
    split: &'static str,
    name: String,
}

/// All splits.
pub fn tasks() -> impl Iterator<Item = Box<dyn Task>> {
    SPLITS
        .into_iter()
        .map(|split| Box::new(Grefcoco { split, name: format!("grefcoco_{split}") }) as Box<dyn Task>)
}

impl Task for Grefcoco {
    fn name(&self) -> &str {
        &self.name
    }

    fn about(&self) -> String {
        format!("expressions for several objects or none, gRefCOCO {}: gIoU, cIoU, N-acc, T-acc", self.split)
    }

    fn needs(&self) -> Vec<Need> {
        let source = "gRefCOCO of its authors";
        vec![
            Need::new("coco/grefcoco/instances.json", source),
            Need::new("coco/grefcoco/grefs(unc).json", source),
            Need::pictures("coco/train2014", "COCO 2014 training pictures"),
        ]
    }

    fn open(&self, settings: &Settings) -> Result<Box<dyn Samples>> {
        let mut data = GrefCoco::open_split(&settings.data, self.split)?;
        // Expressions of one picture follow each other, so that the picture is read once.
        data.samples.sort_by_key(|sample| sample.image_id);
        Ok(Box::new(GrefSamples {
            ids: data.samples.iter().map(|sample| sample.sent_id.to_string()).collect(),
            pictures: settings.pictures()?,
            data,
            abstention: settings.abstention,
            last: LastSession::default(),
        }))
    }

    fn aggregate(&self, scores: &[Value]) -> Result<Aggregate> {
        Ok(metrics(&parse_scores::<Score>(scores)?))
    }
}

/// The score of one expression.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Score {
    /// Pixels in prediction and truth.
    pub intersection: u64,
    /// Pixels in either.
    pub union: u64,
    /// Whether the expression means anything.
    pub target: bool,
    /// Whether the system says that it does not.
    pub abstained: bool,
}

/// gIoU, cIoU, N-acc and T-acc, percent; zero where there is nothing to count.
pub fn metrics(scores: &[Score]) -> Aggregate {
    let (mut sum, mut ious) = (Overlap::default(), 0.0);
    // Of expressions without and with a target: those judged rightly, and all.
    let mut judged = [[0u64; 2]; 2];
    for score in scores {
        let overlap = Overlap { intersection: score.intersection, union: score.union };
        sum.intersection += overlap.intersection;
        sum.union += overlap.union;
        ious += if score.target { overlap.iou() } else { f64::from(u8::from(score.abstained)) };
        let [right, all] = &mut judged[usize::from(score.target)];
        *right += u64::from(score.abstained != score.target);
        *all += 1;
    }
    let share = |[right, all]: [u64; 2]| 100.0 * right as f64 / all.max(1) as f64;
    let [none, some] = judged;
    let metrics = Metrics::from([
        ("gIoU", 100.0 * ious / scores.len().max(1) as f64),
        ("cIoU", 100.0 * sum.iou()),
        ("N-acc", share(none)),
        ("T-acc", share(some)),
    ]);
    Aggregate { metrics, details: json!({ "without_target": none[1], "with_target": some[1] }) }
}

struct GrefSamples {
    data: GrefCoco,
    pictures: Arc<ImageStore>,
    ids: Vec<String>,
    abstention: Abstention,
    last: LastSession,
}

impl GrefSamples {
    fn target(&self, sample: &GroupSample) -> Result<Runs> {
        let masks: Vec<Runs> = self.data.masks(sample)?.into_iter().map(Runs::from).collect();
        Runs::union_of(sample.size[0], sample.size[1], &masks)
    }

    fn picture(sample: &GroupSample) -> String {
        format!("coco/train2014/{}", sample.file_name)
    }
}

impl Samples for GrefSamples {
    fn ids(&self) -> &[String] {
        &self.ids
    }

    fn scoring(&self) -> Value {
        json!({ "abstain_below": self.abstention.below })
    }

    fn template(&self, index: usize) -> Result<Value> {
        let sample = &self.data.samples[index];
        Ok(json!({
            "id": self.ids[index], "image_id": sample.image_id.to_string(), "image": Self::picture(sample),
            "size": sample.size, "phrases": [{ "text": sample.text }],
        }))
    }

    fn truth(&self, index: usize) -> Result<Option<Truth>> {
        let sample = &self.data.samples[index];
        Ok(Some(Truth { phrases: vec![(sample.text.clone(), self.target(sample)?)], given: true }))
    }

    fn predict(&self, index: usize, grounder: &Grounder, rows: Rows) -> Result<Predicted> {
        let sample = &self.data.samples[index];
        let caption = Caption::from_expressions(grounder.lmm().tokenizer(), [sample.text.as_str()])?;
        let (name, turns) = (Self::picture(sample), [Turn::user(GROUNDING_INSTRUCTION)]);
        let picture = || self.pictures.read(&name);
        let observation = self.last.observe(grounder, &name, picture, &turns, &caption)?;
        let truth = |_| {
            let truth = Segmentation::Runs(self.target(sample)?.to_coco());
            Ok(Some(Mask::from(&truth.to_mask(sample.size[0], sample.size[1])?)))
        };
        let marks = Marks::of(grounder, &observation, rows, &truth)?;
        let prediction = Prediction {
            id: self.ids[index].clone(),
            image_id: Some(sample.image_id.to_string()),
            prompt: GROUNDING_INSTRUCTION.to_owned(),
            answer: format!("{}.", sample.text),
            ..Prediction::default()
        };
        Ok(marks.predicted(prediction, [sample.text.as_str()]))
    }

    /// The union of all masks of the prediction counts; a prediction without a phrase abstains.
    fn score(&self, index: usize, prediction: &Prediction) -> Result<Value> {
        let sample = &self.data.samples[index];
        prediction.check_picture(&sample.image_id.to_string())?;
        let [height, width] = sample.size;
        let mut masks = Vec::new();
        for (at, phrase) in prediction.phrases.iter().enumerate() {
            let mask = prediction.mask(at, sample.size)?;
            let doubted = self.abstention.below.zip(phrase.score).is_some_and(|(below, score)| score < below);
            if !doubted {
                masks.push(mask);
            }
        }
        let predicted = Runs::union_of(height, width, &masks)?;
        let Overlap { intersection, union } = predicted.overlap(&self.target(sample)?)?;
        let target = !sample.targets.is_empty();
        Ok(json!(Score { intersection, union, target, abstained: predicted.is_empty() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn abstaining_counts_as_the_authors_define_it() {
        let score = |intersection, union, target, abstained| Score { intersection, union, target, abstained };
        let scores = [
            score(1, 2, true, false),
            score(0, 3, true, true),
            score(0, 0, false, true),
            score(0, 4, false, false),
        ];
        let metrics = metrics(&scores).metrics;
        let wanted = [("gIoU", 37.5), ("cIoU", 100.0 / 9.0), ("N-acc", 50.0), ("T-acc", 50.0)];
        for (name, wanted) in wanted {
            let found = metrics.get(name).unwrap();
            assert!((found - wanted).abs() < 1e-9, "{name}: {found}");
        }
    }
}
