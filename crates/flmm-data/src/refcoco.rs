//! RefCOCO, RefCOCO+ and RefCOCOg: expressions that refer to COCO objects (`training.md` §2.3).

use crate::coco::{Segmentation, in_file, malformed, read_json};
use crate::mask::Mask;
use flmm::{Error, Result};
use hotcoco::types::Rle;
use serde::{Deserialize, Serialize};
use serde_pickle::{DeOptions, SerOptions};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// One element of the pickled reference list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Reference {
    pub ref_id: u64,
    pub ann_id: u64,
    pub image_id: u64,
    pub category_id: u64,
    pub file_name: String,
    /// `train`, `val`, `test`, `testA` or `testB`.
    pub split: String,
    pub sent_ids: Vec<u64>,
    pub sentences: Vec<Sentence>,
}

/// One expression.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sentence {
    /// As it was written.
    pub raw: String,
    /// Lower-cased and without punctuation.
    pub sent: String,
    /// Words of `sent`.
    pub tokens: Vec<String>,
    /// Its id.
    pub sent_id: u64,
}

/// A COCO instances file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct InstancesFile {
    pub images: Vec<InstanceImage>,
    pub annotations: Vec<Instance>,
    #[serde(default)]
    pub categories: Vec<InstanceCategory>,
}

/// A picture of an instances file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct InstanceImage {
    pub id: u64,
    pub file_name: String,
    pub height: u32,
    pub width: u32,
}

/// An object of an instances file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Instance {
    pub id: u64,
    pub image_id: u64,
    pub category_id: u64,
    pub segmentation: Segmentation,
    /// x, y, width, height.
    pub bbox: [f64; 4],
    pub area: f64,
    #[serde(default)]
    pub iscrowd: u8,
}

/// A class of an instances file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct InstanceCategory {
    pub id: u64,
    pub name: String,
    #[serde(default)]
    pub supercategory: String,
}

/// Reads a pickled reference list of protocol 0 to 3. Python 2's byte strings count as text; nothing is executed.
pub fn read_references(path: &Path) -> Result<Vec<Reference>> {
    let bytes = std::fs::read(path).map_err(|error| Error::io(path, error))?;
    serde_pickle::from_slice(&bytes, DeOptions::new().decode_strings()).map_err(|error| {
        malformed(
            path,
            format!("not a pickled reference list: {error}"),
            "expected the published `refs(…).p`",
        )
    })
}

/// Pickles a reference list with protocol 2, which Python 2 and 3 read.
pub fn pickle_references(references: &[Reference]) -> Result<Vec<u8>> {
    serde_pickle::to_vec(&references, SerOptions::new().proto_v2())
        .map_err(|error| Error::request(format!("cannot pickle the references: {error}"), "this is a bug"))
}

/// Which expressions of an object are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextMode {
    /// One per object, drawn by this seed. The reference draws once for all epochs; another seed draws anew.
    Random(u64),
    /// The first one: evaluation.
    SelectFirst,
    /// All of them, each with the same mask.
    Original,
    /// All of them joined without separator.
    Concat,
}

/// One split of one of the three datasets.
pub struct RefCoco {
    /// Pictures with referred objects, by ascending id.
    pub images: Vec<RefImage>,
    file: PathBuf,
    references: PathBuf,
}

/// A picture with all its referred objects.
#[derive(Debug, Clone)]
pub struct RefImage {
    /// COCO image id.
    pub image_id: u64,
    /// File name of the picture.
    pub file_name: String,
    /// Height and width.
    pub size: [u32; 2],
    /// The objects, in the order in which the reference list first names them.
    pub objects: Vec<RefObject>,
}

/// A referred object.
#[derive(Debug, Clone)]
pub struct RefObject {
    /// Its annotation.
    pub ann_id: u64,
    /// Its class.
    pub category_id: u64,
    /// Its expressions: the raw text in lower case, at least one.
    pub sentences: Vec<String>,
    segmentation: Segmentation,
}

impl RefCoco {
    /// Opens a split. An error if a file is malformed, a reference names an unknown annotation or picture, or the
    /// split does not occur.
    pub fn open(instances: &Path, references: &Path, split: &str) -> Result<Self> {
        let file: InstancesFile = read_json(instances)?;
        let images: HashMap<u64, InstanceImage> = file.images.into_iter().map(|i| (i.id, i)).collect();
        let mut annotations: HashMap<u64, Instance> =
            file.annotations.into_iter().map(|a| (a.id, a)).collect();
        let all = read_references(references)?;

        // A later reference of the same annotation replaces the sentences but keeps the place.
        let mut order: Vec<Reference> = Vec::new();
        let mut place: HashMap<u64, usize> = HashMap::new();
        for reference in all.iter().filter(|reference| reference.split == split) {
            match place.get(&reference.ann_id) {
                Some(&at) => order[at] = reference.clone(),
                None => {
                    place.insert(reference.ann_id, order.len());
                    order.push(reference.clone());
                }
            }
        }
        if order.is_empty() {
            let mut known: Vec<&str> = all.iter().map(|reference| reference.split.as_str()).collect();
            known.sort_unstable();
            known.dedup();
            let hint = format!("its splits are {}", known.join(", "));
            return Err(malformed(references, format!("no reference of split {split:?}"), hint));
        }
        let hint = "instances.json and the reference list must belong together";
        let mut grouped: BTreeMap<u64, RefImage> = BTreeMap::new();
        for reference in order {
            let unknown =
                |what: String| malformed(references, format!("reference {}: {what}", reference.ref_id), hint);
            let ann_id = reference.ann_id;
            let annotation =
                annotations.remove(&ann_id).ok_or_else(|| unknown(format!("unknown annotation {ann_id}")))?;
            let image = images
                .get(&annotation.image_id)
                .ok_or_else(|| unknown(format!("unknown picture {}", annotation.image_id)))?;
            if reference.sentences.is_empty() {
                return Err(unknown("no sentence".into()));
            }
            let entry = grouped.entry(image.id).or_insert_with(|| RefImage {
                image_id: image.id,
                file_name: image.file_name.clone(),
                size: [image.height, image.width],
                objects: Vec::new(),
            });
            entry.objects.push(RefObject {
                ann_id,
                category_id: annotation.category_id,
                sentences: reference.sentences.iter().map(|sentence| sentence.raw.to_lowercase()).collect(),
                segmentation: annotation.segmentation,
            });
        }
        Ok(Self {
            images: grouped.into_values().collect(),
            file: instances.to_owned(),
            references: references.to_owned(),
        })
    }

    /// Opens a split of `refcoco`, `refcoco+` or `refcocog` below a data root in the reference's layout.
    pub fn open_split(root: &Path, dataset: &str, split: &str) -> Result<Self> {
        let folder = root.join("coco").join(dataset);
        let author = if dataset == "refcocog" { "umd" } else { "unc" };
        Self::open(&folder.join("instances.json"), &folder.join(format!("refs({author}).p")), split)
    }

    /// The files it was read from.
    pub fn files(&self) -> [&Path; 2] {
        [&self.file, &self.references]
    }

    /// The mask of an object of this dataset.
    pub fn mask(&self, image: &RefImage, object: usize) -> Result<Mask> {
        self.decode(image, object, Segmentation::to_mask)
    }

    /// The same as run lengths.
    pub fn rle(&self, image: &RefImage, object: usize) -> Result<Rle> {
        self.decode(image, object, Segmentation::to_rle)
    }

    fn decode<T>(
        &self,
        image: &RefImage,
        object: usize,
        decode: impl Fn(&Segmentation, u32, u32) -> Result<T>,
    ) -> Result<T> {
        let object = image.objects.get(object).ok_or_else(|| {
            Error::request(
                format!("picture {} has no object {object}", image.image_id),
                "objects are numbered from 0 within their picture",
            )
        })?;
        let mask = decode(&object.segmentation, image.size[0], image.size[1]);
        mask.map_err(|error| in_file(&self.file, format!("annotation {}", object.ann_id), error))
    }
}

impl RefImage {
    /// The expressions in order, each with the index of its object.
    pub fn expressions(&self, mode: TextMode) -> Vec<(String, usize)> {
        let mut out = Vec::new();
        for (index, object) in self.objects.iter().enumerate() {
            let sentences = &object.sentences;
            match mode {
                TextMode::Random(seed) => {
                    let at = mixed(seed ^ mixed(object.ann_id)) % sentences.len() as u64;
                    out.push((sentences[at as usize].clone(), index));
                }
                TextMode::SelectFirst => out.push((sentences[0].clone(), index)),
                TextMode::Original => out.extend(sentences.iter().map(|sentence| (sentence.clone(), index))),
                TextMode::Concat => out.push((sentences.concat(), index)),
            }
        }
        out
    }
}

/// SplitMix64's finalizer: spreads an id over all bits.
fn mixed(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
