//! From one scene to its records in the published formats.

use super::text::{Question, QuestionKind};
use super::write::{Paths, link, write_file, write_json};
use super::{Object, Scene, SegmentRef, Split};
use crate::coco::Segmentation;
use crate::mask::Mask;
use crate::narratives::{Narrative, NarrativeSegment, SegmentInfo, id_picture};
use crate::polygons;
use crate::reasonseg::{Reasoning, Shape};
use crate::refcoco::Instance;
use flmm::{Error, Result};
use image::codecs::jpeg::JpegEncoder;
use image::{ExtendedColorType, ImageEncoder, ImageFormat};
use std::io::Cursor;

/// Stuff categories are numbered from here, things from 1.
pub(super) const FIRST_STUFF: u64 = 201;
/// JPEG quality: high, because the masks are exact.
const QUALITY: u8 = 95;

/// Everything that is written about one scene; ids that count through a file are given later.
pub(super) struct Record {
    pub(super) image_id: u64,
    pub(super) size: [u32; 2],
    pub(super) jpeg: Vec<u8>,
    pub(super) id_png: Vec<u8>,
    pub(super) segments: Vec<SegmentInfo>,
    pub(super) narratives: Vec<Narrative>,
    pub(super) instances: Vec<Instance>,
    /// Index into `instances` and the expressions.
    pub(super) references: Vec<(usize, Vec<String>)>,
    pub(super) reasonings: Vec<(&'static str, Reasoning)>,
    pub(super) caption: Option<(String, Vec<(String, Mask)>)>,
    /// Question, box x0, y0, x1, y1, answer.
    pub(super) chains: Vec<(String, [u32; 4], String)>,
    /// All questions, those that need reasoning last.
    pub(super) questions: Vec<Question>,
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
            questions: scene.texts.questions.iter().chain(&scene.texts.reasoning).cloned().collect(),
        })
    }

    pub(super) fn picture_name(&self) -> String {
        format!("{:012}.jpg", self.image_id)
    }

    pub(super) fn picture_name_2014(&self) -> String {
        format!("COCO_train2014_{:012}.jpg", self.image_id)
    }

    pub(super) fn picture_name_val2014(&self) -> String {
        format!("COCO_val2014_{:012}.jpg", self.image_id)
    }

    /// Writes the pictures and the files that belong to one picture.
    pub(super) fn write_pictures(&self, paths: &Paths) -> Result<()> {
        let picture = paths.pictures.join(self.picture_name());
        write_file(&picture, &self.jpeg)?;
        write_file(&paths.panoptic.join(format!("{:012}.png", self.image_id)), &self.id_png)?;
        link(&picture, &paths.pictures_2014.join(self.picture_name_2014()))?;
        if let Some(folder) = &paths.pictures_val2014 {
            link(&picture, &folder.join(self.picture_name_val2014()))?;
        }
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
        SegmentInfo {
            id,
            category_id: id / 1000,
            bbox: mask.bbox().map(f64::from),
            area: mask.area().into(),
            iscrowd: 0,
        }
    };
    all_segments(scene).map(info).filter(|segment| segment.area > 0.0).collect()
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
