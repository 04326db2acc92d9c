//! Panoptic Narrative Grounding: narratives whose phrases are linked to COCO panoptic segments
//! (`training.md` §2.1, §2.2, §3).

use crate::coco::{id, ids, in_file, malformed, read_json};
use crate::mask::Mask;
use flmm::{Error, Result};
use hotcoco::types::Rle;
use image::RgbImage;
use serde::{Deserialize, Serialize};
use std::cell::OnceCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// One element of the narrative file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Narrative {
    /// COCO image id.
    #[serde(deserialize_with = "id")]
    pub image_id: u64,
    /// The whole text.
    #[serde(default)]
    pub caption: String,
    /// Its utterances in order.
    pub segments: Vec<NarrativeSegment>,
}

/// One utterance.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NarrativeSegment {
    /// Its text.
    pub utterance: String,
    /// Panoptic segments it means; empty for connecting words. The file writes them as strings.
    #[serde(deserialize_with = "ids", serialize_with = "as_strings")]
    pub segment_ids: Vec<u64>,
    /// Whether more than one object is meant.
    pub plural: bool,
    /// Whether it is a noun phrase.
    #[serde(default)]
    pub noun: bool,
}

fn as_strings<S: serde::Serializer>(ids: &[u64], serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_seq(ids.iter().map(u64::to_string))
}

/// A COCO panoptic annotation file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PanopticFile {
    /// The pictures.
    pub images: Vec<PanopticImage>,
    /// Their segments.
    pub annotations: Vec<PanopticAnnotation>,
    /// The classes.
    pub categories: Vec<PanopticCategory>,
}

/// A picture of a panoptic file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct PanopticImage {
    pub id: u64,
    pub file_name: String,
    pub height: u32,
    pub width: u32,
}

/// The segments of one picture.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PanopticAnnotation {
    /// Which picture.
    pub image_id: u64,
    /// The id PNG.
    pub file_name: String,
    /// The segments.
    pub segments_info: Vec<SegmentInfo>,
}

/// One panoptic segment.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SegmentInfo {
    /// Unique within the picture: R + 256 G + 65536 B of its pixels.
    pub id: u64,
    /// Its class.
    pub category_id: u64,
    /// x, y, width, height.
    pub bbox: [f64; 4],
    /// Pixels.
    pub area: f64,
    /// 0 or 1.
    pub iscrowd: u8,
}

/// A class of a panoptic file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PanopticCategory {
    /// Its id.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// 1 for countable things, 0 for stuff.
    pub isthing: u8,
}

/// A narrative dataset: everything but the id PNGs is in memory.
pub struct Narratives {
    file: PathBuf,
    panoptic: PathBuf,
    mask_folder: PathBuf,
    narratives: Vec<Narrative>,
    images: HashMap<u64, PanopticImage>,
    annotations: HashMap<u64, PanopticAnnotation>,
    is_thing: HashMap<u64, bool>,
}

/// A narrative with its phrases decoded, as masks or in another form `M`.
#[derive(Debug, Clone)]
pub struct NarrativeSample<M = Mask> {
    /// COCO image id.
    pub image_id: u64,
    /// File name of the picture.
    pub file_name: String,
    /// Height and width of the picture.
    pub size: [u32; 2],
    /// Utterances in order, each with the index of its phrase if it is one. Concatenated they are the text.
    pub utterances: Vec<(String, Option<usize>)>,
    /// The grounded phrases; empty for a narrative without any, which evaluation skips.
    pub phrases: Vec<NarrativePhrase<M>>,
}

/// A grounded phrase.
#[derive(Debug, Clone)]
pub struct NarrativePhrase<M = Mask> {
    /// Union of its segments.
    pub mask: M,
    /// Whether more than one object is meant.
    pub plural: bool,
    /// The class's flag for a single segment; always true for a plural, as in the reference.
    pub is_thing: bool,
}

impl Narratives {
    /// Opens a narrative file with its panoptic file and the folder of id PNGs.
    pub fn open(narratives: &Path, panoptic: &Path, mask_folder: &Path) -> Result<Self> {
        let segments: PanopticFile = read_json(panoptic)?;
        Ok(Self {
            narratives: read_json(narratives)?,
            file: narratives.to_owned(),
            panoptic: panoptic.to_owned(),
            mask_folder: mask_folder.to_owned(),
            images: segments.images.into_iter().map(|image| (image.id, image)).collect(),
            annotations: segments.annotations.into_iter().map(|a| (a.image_id, a)).collect(),
            is_thing: segments.categories.iter().map(|c| (c.id, c.isthing != 0)).collect(),
        })
    }

    /// Opens a split (`train2017`, `val2017` …) below a data root in the reference's layout.
    pub fn open_split(root: &Path, split: &str) -> Result<Self> {
        let folder = root.join("coco").join("annotations");
        Self::open(
            &folder.join(format!("png_coco_{split}.json")),
            &folder.join(format!("panoptic_{split}.json")),
            &folder.join(format!("panoptic_{split}")),
        )
    }

    /// The files it was read from; masks lie in further ones, one per picture.
    pub fn files(&self) -> [&Path; 2] {
        [&self.file, &self.panoptic]
    }

    /// Number of narratives.
    pub fn len(&self) -> usize {
        self.narratives.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.narratives.is_empty()
    }

    /// COCO image id of a narrative; `None` beyond the last one.
    pub fn image_id(&self, index: usize) -> Option<u64> {
        self.narratives.get(index).map(|narrative| narrative.image_id)
    }

    /// Whether any utterance of a narrative is linked to a segment.
    pub fn is_grounded(&self, index: usize) -> bool {
        let segments = self.narratives.get(index).map(|narrative| &narrative.segments);
        segments.is_some_and(|segments| segments.iter().any(|segment| !segment.segment_ids.is_empty()))
    }

    /// File name, and height and width in pixels, of a narrative's picture.
    pub fn picture(&self, index: usize) -> Result<(&str, [u32; 2])> {
        let id = self.image_id(index).unwrap_or_default();
        let image = self.images.get(&id).ok_or_else(|| {
            let what = format!("narrative {index}: unknown picture {id}");
            malformed(&self.file, what, "the narrative and panoptic files must belong together")
        })?;
        Ok((&image.file_name, [image.height, image.width]))
    }

    /// Whether the id PNG of a narrative is there and has the size of the picture; only its header is read.
    pub fn check_mask_file(&self, index: usize) -> Result<()> {
        let (_, [height, width]) = self.picture(index)?;
        let id = self.image_id(index).unwrap_or_default();
        let annotation = self.annotations.get(&id).ok_or_else(|| {
            let what = format!("narrative {index}: picture {id} has no segments");
            malformed(&self.file, what, "the narrative and panoptic files must belong together")
        })?;
        let path = self.mask_file(annotation);
        let size = crate::images::header(&path)?;
        match size == (width, height) {
            true => Ok(()),
            false => Err(malformed(
                &path,
                format!("{} x {} pixels, expected {width} x {height}", size.0, size.1),
                "the id PNG of the picture",
            )),
        }
    }

    /// Where the id PNG lies.
    fn mask_file(&self, annotation: &PanopticAnnotation) -> PathBuf {
        // Only the file's own name counts: a path in the annotation must not lead out of the folder.
        self.mask_folder.join(Path::new(&annotation.file_name).file_name().unwrap_or_default())
    }

    /// Decodes a narrative. An error if a singular phrase has not exactly one segment, if its segment or picture is
    /// unknown, or if the id PNG cannot be read or has another size.
    pub fn sample(&self, index: usize) -> Result<NarrativeSample> {
        self.sample_with(index, Owners::mask)
    }

    /// As [`Narratives::sample`], but with run lengths instead of masks: much faster, for scoring.
    pub fn sample_rle(&self, index: usize) -> Result<NarrativeSample<Rle>> {
        self.sample_with(index, Owners::rle)
    }

    fn sample_with<M>(
        &self,
        index: usize,
        mask: impl Fn(&Owners, &[u64]) -> M,
    ) -> Result<NarrativeSample<M>> {
        let narrative = self.narratives.get(index).ok_or_else(|| {
            Error::request(
                format!("there is no narrative {index}, only {}", self.narratives.len()),
                "narratives are numbered from 0",
            )
        })?;
        self.decode(narrative, mask).map_err(|error| in_file(&self.file, format!("narrative {index}"), error))
    }

    fn decode<M>(
        &self,
        narrative: &Narrative,
        mask: impl Fn(&Owners, &[u64]) -> M,
    ) -> Result<NarrativeSample<M>> {
        let unknown =
            |what: String| Error::request(what, "the narrative and panoptic files must belong together");
        let image_id = narrative.image_id;
        let image =
            self.images.get(&image_id).ok_or_else(|| unknown(format!("unknown picture {image_id}")))?;
        let annotation = self
            .annotations
            .get(&image_id)
            .ok_or_else(|| unknown(format!("picture {image_id} has no segments")))?;
        let grounded = narrative.segments.iter().any(|segment| !segment.segment_ids.is_empty());
        let ids = if grounded { self.segment_ids(image, annotation)? } else { Vec::new() };
        let owners = Owners::new(image.width, image.height, ids);

        let mut utterances = Vec::with_capacity(narrative.segments.len());
        let mut phrases = Vec::new();
        for segment in &narrative.segments {
            let ids = &segment.segment_ids;
            if ids.is_empty() {
                utterances.push((segment.utterance.clone(), None));
                continue;
            }
            let is_thing = if segment.plural {
                true
            } else {
                let [id] = ids[..] else {
                    return Err(unknown(format!(
                        "{:?} is singular but has {} segments",
                        segment.utterance,
                        ids.len()
                    )));
                };
                let info = annotation.segments_info.iter().find(|info| info.id == id);
                let info = info.ok_or_else(|| unknown(format!("picture {image_id} has no segment {id}")))?;
                *self
                    .is_thing
                    .get(&info.category_id)
                    .ok_or_else(|| unknown(format!("unknown category {}", info.category_id)))?
            };
            let mask = mask(&owners, ids);
            utterances.push((segment.utterance.clone(), Some(phrases.len())));
            phrases.push(NarrativePhrase { mask, plural: segment.plural, is_thing });
        }
        let size = [image.height, image.width];
        Ok(NarrativeSample { image_id, file_name: image.file_name.clone(), size, utterances, phrases })
    }

    /// The segment id of every pixel, row-major.
    fn segment_ids(&self, image: &PanopticImage, annotation: &PanopticAnnotation) -> Result<Vec<u32>> {
        let path = self.mask_file(annotation);
        let picture = open_picture(&path)?;
        if picture.dimensions() != (image.width, image.height) {
            let (w, h) = picture.dimensions();
            let expected = format!("{} x {}", image.width, image.height);
            return Err(malformed(
                &path,
                format!("{w} x {h} pixels, expected {expected}"),
                "the id PNG of the picture",
            ));
        }
        Ok(picture.pixels().map(|p| u32::from(p[0]) | u32::from(p[1]) << 8 | u32::from(p[2]) << 16).collect())
    }
}

/// Which segment every pixel belongs to.
struct Owners {
    width: u32,
    height: u32,
    /// Row-major.
    ids: Vec<u32>,
    /// Lengths and ids of runs down the columns, when they are first asked for.
    runs: OnceCell<Vec<(u32, u32)>>,
}

impl Owners {
    fn new(width: u32, height: u32, ids: Vec<u32>) -> Self {
        Self { width, height, ids, runs: OnceCell::new() }
    }

    fn mask(&self, ids: &[u64]) -> Mask {
        let width = self.width as usize;
        Mask::from_fn(self.width, self.height, |x, y| {
            ids.contains(&u64::from(self.ids[y as usize * width + x as usize]))
        })
    }

    fn rle(&self, ids: &[u64]) -> Rle {
        let (mut counts, mut inside) = (vec![0], false);
        for &(length, id) in self.runs.get_or_init(|| self.down_columns()) {
            if ids.contains(&u64::from(id)) != inside {
                inside = !inside;
                counts.push(0);
            }
            if let Some(last) = counts.last_mut() {
                *last += length;
            }
        }
        Rle { h: self.height, w: self.width, counts }
    }

    fn down_columns(&self) -> Vec<(u32, u32)> {
        let width = self.width as usize;
        let mut runs: Vec<(u32, u32)> = Vec::new();
        for x in 0..width {
            for id in self.ids.iter().skip(x).step_by(width.max(1)) {
                match runs.last_mut() {
                    Some((length, known)) if known == id => *length += 1,
                    _ => runs.push((1, *id)),
                }
            }
        }
        runs
    }
}

/// The id PNG of a picture: the inverse of reading it. `ids` is row-major, `width` x `height`, below 2^24.
pub(crate) fn id_picture(width: u32, height: u32, ids: &[u32]) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        let [r, g, b, _] = ids[y as usize * width as usize + x as usize].to_le_bytes();
        image::Rgb([r, g, b])
    })
}

fn open_picture(path: &Path) -> Result<RgbImage> {
    let reader = image::ImageReader::open(path).map_err(|error| Error::io(path, error))?;
    let picture = reader.with_guessed_format().map_err(|error| Error::io(path, error))?.decode();
    let picture =
        picture.map_err(|error| malformed(path, error.to_string(), "expected an RGB PNG of segment ids"))?;
    Ok(picture.into_rgb8())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One 2 x 1 picture with a thing (id 1000) and stuff (id 70000), and this narrative segment.
    fn dataset(segment: &str) -> (tempfile::TempDir, Narratives) {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: String| std::fs::write(folder.path().join(name), text).unwrap();
        write(
            "panoptic.json",
            r#"{"images": [{"id": 5, "file_name": "5.jpg", "height": 1, "width": 2}],
                "annotations": [{"image_id": 5, "file_name": "5.png", "segments_info": [
                    {"id": 1000, "category_id": 1, "bbox": [0, 0, 1, 1], "area": 1, "iscrowd": 0},
                    {"id": 70000, "category_id": 2, "bbox": [1, 0, 1, 1], "area": 1, "iscrowd": 0}]}],
                "categories": [{"id": 1, "name": "dog", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}]}"#.into(),
        );
        write("narratives.json", format!(r#"[{{"image_id": "5", "segments": [{segment}]}}]"#));
        id_picture(2, 1, &[1000, 70000]).save(folder.path().join("5.png")).unwrap();
        let file = |name| folder.path().join(name);
        let narratives =
            Narratives::open(&file("narratives.json"), &file("panoptic.json"), folder.path()).unwrap();
        (folder, narratives)
    }

    #[test]
    fn plurals_count_as_things_and_ignore_absent_segments() {
        for (segment, area, is_thing) in [
            (r#"{"utterance": "sky", "segment_ids": ["70000"], "plural": false}"#, 1, false),
            (r#"{"utterance": "skies", "segment_ids": ["70000"], "plural": true}"#, 1, true),
            (r#"{"utterance": "all", "segment_ids": ["70000", 1000, "12"], "plural": true}"#, 2, true),
        ] {
            let (_folder, narratives) = dataset(segment);
            let phrase = narratives.sample(0).unwrap().phrases.remove(0);
            assert_eq!((phrase.mask.area(), phrase.is_thing), (area, is_thing), "{segment}");
            let runs = narratives.sample_rle(0).unwrap().phrases.remove(0).mask;
            assert_eq!(
                hotcoco::mask::decode(&runs),
                phrase.mask.data.iter().map(|&b| u8::from(b)).collect::<Vec<_>>()
            );
        }
    }

    #[test]
    fn a_singular_has_exactly_one_known_segment() {
        for segment in [
            r#"{"utterance": "both", "segment_ids": ["70000", "1000"], "plural": false}"#,
            r#"{"utterance": "gone", "segment_ids": ["12"], "plural": false}"#,
        ] {
            let (_folder, narratives) = dataset(segment);
            let error = narratives.sample(0).unwrap_err().to_string();
            assert!(error.contains("narratives.json") && error.contains("narrative 0"), "{error}");
        }
    }
}
