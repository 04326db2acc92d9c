//! Samples that cannot be used: skipped, counted and listed, until there are too many.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use flmm::{Error, Result};
use rand::Rng;
use serde_json::{Value, json};

use crate::mixture::draws;
use crate::samples::Samples;

/// Name of the list in a run's folder: one JSON object a line with `key` and `error`.
pub const SKIPPED: &str = "skipped.jsonl";

/// How many samples are looked at before their share of broken ones counts.
const FIRST: usize = 1000;

/// How often another sample is drawn for one that cannot be used.
const ATTEMPTS: u64 = 100;

/// Samples of which a few may be broken: another one, drawn at random, takes the place of each.
///
/// Wrong annotations and pictures that are missing or damaged are tolerated up to a share of the samples; a device
/// that fails is not.
pub struct Tolerant<'a, S> {
    inner: &'a dyn Samples<S>,
    seed: u64,
    max_share: f64,
    state: Mutex<State>,
}

/// Someone who has something to tell now and then.
pub(crate) trait News {
    /// What is new since the last call.
    fn news(&self) -> Vec<String>;
}

impl<S> News for Tolerant<'_, S> {
    fn news(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner).news)
    }
}

struct State {
    file: PathBuf,
    skipped: BTreeSet<String>,
    /// Skipped since somebody last asked.
    news: Vec<String>,
    /// Samples asked for in this process.
    seen: usize,
}

impl<'a, S> Tolerant<'a, S> {
    /// `inner`, of which a share of `max_share` may be broken. The list in `dir` is continued; `seed` decides what
    /// takes the place of a broken sample.
    pub fn new(inner: &'a dyn Samples<S>, dir: &Path, max_share: f64, seed: u64) -> Result<Self> {
        let file = dir.join(SKIPPED);
        let listed = match std::fs::read_to_string(&file) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(Error::io(&file, error)),
        };
        let key =
            |line: &str| Some(serde_json::from_str::<Value>(line).ok()?.get("key")?.as_str()?.to_owned());
        let skipped = listed.lines().filter_map(key).collect();
        Ok(Self {
            inner,
            seed,
            max_share,
            state: Mutex::new(State { file, skipped, news: Vec::new(), seen: 0 }),
        })
    }

    /// How many different samples were skipped since the run began.
    pub fn skipped(&self) -> usize {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).skipped.len()
    }

    /// Notes a broken sample; an error if there are too many, or if it cannot be written down.
    fn skip(&self, key: &str, error: &Error) -> Result<()> {
        // What follows tells epochs apart: a picture that is missing in all of them is one.
        let key = key.split('#').next().unwrap_or(key);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.skipped.contains(key) {
            let line = json!({ "key": key, "error": error.to_string() });
            let mut file = std::fs::OpenOptions::new().create(true).append(true).open(&state.file);
            let written = file.as_mut().map_err(|e| std::io::Error::new(e.kind(), e.to_string()));
            written.and_then(|file| writeln!(file, "{line}")).map_err(|e| Error::io(&state.file, e))?;
            state.news.push(format!("skipped {key}: {error}"));
            state.skipped.insert(key.to_owned());
        }
        let of = state.seen.min(self.inner.len()).max(self.inner.len().min(FIRST));
        let allowed = self.max_share * of as f64;
        if state.skipped.len() as f64 <= allowed {
            return Ok(());
        }
        Err(Error::request(
            format!(
                "{} of {of} samples cannot be used, more than {} %; the last one, {key}: {error}",
                state.skipped.len(),
                self.max_share * 100.0
            ),
            format!(
                "see {}; `flmm data check` tells what is missing, `data.max_broken` allows more",
                state.file.display()
            ),
        ))
    }
}

/// Whether an error is about one sample, so that others may still be used.
pub(crate) fn is_about_the_sample(error: &Error) -> bool {
    !matches!(error, Error::Tensor(_) | Error::Weights { .. } | Error::Hub { .. })
}

impl<S> Samples<S> for Tolerant<'_, S> {
    fn len(&self) -> usize {
        self.inner.len()
    }

    fn sample(&self, index: usize, epoch: u64) -> Result<S> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).seen += 1;
        let mut rng = draws(self.seed ^ 0x736b_6970, epoch, index as u64);
        let mut at = index;
        let mut last = None;
        for _ in 0..ATTEMPTS {
            match self.inner.sample(at, epoch) {
                Ok(sample) => return Ok(sample),
                Err(error) if is_about_the_sample(&error) => {
                    self.skip(&self.inner.key(at, epoch), &error)?;
                    last = Some(error);
                }
                Err(error) => return Err(error),
            }
            at = rng.random_range(0..self.inner.len());
        }
        Err(last.unwrap_or_else(|| Error::request("there are no samples", "check the data folder")))
    }

    fn key(&self, index: usize, epoch: u64) -> String {
        self.inner.key(index, epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers, of which some are broken.
    struct Numbers {
        len: usize,
        broken: Vec<usize>,
    }

    impl Samples<usize> for Numbers {
        fn len(&self) -> usize {
            self.len
        }

        fn sample(&self, index: usize, _: u64) -> Result<usize> {
            match self.broken.contains(&index) {
                true => Err(Error::image(format!("number {index}"), "count again")),
                false => Ok(index),
            }
        }
    }

    #[test]
    fn a_few_broken_samples_are_replaced_and_listed_once() {
        let dir = tempfile::tempdir().unwrap();
        let numbers = Numbers { len: 400, broken: vec![3, 77, 200, 201] };
        for epoch in 0..3 {
            let tolerant = Tolerant::new(&numbers, dir.path(), 0.01, 5).unwrap();
            let seen: Vec<usize> = (0..400).map(|i| tolerant.sample(i, epoch).unwrap()).collect();
            let again: Vec<usize> = (0..400).map(|i| tolerant.sample(i, epoch).unwrap()).collect();
            assert_eq!(seen, again);
            assert!(seen.iter().enumerate().all(|(i, &n)| n == i || numbers.broken.contains(&i)));
            assert_eq!(tolerant.skipped(), 4);
        }
        let list = std::fs::read_to_string(dir.path().join(SKIPPED)).unwrap();
        assert_eq!(list.lines().count(), 4);
        assert!(list.contains(r#""error":"cannot use the picture: number 77""#), "{list}");
    }

    #[test]
    fn too_many_broken_samples_stop_the_run() {
        let dir = tempfile::tempdir().unwrap();
        let numbers = Numbers { len: 400, broken: vec![3, 77, 200, 201, 300] };
        let tolerant = Tolerant::new(&numbers, dir.path(), 0.01, 5).unwrap();
        let error = (0..400).find_map(|i| tolerant.sample(i, 0).err()).unwrap();
        assert!(error.to_string().contains("5 of 400 samples cannot be used, more than 1 %"), "{error}");
        assert!(error.hint().unwrap().contains("flmm data check"));
        // A device that fails is not the sample's fault.
        let failing = crate::samples::from_fn(5, |_, _| -> Result<usize> {
            Err(candle_core::Error::Msg("out of memory".into()).into())
        });
        let tolerant = Tolerant::new(&failing, dir.path(), 1.0, 5).unwrap();
        assert!(matches!(tolerant.sample(0, 0), Err(Error::Tensor(_))));
    }
}
