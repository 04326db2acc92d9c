//! The annotation files that cover all pictures of a world.

use super::groups::group_references;
use super::records::{FIRST_STUFF, Record};
use super::write::{Paths, write_file, write_json};
use super::{Class, Level, Split, classes, stuff_classes};
use crate::coco::Segmentation;
use crate::gcg::{Caption, CaptionFile, GcgImage, MaskFile, PhraseMask};
use crate::narratives::{Narrative, PanopticAnnotation, PanopticCategory, PanopticFile, PanopticImage};
use crate::refcoco::{
    InstanceCategory, InstanceImage, InstancesFile, Reference, Sentence, pickle_references,
};
use crate::viscot::{BOX_REQUEST, Entry, Turn};
use flmm::Result;

/// Words that RefCOCO+ does not allow.
const PLACE_WORDS: [&str; 7] = ["left", "right", "top", "bottom", "above", "below", "middle"];

/// Which expressions a dataset keeps.
type Keep = fn(&str) -> bool;

/// All records of a world.
pub(super) struct Records {
    split: Split,
    level: Level,
    records: Vec<Record>,
}

impl Records {
    pub(super) fn new(split: Split, level: Level, records: Vec<Record>) -> Self {
        Self { split, level, records }
    }

    /// One record per picture.
    pub(super) fn all(&self) -> &[Record] {
        &self.records
    }

    /// Writes the files that cover all pictures.
    pub(super) fn write(&self, paths: &Paths) -> Result<()> {
        let split = self.split.name();
        let narratives: Vec<&Narrative> = self.records.iter().flat_map(|record| &record.narratives).collect();
        write_json(&paths.annotations.join(format!("png_coco_{split}2017.json")), &narratives)?;
        write_json(&paths.annotations.join(format!("panoptic_{split}2017.json")), &self.panoptic())?;

        let instances = self.instances();
        let datasets: [(&str, &str, Keep); 3] = [
            ("refcoco", "unc", |_| true),
            ("refcoco+", "unc", |text| !text.split(' ').any(|word| PLACE_WORDS.contains(&word))),
            ("refcocog", "umd", |text| text.split(' ').count() >= 4),
        ];
        for (dataset, author, keep) in datasets {
            let folder = paths.coco.join(dataset);
            write_json(&folder.join("instances.json"), &instances)?;
            let references = self.references(dataset, keep);
            write_file(&folder.join(format!("refs({author}).p")), &pickle_references(&references)?)?;
        }

        let folder = paths.coco.join("grefcoco");
        write_json(&folder.join("instances.json"), &instances)?;
        write_json(&folder.join("grefs(unc).json"), &group_references(self.split, &self.records))?;

        let (captions, masks) = self.gcg();
        write_json(&paths.gcg.join(format!("{split}_gcg_coco_caption_gt.json")), &captions)?;
        write_json(&paths.gcg.join(format!("{split}_gcg_coco_mask_gt.json")), &masks)?;
        write_json(&paths.viscot.join("world.json"), &self.viscot())
    }

    fn panoptic(&self) -> PanopticFile {
        let things = classes(self.level).iter().enumerate();
        let things = things.map(|(i, class)| (i as u64 + 1, class.name, 1));
        let stuff =
            stuff_classes().iter().enumerate().map(|(i, class)| (i as u64 + FIRST_STUFF, class.name, 0));
        PanopticFile {
            images: self
                .records
                .iter()
                .map(|record| PanopticImage {
                    id: record.image_id,
                    file_name: record.picture_name(),
                    height: record.size[0],
                    width: record.size[1],
                })
                .collect(),
            annotations: self
                .records
                .iter()
                .map(|record| PanopticAnnotation {
                    image_id: record.image_id,
                    file_name: format!("{:012}.png", record.image_id),
                    segments_info: record.segments.clone(),
                })
                .collect(),
            categories: things
                .chain(stuff)
                .map(|(id, name, isthing)| PanopticCategory { id, name: name.to_owned(), isthing })
                .collect(),
        }
    }

    fn instances(&self) -> InstancesFile {
        let images = self.records.iter().map(|record| InstanceImage {
            id: record.image_id,
            file_name: record.picture_name_2014(),
            height: record.size[0],
            width: record.size[1],
        });
        let category = |(i, class): (usize, &Class)| InstanceCategory {
            id: i as u64 + 1,
            name: class.name.to_owned(),
            supercategory: "thing".to_owned(),
        };
        InstancesFile {
            images: images.collect(),
            annotations: self.records.iter().flat_map(|record| record.instances.iter().cloned()).collect(),
            categories: classes(self.level).iter().enumerate().map(category).collect(),
        }
    }

    /// The reference list of one dataset: the expressions it keeps. Objects without any are left out.
    fn references(&self, dataset: &str, keep: Keep) -> Vec<Reference> {
        let mut references = Vec::new();
        let mut sent_id = 0;
        for (number, record) in self.records.iter().enumerate() {
            let split = match (self.split, dataset) {
                (Split::Test, "refcocog") => "test",
                (Split::Test, _) => ["testA", "testB"][number % 2],
                (split, _) => split.name(),
            };
            for (object, texts) in &record.references {
                let kept: Vec<&String> = texts.iter().filter(|text| keep(text)).collect();
                if kept.is_empty() {
                    continue;
                }
                let sentence = |text: &String| {
                    sent_id += 1;
                    Sentence {
                        raw: text.clone(),
                        sent: text.clone(),
                        tokens: text.split(' ').map(str::to_owned).collect(),
                        sent_id: sent_id - 1,
                    }
                };
                let sentences: Vec<Sentence> = kept.into_iter().map(sentence).collect();
                references.push(Reference {
                    ref_id: references.len() as u64,
                    ann_id: record.instances[*object].id,
                    image_id: record.image_id,
                    category_id: record.instances[*object].category_id,
                    file_name: record.picture_name_2014().replace(".jpg", &format!("_{object}.jpg")),
                    split: split.to_owned(),
                    sent_ids: sentences.iter().map(|sentence| sentence.sent_id).collect(),
                    sentences,
                });
            }
        }
        references
    }

    fn gcg(&self) -> (CaptionFile, MaskFile) {
        let image =
            |record: &Record| GcgImage { id: record.image_id, height: record.size[0], width: record.size[1] };
        let images: Vec<GcgImage> = self.records.iter().map(image).collect();
        let (mut captions, mut masks) = (Vec::new(), Vec::new());
        for record in &self.records {
            let (image_id, Some((caption, phrases))) = (record.image_id, &record.caption) else { continue };
            for (_, mask) in phrases {
                masks.push(PhraseMask {
                    id: masks.len() as u64 + 1,
                    image_id,
                    category_id: 1,
                    segmentation: Segmentation::compress(mask),
                    area: mask.area().into(),
                    bbox: mask.bbox().map(f64::from),
                    iscrowd: 0,
                });
            }
            let labels = phrases.iter().map(|(words, _)| words.clone()).collect();
            captions.push(Caption { id: image_id, image_id, caption: caption.clone(), labels });
        }
        let info = serde_json::Map::new();
        let captions = CaptionFile { info: info.clone(), images: images.clone(), annotations: captions };
        (captions, MaskFile { info, images, annotations: masks })
    }

    fn viscot(&self) -> Vec<Entry> {
        let mut entries = Vec::new();
        for record in &self.records {
            let path = format!("cot/world/{}", record.picture_name());
            let [height, width] = record.size.map(f64::from);
            for (question, corners, answer) in &record.chains {
                let [x0, y0, x1, y1] = corners.map(f64::from);
                let turn = |from: &str, value: String| Turn { from: from.to_owned(), value };
                let relative = [x0 / width, y0 / height, x1 / width, y1 / height].map(|v| format!("{v:.3}"));
                entries.push(Entry {
                    dataset: "world".to_owned(),
                    split: self.split.name().to_owned(),
                    question_id: entries.len().into(),
                    image: vec![path.clone(), format!("{path}###{corners:?}")],
                    conversations: vec![
                        turn("human", format!("<image>\n{question} {BOX_REQUEST}")),
                        turn("gpt", format!("[{}]", relative.join(", "))),
                        turn("human", "<image>".to_owned()),
                        turn("gpt", answer.clone()),
                    ],
                });
            }
        }
        entries
    }
}
