//! gRefCOCO: expressions that refer to one object, to several, or to none (`grefs(unc).json` + `instances.json`, as the
//! dataset's authors distribute it).

use crate::coco::{Segmentation, in_file, malformed, read_json};
use crate::refcoco::{Instance, InstanceImage, InstancesFile};
use flmm::{Error, Result};
use hotcoco::types::Rle;
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

/// One element of the reference list. Fields that are not used are not kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct GroupReference {
    pub ref_id: u64,
    pub image_id: u64,
    /// `train`, `val`, `testA` or `testB`.
    pub split: String,
    /// Annotations that are meant; −1 alone if there is none.
    pub ann_id: OneOrMany,
    /// Whether nothing in the picture is meant.
    #[serde(default)]
    pub no_target: bool,
    pub sentences: Vec<GroupSentence>,
}

/// An expression of a [`GroupReference`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupSentence {
    /// Its id, unique in the file.
    pub sent_id: u64,
    /// As it was written.
    #[serde(default)]
    pub raw: String,
    /// Lower-cased and without punctuation.
    pub sent: String,
}

/// An id or a list of ids.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany {
    /// One.
    One(i64),
    /// Several.
    Many(Vec<i64>),
}

impl OneOrMany {
    fn ids(&self) -> &[i64] {
        match self {
            Self::One(id) => std::slice::from_ref(id),
            Self::Many(ids) => ids,
        }
    }
}

/// One split.
pub struct GrefCoco {
    /// One sample per expression, in the order of the file.
    pub samples: Vec<GroupSample>,
    objects: HashMap<u64, Segmentation>,
    file: PathBuf,
}

/// An expression and what it means.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupSample {
    /// Id of the expression.
    pub sent_id: u64,
    /// COCO image id.
    pub image_id: u64,
    /// File name of the picture.
    pub file_name: String,
    /// Height and width.
    pub size: [u32; 2],
    /// The expression: the raw text in lower case.
    pub text: String,
    /// Annotations that are meant, crowds left out; none for an expression without a target.
    pub targets: Vec<u64>,
}

impl GrefCoco {
    /// Opens a split. An error if a file is malformed, an expression names an unknown annotation or picture or one of
    /// another picture, an id comes twice, or the split does not occur.
    pub fn open(instances: &Path, references: &Path, split: &str) -> Result<Self> {
        let file: InstancesFile = read_json(instances)?;
        let images: HashMap<u64, InstanceImage> = file.images.into_iter().map(|i| (i.id, i)).collect();
        let annotations: HashMap<u64, Instance> = file.annotations.into_iter().map(|a| (a.id, a)).collect();
        let all: Vec<GroupReference> = read_json(references)?;
        let (mut samples, mut ids, mut objects) = (Vec::new(), HashSet::new(), HashMap::new());
        for reference in all.iter().filter(|reference| reference.split == split) {
            let wrong = |what: String| {
                malformed(
                    references,
                    format!("reference {}: {what}", reference.ref_id),
                    "instances.json and the reference list must belong together",
                )
            };
            let image = images
                .get(&reference.image_id)
                .ok_or_else(|| wrong(format!("unknown picture {}", reference.image_id)))?;
            let mut targets = Vec::new();
            let meant = reference.ann_id.ids().iter().filter(|&&id| !reference.no_target && id != -1);
            for &id in meant {
                let annotation = u64::try_from(id).ok().and_then(|id| annotations.get(&id));
                let annotation = annotation.ok_or_else(|| wrong(format!("unknown annotation {id}")))?;
                if annotation.image_id != image.id {
                    return Err(wrong(format!(
                        "annotation {id} is of picture {}, not {}",
                        annotation.image_id, image.id
                    )));
                }
                if annotation.iscrowd == 0 {
                    targets.push(annotation.id);
                    objects.entry(annotation.id).or_insert_with(|| annotation.segmentation.clone());
                }
            }
            for sentence in &reference.sentences {
                if !ids.insert(sentence.sent_id) {
                    return Err(wrong(format!("sentence id {} comes twice", sentence.sent_id)));
                }
                let text = if sentence.raw.is_empty() { &sentence.sent } else { &sentence.raw };
                samples.push(GroupSample {
                    sent_id: sentence.sent_id,
                    image_id: image.id,
                    file_name: image.file_name.clone(),
                    size: [image.height, image.width],
                    text: text.to_lowercase(),
                    targets: targets.clone(),
                });
            }
        }
        if samples.is_empty() {
            let mut known: Vec<&str> = all.iter().map(|reference| reference.split.as_str()).collect();
            known.sort_unstable();
            known.dedup();
            let hint = format!("its splits are {}", known.join(", "));
            return Err(malformed(references, format!("no expression of split {split:?}"), hint));
        }
        Ok(Self { samples, objects, file: instances.to_owned() })
    }

    /// Opens `val`, `testA` or `testB` below a data root (`coco/grefcoco/`).
    pub fn open_split(root: &Path, split: &str) -> Result<Self> {
        let folder = root.join("coco").join("grefcoco");
        Self::open(&folder.join("instances.json"), &folder.join("grefs(unc).json"), split)
    }

    /// The masks of what a sample means; none for an expression without a target.
    pub fn masks(&self, sample: &GroupSample) -> Result<Vec<Rle>> {
        let decode = |id: &u64| {
            let mask = self.objects.get(id).ok_or_else(|| {
                Error::request(format!("unknown annotation {id}"), "take samples of this split")
            })?;
            let rle = mask.to_rle(sample.size[0], sample.size[1]);
            rle.map_err(|error| in_file(&self.file, format!("annotation {id}"), error))
        };
        sample.targets.iter().map(decode).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(references: &str) -> Result<GrefCoco> {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let square = |x: u32| format!("[[{x}, 0, {0}, 0, {0}, 2, {x}, 2]]", x + 2);
        let annotation = |id: u32, image: u32, x: u32, crowd: u8| {
            format!(
                r#"{{"id": {id}, "image_id": {image}, "category_id": 1, "segmentation": {}, "bbox": [0, 0, 1, 1],
                    "area": 4, "iscrowd": {crowd}}}"#,
                square(x)
            )
        };
        let annotations =
            [annotation(7, 5, 0, 0), annotation(8, 5, 4, 0), annotation(9, 5, 2, 1), annotation(3, 6, 0, 0)];
        let instances = format!(
            r#"{{"images": [{{"id": 5, "file_name": "5.jpg", "height": 4, "width": 8}},
                            {{"id": 6, "file_name": "6.jpg", "height": 4, "width": 8}}],
                "annotations": [{}]}}"#,
            annotations.join(", ")
        );
        std::fs::write(path("instances.json"), instances).unwrap();
        std::fs::write(path("refs.json"), references).unwrap();
        GrefCoco::open(&path("instances.json"), &path("refs.json"), "val")
    }

    fn reference(ids: &str, no_target: bool, sent_id: u32) -> String {
        format!(
            r#"{{"ref_id": 1, "image_id": 5, "split": "val", "ann_id": {ids}, "no_target": {no_target}, "category_id": [1],
                "file_name": "x", "sent_ids": [{sent_id}],
                "sentences": [{{"sent_id": {sent_id}, "raw": "The Two", "sent": "the two", "tokens": []}}]}}"#
        )
    }

    #[test]
    fn one_several_and_none() {
        let list = [("[7, 8, 9]", false), ("7", false), ("[-1]", true), ("[-1]", false)];
        let list: Vec<String> =
            list.iter().zip(0..).map(|((ids, none), sent)| reference(ids, *none, sent)).collect();
        let data = open(&format!("[{}]", list.join(", "))).unwrap();
        let targets: Vec<&[u64]> = data.samples.iter().map(|sample| &sample.targets[..]).collect();
        assert_eq!(targets, [&[7, 8][..], &[7], &[], &[]]);
        assert_eq!(data.samples[0].text, "the two");
        let areas: Vec<u64> = data.masks(&data.samples[0]).unwrap().iter().map(hotcoco::mask::area).collect();
        assert_eq!(areas, [4, 4]);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        for (list, what) in [
            (reference("[12]", false, 0), "unknown annotation 12"),
            (reference("[3]", false, 0), "of picture 6"),
            ([reference("7", false, 4), reference("8", false, 4)].join(", "), "sentence id 4 comes twice"),
            (reference("7", false, 0).replace("val", "testA"), "its splits are testA"),
        ] {
            let error = open(&format!("[{list}]")).err().unwrap();
            let text = format!("{error} {}", error.hint().unwrap());
            assert!(text.contains(what), "{text}");
        }
    }
}
