//! Referring expression segmentation: RefCOCO, RefCOCO+, RefCOCOg (`spec/evaluation.md` §1).

use std::sync::Arc;

use flmm::grounder::Caption;
use flmm::lmm::{GROUNDING_INSTRUCTION, Turn};
use flmm::masks::Mask;
use flmm::{Grounder, Result};
use flmm_data::images::ImageStore;
use flmm_data::refcoco::{RefCoco, RefImage, TextMode};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::marks::{LastSession, Marks};
use crate::record::{Metrics, Prediction};
use crate::runs::Overlap;
use crate::task::{Aggregate, Need, Predicted, Rows, Samples, Settings, Task, Truth, parse_scores};

/// The splits, as the datasets' authors call them.
const SPLITS: [(&str, &str); 8] = [
    ("refcoco", "val"),
    ("refcoco", "testA"),
    ("refcoco", "testB"),
    ("refcoco+", "val"),
    ("refcoco+", "testA"),
    ("refcoco+", "testB"),
    ("refcocog", "val"),
    ("refcocog", "test"),
];

/// Overlaps that count as found for Pr@X.
const PRECISIONS: [f64; 5] = [0.5, 0.6, 0.7, 0.8, 0.9];

/// How expressions are given to the model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Protocol {
    /// One pass per object instead of one per picture, whose later expressions can attend to the earlier ones.
    pub split: bool,
    /// Every expression of an object, as most papers score, instead of its first one, as the published numbers.
    pub all_sentences: bool,
}

/// One split of one of the three datasets.
pub struct Res {
    dataset: &'static str,
    split: &'static str,
    name: String,
}

/// All splits.
pub fn tasks() -> impl Iterator<Item = Box<dyn Task>> {
    SPLITS.into_iter().map(|(dataset, split)| {
        Box::new(Res { dataset, split, name: format!("{dataset}_{split}") }) as Box<dyn Task>
    })
}

impl Task for Res {
    fn name(&self) -> &str {
        &self.name
    }

    fn about(&self) -> String {
        format!(
            "referring expression segmentation, {} {}: cIoU, mIoU, Pr@0.5 to 0.9",
            self.dataset, self.split
        )
    }

    fn needs(&self) -> Vec<Need> {
        let (author, source) = match self.dataset {
            "refcocog" => ("umd", "RefCOCOg of the `refer` toolbox (UMD split)"),
            "refcoco+" => ("unc", "RefCOCO+ of the `refer` toolbox (UNC split)"),
            _ => ("unc", "RefCOCO of the `refer` toolbox (UNC split)"),
        };
        let folder = format!("coco/{}", self.dataset);
        vec![
            Need::new(format!("{folder}/instances.json"), source),
            Need::new(format!("{folder}/refs({author}).p"), source),
            Need::pictures("coco/train2014", "COCO 2014 training pictures"),
        ]
    }

    fn open(&self, settings: &Settings) -> Result<Box<dyn Samples>> {
        let data = RefCoco::open_split(&settings.data, self.dataset, self.split)?;
        let protocol = settings.res;
        let mode = if protocol.all_sentences { TextMode::Original } else { TextMode::SelectFirst };
        let (mut ids, mut items) = (Vec::new(), Vec::new());
        for (image, entry) in data.images.iter().enumerate() {
            let expressions = entry.expressions(mode);
            if !protocol.split {
                ids.push(entry.image_id.to_string());
                items.push(Item { image, expressions });
                continue;
            }
            let (mut object, mut sentence) = (usize::MAX, 0);
            for (text, at) in expressions {
                sentence = if at == object { sentence + 1 } else { 0 };
                object = at;
                let ann_id = entry.objects[at].ann_id;
                ids.push(if protocol.all_sentences {
                    format!("{ann_id}/{sentence}")
                } else {
                    ann_id.to_string()
                });
                items.push(Item { image, expressions: vec![(text, at)] });
            }
        }
        let pictures = settings.pictures()?;
        Ok(Box::new(ResSamples { data, pictures, ids, items, protocol, last: LastSession::default() }))
    }

    fn aggregate(&self, scores: &[Value]) -> Result<Aggregate> {
        let scores: Vec<Overlaps> = parse_scores(scores)?;
        Ok(metrics(scores.iter().flat_map(Overlaps::iter)))
    }
}

/// Intersections and unions of a sample's masks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overlaps {
    intersection: Vec<u64>,
    union: Vec<u64>,
}

impl Overlaps {
    /// Adds a mask.
    pub fn push(&mut self, overlap: Overlap) {
        self.intersection.push(overlap.intersection);
        self.union.push(overlap.union);
    }

    /// Mask by mask.
    pub fn iter(&self) -> impl Iterator<Item = Overlap> + '_ {
        let pairs = self.intersection.iter().zip(&self.union);
        pairs.map(|(&intersection, &union)| Overlap { intersection, union })
    }
}

/// cIoU, mIoU and Pr@0.5 to 0.9 of all masks, percent. Without any mask, zero.
pub fn metrics(masks: impl Iterator<Item = Overlap>) -> Aggregate {
    let (mut sum, mut ious, mut count) = (Overlap::default(), 0.0, 0u64);
    let mut found = [0u64; PRECISIONS.len()];
    for mask in masks {
        sum.intersection += mask.intersection;
        sum.union += mask.union;
        ious += mask.iou();
        count += 1;
        for (found, threshold) in found.iter_mut().zip(PRECISIONS) {
            *found += u64::from(mask.iou() >= threshold);
        }
    }
    let mean = |total: f64| 100.0 * total / count.max(1) as f64;
    let mut metrics = Metrics::from([("cIoU", 100.0 * sum.iou()), ("mIoU", mean(ious))]);
    for (found, threshold) in found.into_iter().zip(PRECISIONS) {
        metrics.push(format!("Pr@{threshold}"), mean(found as f64));
    }
    Aggregate { metrics, details: json!({ "masks": count }) }
}

struct Item {
    /// Index of the picture.
    image: usize,
    /// Expressions and their objects.
    expressions: Vec<(String, usize)>,
}

struct ResSamples {
    data: RefCoco,
    pictures: Arc<ImageStore>,
    ids: Vec<String>,
    items: Vec<Item>,
    protocol: Protocol,
    last: LastSession,
}

impl ResSamples {
    fn item(&self, index: usize) -> (&RefImage, &Item) {
        let item = &self.items[index];
        (&self.data.images[item.image], item)
    }

    fn picture(image: &RefImage) -> String {
        format!("coco/train2014/{}", image.file_name)
    }
}

impl Samples for ResSamples {
    fn ids(&self) -> &[String] {
        &self.ids
    }

    fn settings(&self) -> Value {
        json!({
            "mode": if self.protocol.split { "split" } else { "concat" },
            "sentences": if self.protocol.all_sentences { "all" } else { "first" },
        })
    }

    fn template(&self, index: usize) -> Result<Value> {
        let (image, item) = self.item(index);
        let phrases: Vec<Value> = item.expressions.iter().map(|(text, _)| json!({ "text": text })).collect();
        Ok(json!({
            "id": self.ids[index], "image_id": image.image_id.to_string(), "image": Self::picture(image),
            "size": image.size, "phrases": phrases,
        }))
    }

    fn truth(&self, index: usize) -> Result<Option<Truth>> {
        let (image, item) = self.item(index);
        let phrase =
            |(text, object): &(String, usize)| Ok((text.clone(), self.data.rle(image, *object)?.into()));
        Ok(Some(Truth { phrases: item.expressions.iter().map(phrase).collect::<Result<_>>()?, given: true }))
    }

    fn predict(&self, index: usize, grounder: &Grounder, rows: Rows) -> Result<Predicted> {
        let (image, item) = self.item(index);
        let texts = || item.expressions.iter().map(|(text, _)| text.as_str());
        let caption = Caption::from_expressions(grounder.lmm().tokenizer(), texts())?;
        let name = Self::picture(image);
        let turns = [Turn::user(GROUNDING_INSTRUCTION)];
        let picture = || self.pictures.read(&name);
        let observation = self.last.observe(grounder, &name, picture, &turns, &caption)?;
        let truth = |at: usize| {
            let mask = self.data.mask(image, item.expressions[at].1)?;
            Ok(Some(Mask::from(&mask)))
        };
        let marks = Marks::of(grounder, &observation, rows, &truth)?;
        let prediction = Prediction {
            id: self.ids[index].clone(),
            image_id: Some(image.image_id.to_string()),
            prompt: GROUNDING_INSTRUCTION.to_owned(),
            answer: texts().map(|text| format!("{text}.")).collect::<Vec<_>>().join(" "),
            ..Prediction::default()
        };
        Ok(marks.predicted(prediction, texts()))
    }

    fn score(&self, index: usize, prediction: &Prediction) -> Result<Value> {
        let (image, item) = self.item(index);
        prediction.check_picture(&image.image_id.to_string())?;
        let masks = prediction.masks(item.expressions.len(), image.size)?;
        let mut overlaps = Overlaps::default();
        for (mask, (_, object)) in masks.iter().zip(&item.expressions) {
            overlaps.push(mask.overlap(&self.data.rle(image, *object)?.into())?);
        }
        Ok(json!(overlaps))
    }
}
