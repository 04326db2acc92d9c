//! Recorded runs, and the models they were recorded with.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use flmm::Grounder;
use flmm::grounder::{Caption, ModelPaths};
use flmm::lmm::{self, Lmm, OpenOptions, Prepared, recognise};
use serde_json::Value;

use crate::common::models::tiny_options;
use crate::common::{Golden, TestResult, golden_dir, json, rel_l2, tiny_sam};

/// A recorded run: one picture and text of one family in one arithmetic.
pub(crate) struct Case {
    pub(crate) golden: Golden,
    pub(crate) record: Value,
    /// Relative change of every tensor under another legitimate bf16 arithmetic; `None` for f32.
    pub(crate) noise: Option<Value>,
    pub(crate) picture: PathBuf,
}

impl Case {
    /// Compares with the absolute tolerance in f32, with the relative one (or twice the noise) in bf16.
    pub(crate) fn check(&mut self, name: &str, actual: &Tensor, absolute: f64, relative: f64) -> TestResult {
        let Some(noise) = &self.noise else { return self.golden.check(name, actual, absolute) };
        if !self.golden.has(name) {
            return Ok(());
        }
        let noise = noise["rel_l2"][name].as_f64().unwrap_or(0.0);
        let tolerance = relative.max(2.0 * noise);
        let difference = rel_l2(actual, self.golden.get(name)?)
            .map_err(|e| format!("{}: {name}: {e}", self.golden.case))?;
        println!("{}: {name}: {difference:.4} relative (tolerance {tolerance:.3})", self.golden.case);
        match difference <= tolerance {
            true => Ok(()),
            false => Err(format!(
                "{}: first diverging tensor `{name}`: {difference} > {tolerance}",
                self.golden.case
            )
            .into()),
        }
    }

    pub(crate) fn exact<T: PartialEq + std::fmt::Debug>(
        &self,
        name: &str,
        actual: T,
        expected: T,
    ) -> TestResult {
        match actual == expected {
            true => Ok(()),
            false => Err(format!("{}: {name}: {actual:?}, expected {expected:?}", self.golden.case).into()),
        }
    }

    /// Recorded token ids with one image token: the sentinel -200 is replaced by the model's, a run of them
    /// (recorded run by run) by one.
    pub(crate) fn ids(&self, name: &str, prepared: &Prepared) -> TestResult<Vec<u32>> {
        let image = prepared.token_ids[prepared.images[0].layout.start];
        let ids: Vec<i64> = match self.record.get(format!("{name}_rle")) {
            Some(_) => unexpanded(&self.runs(name)?, prepared),
            None => self.list(name)?,
        };
        Ok(ids.into_iter().map(|id| u32::try_from(id).unwrap_or(image)).collect())
    }

    /// A list that was recorded as pairs of a value and how often it comes.
    pub(crate) fn runs(&self, name: &str) -> TestResult<Vec<i64>> {
        let runs: Vec<(i64, usize)> = self.list(&format!("{name}_rle"))?;
        Ok(runs.into_iter().flat_map(|(value, count)| std::iter::repeat_n(value, count)).collect())
    }

    pub(crate) fn list<T: serde::de::DeserializeOwned>(&self, name: &str) -> TestResult<T> {
        serde_json::from_value(self.record[name].clone())
            .map_err(|e| format!("{}: {name}: {e}", self.golden.case).into())
    }
}

/// Folders of models this build can open, with the names of the models.
pub(crate) fn families() -> TestResult<Vec<(&'static str, PathBuf)>> {
    let Some(root) = golden_dir("lmm") else { return Ok(Vec::new()) };
    let mut families = Vec::new();
    for entry in std::fs::read_dir(&root)? {
        let dir = entry?.path();
        if !dir.join("model").is_dir() || !dir.join("expected").is_dir() {
            continue;
        }
        if let Ok(entry) = recognise(&dir.join("model")) {
            families.push((entry.spec.name, dir));
        }
    }
    families.sort();
    Ok(families)
}

/// The device that `FLMM_TEST_DEVICE` names, the processor unless it is set.
fn device() -> TestResult<Device> {
    let Ok(named) = std::env::var("FLMM_TEST_DEVICE") else { return Ok(Device::Cpu) };
    Ok(named.parse::<flmm::device::DeviceChoice>()?.open()?)
}

/// How the model of a case is opened, on the device that the tests are run on.
pub(crate) fn options(dir: &Path, dtype: DType) -> TestResult<OpenOptions> {
    Ok(OpenOptions { device: device()?, ..tiny_options(dir, dtype)? })
}

/// Cases `expected/<picture>.<dtype>.safetensors` of a family.
pub(crate) fn cases(dir: &Path, suffix: &str) -> TestResult<Vec<Case>> {
    let noise = json(&dir.join("expected/noise.json"))?;
    let family = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut cases = Vec::new();
    for entry in std::fs::read_dir(dir.join("expected"))? {
        let file = entry?.path();
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(picture) = name.strip_suffix(&format!(".{suffix}.safetensors")) else { continue };
        let mut golden = Golden::open(&file)?;
        golden.case = format!("{family}/{picture}.{suffix}");
        let noise = (suffix == "bf16").then(|| noise[picture]["bf16_other_arithmetic"].clone());
        let record = json(&file.with_extension("json"))?;
        cases.push(Case {
            golden,
            record,
            noise,
            picture: dir.join("images").join(format!("{picture}.png")),
        });
    }
    cases.sort_by(|a, b| a.golden.case.cmp(&b.golden.case));
    assert!(!cases.is_empty(), "{} has no {suffix} cases", dir.display());
    Ok(cases)
}

/// A family's model, with the recorded heads unless they were left out to keep a folder small.
pub(crate) enum Opened {
    Whole(Box<Grounder>),
    Lmm(Box<dyn Lmm>),
}

impl Opened {
    pub(crate) fn lmm(&self) -> &dyn Lmm {
        match self {
            Self::Whole(grounder) => grounder.lmm(),
            Self::Lmm(lmm) => lmm.as_ref(),
        }
    }
}

pub(crate) fn open(dir: &Path, dtype: DType) -> TestResult<Opened> {
    let head =
        ["heads.safetensors", "heads.pth"].map(|name| dir.join(name)).into_iter().find(|file| file.is_file());
    let (model, options) = (dir.join("model"), options(dir, dtype)?);
    let Some(head) = head else { return Ok(Opened::Lmm(lmm::open_with(&model, &options)?)) };
    let sam = golden_dir("lmm/_sam").ok_or("lmm/_sam is missing")?;
    let paths = ModelPaths { model, sam: tiny_sam(&sam)?, head: Some(head) };
    Ok(Opened::Whole(Box::new(Grounder::open_with(&paths, &options)?)))
}

/// The recorded text, segment by segment.
pub(crate) fn caption(lmm: &dyn Lmm, text: &Value) -> TestResult<Caption> {
    if text["kind"] == "expressions" {
        let phrases: Vec<String> = serde_json::from_value(text["phrases"].clone())?;
        return Ok(Caption::from_expressions(lmm.tokenizer(), phrases.iter().map(String::as_str))?);
    }
    let segments: Vec<(String, Vec<String>)> = serde_json::from_value(text["segments"].clone())?;
    let mut phrases = 0;
    let numbered = segments.iter().map(|(text, ids)| {
        let number = (!ids.is_empty()).then_some(phrases);
        phrases += usize::from(!ids.is_empty());
        (text.as_str(), number)
    });
    Ok(Caption::from_segments(lmm.tokenizer(), numbered)?)
}

/// Ids before expansion: the image's tokens are one.
pub(crate) fn unexpanded<T: Copy>(ids: &[T], prepared: &Prepared) -> Vec<T> {
    let layout = &prepared.images[0].layout;
    [&ids[..layout.start + 1], &ids[layout.end()..]].concat()
}
