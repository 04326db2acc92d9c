//! ReasonSeg: instructions that need reasoning, with polygon masks (`evaluation.md` §3).

use crate::coco::{malformed, parse_json};
use crate::mask::Mask;
use crate::polygons;
use flmm::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The content of one annotation file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Reasoning {
    /// Instructions; the first one is used.
    pub text: Vec<String>,
    /// Whether they are whole sentences ("Long") rather than phrases ("Short").
    pub is_sentence: bool,
    /// The polygons.
    pub shapes: Vec<Shape>,
}

/// One polygon.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Shape {
    /// `target`; names with "ignore" mark pixels that do not count; `flag` is dropped.
    pub label: String,
    /// Corners x, y in pixels.
    pub points: Vec<[f64; 2]>,
}

/// The ground truth of one picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroundTruth {
    /// What is asked for.
    pub foreground: Mask,
    /// Pixels that do not count.
    pub ignore: Mask,
}

impl Reasoning {
    /// Reads an annotation file, in UTF-8 or else in cp1252. An error if it has no instruction.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|error| Error::io(path, error))?;
        let text = match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => error.as_bytes().iter().map(|&byte| cp1252(byte)).collect(),
        };
        let reasoning: Self = parse_json(path, text.as_bytes())?;
        if reasoning.text.is_empty() {
            return Err(malformed(path, "`text` is empty", "expected at least one instruction"));
        }
        Ok(reasoning)
    }

    /// The instruction that evaluation uses.
    pub fn instruction(&self) -> &str {
        self.text.first().map_or("", String::as_str)
    }

    /// Paints the shapes in order of decreasing area, of equal ones the later in the file first.
    pub fn ground_truth(&self, height: u32, width: u32) -> GroundTruth {
        let shapes = self.shapes.iter().filter(|shape| shape.label.to_lowercase() != "flag");
        let mut painted: Vec<(Mask, bool)> = shapes
            .map(|shape| {
                let ignored = shape.label.to_lowercase().contains("ignore");
                (polygons::fill(&shape.points, width, height), ignored)
            })
            .collect();
        painted.sort_by_key(|(mask, _)| mask.area());
        let empty = Mask::from_fn(width, height, |_, _| false);
        let mut truth = GroundTruth { foreground: empty.clone(), ignore: empty };
        for (mask, ignored) in painted.iter().rev() {
            for (at, _) in mask.data.iter().enumerate().filter(|(_, inside)| **inside) {
                truth.foreground.data[at] = !ignored;
                truth.ignore.data[at] = *ignored;
            }
        }
        truth
    }
}

/// The annotation files of a folder, by name. Each has a picture of the same name beside it.
pub fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).map_err(|error| Error::io(folder, error))?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| Error::io(folder, error))?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn cp1252(byte: u8) -> char {
    const HIGH: [char; 32] = [
        '€', '\u{fffd}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{fffd}', 'Ž', '\u{fffd}',
        '\u{fffd}', '‘', '’', '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{fffd}', 'ž', 'Ÿ',
    ];
    if (0x80..0xa0).contains(&byte) { HIGH[usize::from(byte) - 0x80] } else { char::from(byte) }
}
