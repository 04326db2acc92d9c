//! Telling one model from another by its files.

use std::path::Path;

use candle_core::DType;
use serde::{Deserialize, Serialize};

use super::{HeadSettings, ModelPaths, RefinerKind};
use crate::error::Result;
use crate::lmm::OpenOptions;
use crate::weights::{WeightFormat, files, fingerprint};

/// What a model's answers and masks depend on: numbers of two revisions must not be mixed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revision {
    /// [`fingerprint`] of the LMM's folder.
    pub lmm: String,
    /// That of SAM's checkpoint; none for a head without a refiner.
    pub sam: Option<String>,
    /// That of the head and its settings; none where masks are made without a head.
    pub head: Option<String>,
    /// Those of the vision towers that were named.
    pub vision_towers: Vec<String>,
    /// Type the LMM computes in.
    pub dtype: String,
    /// How its matrices are kept.
    pub weights: WeightFormat,
    /// Numbers of SAM's image encoder; none for a head without a refiner.
    pub sam_dtype: Option<String>,
    /// Side of the picture the LMM sees, in pixels, where it was chosen.
    pub image_size: Option<usize>,
}

impl Revision {
    /// The revision of the model that [`Grounder::open_with`](super::Grounder::open_with) opens from `paths`.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) naming the file that cannot be read, [`Error::Config`](crate::Error::Config) for a
    /// wrong `head.json`.
    pub fn of(paths: &ModelPaths, options: &OpenOptions) -> Result<Self> {
        let refiner = match &paths.head {
            Some(head) => HeadSettings::read(head)?.refiner,
            None => RefinerKind::Sam,
        };
        let needs_sam = refiner == RefinerKind::Sam;
        let name = |dtype: DType| format!("{dtype:?}").to_lowercase();
        let towers = [&options.vision_tower, &options.vision_tower_aux];
        Ok(Self {
            lmm: fingerprint(&paths.model)?,
            sam: needs_sam.then(|| fingerprint(&paths.sam)).transpose()?,
            head: paths.head.as_deref().map(head).transpose()?,
            vision_towers: towers
                .into_iter()
                .flatten()
                .map(|tower| fingerprint(tower))
                .collect::<Result<_>>()?,
            dtype: name(options.dtype),
            weights: options.weights,
            sam_dtype: needs_sam.then(|| options.sam_dtype.name().to_owned()),
            image_size: options.image_size,
        })
    }
}

/// The fingerprint of a head's folder, or of its file and the `head.json` beside it.
fn head(path: &Path) -> Result<String> {
    let settings = path.with_file_name("head.json");
    if files::is_dir(path) || !files::is_file(&settings) {
        return fingerprint(path);
    }
    Ok(format!("{}+{}", fingerprint(path)?, fingerprint(&settings)?))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::sam::Numbers;

    /// Every part of a model, and how it is opened, makes another revision.
    #[test]
    fn every_part_counts() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let put = |name: &str, text: &str| std::fs::write(root.join(name), text).unwrap();
        for part in ["lmm", "tower"] {
            std::fs::create_dir(root.join(part)).unwrap();
            put(&format!("{part}/config.json"), "{}");
        }
        put("sam.pth", "a");
        put("head.pth", "a");
        let paths = ModelPaths {
            model: root.join("lmm"),
            sam: root.join("sam.pth"),
            head: Some(root.join("head.pth")),
        };
        let options = OpenOptions::new(DType::F32, &Device::Cpu);
        let of = |paths: &ModelPaths, options: &OpenOptions| Revision::of(paths, options).unwrap();
        let mut seen = vec![of(&paths, &options)];
        assert_eq!(of(&paths, &options), seen[0]);
        let changes = [
            ("lmm/config.json", "{ }"),
            ("sam.pth", "b"),
            ("head.pth", "b"),
            ("head.json", r#"{"refiner": "sam"}"#),
        ];
        for (name, text) in changes {
            put(name, text);
            seen.push(of(&paths, &options));
        }
        seen.push(of(&ModelPaths { head: None, ..paths.clone() }, &options));
        seen.push(of(&paths, &OpenOptions { vision_tower: Some(root.join("tower")), ..options.clone() }));
        seen.push(of(&paths, &OpenOptions { image_size: Some(448), ..options.clone() }));
        seen.push(of(&paths, &OpenOptions::new(DType::BF16, &Device::Cpu)));
        seen.push(of(&paths, &OpenOptions { weights: WeightFormat::Int8, ..options.clone() }));
        seen.push(of(&paths, &OpenOptions { sam_dtype: Numbers::Bf16, ..options.clone() }));
        seen.push(of(&paths, &OpenOptions { sam_dtype: Numbers::Int8, ..options.clone() }));
        // A head without a refiner needs no SAM.
        put("head.json", r#"{"refiner": "none"}"#);
        std::fs::remove_file(root.join("sam.pth")).unwrap();
        seen.push(of(&paths, &options));
        for (number, revision) in seen.iter().enumerate() {
            assert!(!seen[..number].contains(revision), "{number}: {revision:?}");
        }
        let json = serde_json::to_string(&seen[0]).unwrap();
        assert_eq!(serde_json::from_str::<Revision>(&json).unwrap(), seen[0]);
    }
}
