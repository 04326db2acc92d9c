//! From scenes to the records of the published formats.

use super::text::{Question, QuestionKind};
use super::write::{Paths, link, write_file, write_json};
use super::{Level, Object, Scene, SegmentRef, Split, classes, stuff_classes};
use crate::coco::Segmentation;
use crate::gcg::{Caption, CaptionFile, GcgImage, MaskFile, PhraseMask};
use crate::mask::Mask;
use crate::narratives::{
    Narrative, NarrativeSegment, PanopticAnnotation, PanopticCategory, PanopticFile, PanopticImage,
    SegmentInfo, id_picture,
};
use crate::polygons;
use crate::reasonseg::{Reasoning, Shape};
use crate::refcoco::{
    Instance, InstanceCategory, InstanceImage, InstancesFile, Reference, Sentence, pickle_references,
};
use crate::viscot::{BOX_REQUEST, Entry, Turn};
use flmm::{Error, Result};
use image::codecs::jpeg::JpegEncoder;
use image::{ExtendedColorType, ImageEncoder, ImageFormat};
use std::io::Cursor;

/// Stuff categories are numbered from here, things from 1.
const FIRST_STUFF: u64 = 201;
/// JPEG quality: high, because the masks are exact.
const QUALITY: u8 = 95;
/// Words that RefCOCO+ does not allow.
const PLACE_WORDS: [&str; 7] = ["left", "right", "top", "bottom", "above", "below", "middle"];

/// Everything that is written about one scene; ids that count through a file are given later.
pub(super) struct Record {
    image_id: u64,
    size: [u32; 2],
    jpeg: Vec<u8>,
    id_png: Vec<u8>,
    segments: Vec<SegmentInfo>,
    narratives: Vec<Narrative>,
    instances: Vec<Instance>,
    /// Index into `instances` and the expressions.
    references: Vec<(usize, Vec<String>)>,
    reasonings: Vec<(&'static str, Reasoning)>,
    caption: Option<(String, Vec<(String, Mask)>)>,
    /// Question, box x0, y0, x1, y1, answer.
    chains: Vec<(String, [u32; 4], String)>,
}

impl Record {
    pub(super) fn new(scene: &Scene, split: Split, index: u64) -> Result<Self> {
        let image_id = 10_000_000 * split as u64 + index + 1;
        let (width, height) = scene.image.dimensions();
        let encoding = |error| Error::image(format!("cannot encode scene {index}: {error}"), "this is a bug");
        let mut jpeg = Vec::new();
        JpegEncoder::new_with_quality(&mut jpeg, QUALITY)
            .write_image(scene.image.as_raw(), width, height, ExtendedColorType::Rgb8)
            .map_err(encoding)?;
        let mut id_png = Cursor::new(Vec::new());
        id_picture(width, height, &owners(scene))
            .write_to(&mut id_png, ImageFormat::Png)
            .map_err(encoding)?;

        let referring = scene.texts.referring.iter().map(|referring| {
            let alternatives = referring.alternatives.iter().cloned();
            (referring.target, std::iter::once(referring.text.clone()).chain(alternatives).collect())
        });
        Ok(Self {
            image_id,
            size: [height, width],
            jpeg,
            id_png: id_png.into_inner(),
            segments: segments(scene),
            narratives: narratives(scene, image_id),
            instances: scene.objects.iter().enumerate().map(|(i, o)| instance(o, image_id, i)).collect(),
            references: referring.collect(),
            reasonings: reasonings(scene),
            caption: caption(scene),
            chains: chains(scene),
        })
    }

    fn picture_name(&self) -> String {
        format!("{:012}.jpg", self.image_id)
    }

    fn picture_name_2014(&self) -> String {
        format!("COCO_train2014_{:012}.jpg", self.image_id)
    }

    /// Writes the pictures and the files that belong to one picture.
    pub(super) fn write_pictures(&self, paths: &Paths) -> Result<()> {
        let picture = paths.pictures.join(self.picture_name());
        write_file(&picture, &self.jpeg)?;
        write_file(&paths.panoptic.join(format!("{:012}.png", self.image_id)), &self.id_png)?;
        link(&picture, &paths.pictures_2014.join(self.picture_name_2014()))?;
        link(&picture, &paths.gcg_pictures.join(format!("{}.jpg", self.image_id)))?;
        link(&picture, &paths.viscot_pictures.join(self.picture_name()))?;
        for (kind, reasoning) in &self.reasonings {
            let name = format!("{}_{kind}", self.image_id);
            link(&picture, &paths.reasonseg.join(format!("{name}.jpg")))?;
            write_json(&paths.reasonseg.join(format!("{name}.json")), reasoning)?;
        }
        Ok(())
    }
}

/// Panoptic segment id of an object or region: category and number, as COCO composes them.
fn segment_id(scene: &Scene, segment: SegmentRef) -> u64 {
    match segment {
        SegmentRef::Object(index) => (scene.objects[index].class as u64 + 1) * 1000 + index as u64 + 1,
        SegmentRef::Stuff(region) => {
            (scene.stuff[region].class as u64 + FIRST_STUFF) * 1000 + region as u64 + 1
        }
    }
}

fn all_segments(scene: &Scene) -> impl Iterator<Item = SegmentRef> {
    (0..scene.objects.len()).map(SegmentRef::Object).chain((0..scene.stuff.len()).map(SegmentRef::Stuff))
}

fn mask(scene: &Scene, segment: SegmentRef) -> &Mask {
    match segment {
        SegmentRef::Object(index) => &scene.objects[index].mask,
        SegmentRef::Stuff(region) => &scene.stuff[region].mask,
    }
}

/// The segment id of every pixel.
fn owners(scene: &Scene) -> Vec<u32> {
    let mut ids = vec![0; scene.image.width() as usize * scene.image.height() as usize];
    for segment in all_segments(scene) {
        let id = segment_id(scene, segment) as u32;
        for (owner, _) in ids.iter_mut().zip(&mask(scene, segment).data).filter(|(_, inside)| **inside) {
            *owner = id;
        }
    }
    ids
}

fn segments(scene: &Scene) -> Vec<SegmentInfo> {
    let info = |segment| {
        let (id, mask) = (segment_id(scene, segment), mask(scene, segment));
        SegmentInfo { id, category_id: id / 1000, bbox: mask.bbox(), area: mask.area().into(), iscrowd: 0 }
    };
    all_segments(scene).map(info).filter(|segment| segment.area > 0).collect()
}

fn narratives(scene: &Scene, image_id: u64) -> Vec<Narrative> {
    let narrative = |narration: &super::Narration| Narrative {
        image_id,
        caption: narration.text(),
        segments: narration
            .segments
            .iter()
            .map(|segment| NarrativeSegment {
                utterance: segment.utterance.clone(),
                segment_ids: segment.segments.iter().map(|&segment| segment_id(scene, segment)).collect(),
                plural: segment.plural,
                noun: segment.noun,
            })
            .collect(),
    };
    scene.texts.narrations.iter().map(narrative).collect()
}

fn instance(object: &Object, image_id: u64, index: usize) -> Instance {
    Instance {
        id: image_id * 16 + index as u64,
        image_id,
        category_id: object.class as u64 + 1,
        segmentation: Segmentation::compress(&object.mask),
        bbox: object.bbox.map(f64::from),
        area: object.area.into(),
        iscrowd: 0,
    }
}

/// One long instruction (a reasoning question) and one short one (a referring expression), where the scene has them.
fn reasonings(scene: &Scene) -> Vec<(&'static str, Reasoning)> {
    let make = |text: &str, is_sentence, target: usize| Reasoning {
        text: vec![text.to_owned()],
        is_sentence,
        shapes: polygons::outlines(&scene.objects[target].mask)
            .into_iter()
            .map(|points| Shape { label: "target".to_owned(), points })
            .collect(),
    };
    let mut out = Vec::new();
    if let Some((question, target)) = scene.texts.reasoning.iter().find_map(|q| Some((q, only_object(q)?))) {
        out.push(("long", make(&question.question, true, target)));
    }
    if let Some(referring) = scene.texts.referring.first() {
        out.push(("short", make(&referring.text, false, referring.target)));
    }
    out
}

/// The one object that an answer's phrases mean.
fn only_object(question: &Question) -> Option<usize> {
    match question.links.iter().flat_map(|link| &link.segments).collect::<Vec<_>>()[..] {
        [&SegmentRef::Object(index)] => Some(index),
        _ => None,
    }
}

fn caption(scene: &Scene) -> Option<(String, Vec<(String, Mask)>)> {
    let narration = scene.texts.narrations.first()?;
    let phrases = narration.segments.iter().filter(|segment| segment.noun).map(|segment| {
        let inside = |x, y| segment.segments.iter().any(|&segment| mask(scene, segment).get(x, y));
        let mask = Mask::from_fn(scene.image.width(), scene.image.height(), inside);
        (segment.utterance.trim().to_owned(), mask)
    });
    Some((narration.text(), phrases.collect()))
}

fn chains(scene: &Scene) -> Vec<(String, [u32; 4], String)> {
    let questions = scene.texts.questions.iter().chain(&scene.texts.reasoning);
    let chain = |question: &Question| {
        let [x, y, w, h] = scene.objects[only_object(question)?].bbox;
        let answer = match question.kind {
            // The gold answers of the benchmark are short where they can be.
            QuestionKind::Colour | QuestionKind::Where => {
                question.answer.split_once(" is ")?.1.trim_end_matches('.')
            }
            QuestionKind::Reason => question.answer.as_str(),
            _ => return None,
        };
        Some((question.question.clone(), [x, y, x + w, y + h], answer.to_owned()))
    };
    questions.filter_map(chain).collect()
}

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

    /// Writes the files that cover all pictures.
    pub(super) fn write(&self, paths: &Paths) -> Result<()> {
        let split = self.split.name();
        let narratives: Vec<&Narrative> = self.records.iter().flat_map(|record| &record.narratives).collect();
        write_json(&paths.annotations.join(format!("png_coco_{split}2017.json")), &narratives)?;
        write_json(&paths.annotations.join(format!("panoptic_{split}2017.json")), &self.panoptic())?;

        let instances = self.instances();
        let any = |_: &str| true;
        let without_place = |text: &str| !text.split(' ').any(|word| PLACE_WORDS.contains(&word));
        let long = |text: &str| text.split(' ').count() >= 4;
        let datasets: [(&str, &str, &dyn Fn(&str) -> bool); 3] =
            [("refcoco", "unc", &any), ("refcoco+", "unc", &without_place), ("refcocog", "umd", &long)];
        for (dataset, author, keep) in datasets {
            let folder = paths.coco.join(dataset);
            write_json(&folder.join("instances.json"), &instances)?;
            let references = self.references(dataset, keep);
            write_file(&folder.join(format!("refs({author}).p")), &pickle_references(&references)?)?;
        }

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
        let category = |(i, class): (usize, &super::Class)| InstanceCategory {
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
    fn references(&self, dataset: &str, keep: &dyn Fn(&str) -> bool) -> Vec<Reference> {
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
