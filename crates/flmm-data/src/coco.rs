//! What the COCO formats share: masks as polygons or run lengths, ids, and reading JSON files (`training.md` §2).

use crate::mask::Mask;
use flmm::{Error, Result};
use hotcoco::types::Rle;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use std::path::Path;

/// Largest picture a mask is decoded for, pixels: a wrong size in a file must not exhaust the memory.
const MOST_PIXELS: u64 = 1 << 28;

/// A mask as COCO files write it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Segmentation {
    /// Parts as x0, y0, x1, y1 … in pixels; the mask is their union.
    Polygons(Vec<Vec<f64>>),
    /// Run lengths.
    Runs(RunLengths),
}

/// Column-major run lengths; the first run is background.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunLengths {
    /// Height and width.
    pub size: [u32; 2],
    /// The runs.
    pub counts: Counts,
}

/// Run lengths in one of COCO's two notations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Counts {
    /// COCO's compressed string.
    Compressed(String),
    /// Plain numbers.
    Plain(Vec<u32>),
}

impl Segmentation {
    /// The mask in compressed form.
    pub fn compress(mask: &Mask) -> Self {
        let runs = runs_of(mask.height, mask.width, |x, y| mask.get(x, y));
        Self::Runs(RunLengths {
            size: [mask.height, mask.width],
            counts: Counts::Compressed(hotcoco::mask::rle_to_string(&runs)),
        })
    }

    /// Decodes for a picture of this size, pixels.
    ///
    /// Polygon parts with an odd length or fewer than six numbers are dropped; without any part left the mask is empty.
    /// Run lengths of another size, or malformed ones, are errors.
    pub fn to_mask(&self, height: u32, width: u32) -> Result<Mask> {
        self.to_rle(height, width).map(|rle| mask_of(&rle))
    }

    /// As [`Segmentation::to_mask`], but as run lengths, which no pixel is touched for.
    pub fn to_rle(&self, height: u32, width: u32) -> Result<Rle> {
        if u64::from(height) * u64::from(width) > MOST_PIXELS {
            return Err(Error::request(
                format!("a mask of {height} x {width} pixels is too large"),
                "check the height and width in the annotation file",
            ));
        }
        let rle = match self {
            Self::Polygons(parts) => {
                let usable = parts.iter().filter(|part| part.len() >= 6 && part.len().is_multiple_of(2));
                let usable: Vec<Vec<f64>> = usable.cloned().collect();
                hotcoco::mask::fr_polys(&usable, height, width)
            }
            Self::Runs(runs) if runs.size != [height, width] => {
                let [h, w] = runs.size;
                return Err(Error::request(
                    format!("a mask of {h} x {w} pixels belongs to a picture of {height} x {width}"),
                    "`size` is height, width and must be that of the picture",
                ));
            }
            Self::Runs(runs) => match &runs.counts {
                Counts::Compressed(text) => hotcoco::mask::rle_from_string(text, height, width),
                Counts::Plain(counts) => Rle::new(height, width, counts.clone()),
            },
        };
        rle.map_err(|error| {
            Error::request(
                format!("malformed mask: {error}"),
                "polygons, or COCO run lengths (plain or compressed)",
            )
        })
    }
}

/// Run lengths of the pixels that are `inside(x, y)`.
pub fn runs_of(height: u32, width: u32, inside: impl Fn(u32, u32) -> bool) -> Rle {
    let (mut counts, mut run, mut now) = (Vec::new(), 0, false);
    for x in 0..width {
        for y in 0..height {
            if inside(x, y) != now {
                counts.push(run);
                (run, now) = (0, !now);
            }
            run += 1;
        }
    }
    counts.push(run);
    Rle { h: height, w: width, counts }
}

fn mask_of(rle: &Rle) -> Mask {
    let columns = hotcoco::mask::decode(rle);
    Mask::from_fn(rle.w, rle.h, |x, y| columns[x as usize * rle.h as usize + y as usize] != 0)
}

/// Reads and parses a JSON file.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = std::fs::read(path).map_err(|error| Error::io(path, error))?;
    parse_json(path, &bytes)
}

/// Parses the content of a JSON file.
pub(crate) fn parse_json<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    serde_json::from_slice(bytes).map_err(|error| {
        malformed(path, format!("not the expected JSON: {error}"), "compare with the published file")
    })
}

/// An annotation file with wrong content.
pub(crate) fn malformed(path: &Path, what: impl Into<String>, hint: impl Into<String>) -> Error {
    Error::config(path, what, hint)
}

/// Names the file in an error about one of its entries.
pub(crate) fn in_file(path: &Path, entry: impl std::fmt::Display, error: Error) -> Error {
    let hint = error.hint().unwrap_or("check the file").to_owned();
    malformed(path, format!("{entry}: {error}"), hint)
}

/// An id written as a number or as a string of digits.
pub(crate) fn id<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    Id::deserialize(deserializer)?.number()
}

/// A list of such ids.
pub(crate) fn ids<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u64>, D::Error> {
    Vec::<Id>::deserialize(deserializer)?.into_iter().map(Id::number).collect()
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Id {
    Number(u64),
    Text(String),
}

impl Id {
    fn number<E: serde::de::Error>(self) -> Result<u64, E> {
        match self {
            Self::Number(number) => Ok(number),
            Self::Text(text) => {
                text.trim().parse().map_err(|_| E::custom(format!("{text:?} is not an id: expected digits")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn compression_is_lossless(width in 1u32..20, height in 1u32..20, seed in any::<u64>()) {
            let mask = Mask::from_fn(width, height, |x, y| (seed >> ((x * 7 + y * 13) % 64)) & 1 == 1);
            prop_assert_eq!(Segmentation::compress(&mask).to_mask(height, width).unwrap(), mask);
        }
    }

    #[test]
    fn wrong_masks_are_refused() {
        let parse = |json: &str| serde_json::from_str::<Segmentation>(json).unwrap();
        for json in [
            r#"{"size": [3, 4], "counts": [5, 2]}"#,
            r#"{"size": [3, 4], "counts": [5, 20]}"#,
            r#"{"size": [4, 3], "counts": [12]}"#,
            r#"{"size": [3, 4], "counts": "o"}"#,
            r#"{"size": [3, 4], "counts": "0000000000000S9"}"#,
        ] {
            assert!(parse(json).to_mask(3, 4).is_err(), "{json}");
        }
        assert!(parse("[]").to_mask(u32::MAX, u32::MAX).is_err());
        assert_eq!(parse("[[1.0, 2.0], [1, 1, 2, 2, 3]]").to_mask(3, 4).unwrap().area(), 0);
    }
}
