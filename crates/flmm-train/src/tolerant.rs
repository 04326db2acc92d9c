//! Samples that cannot be used: skipped, counted and listed, until there are too many.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use flmm::{Error, Result};
use rand::Rng;
use serde_json::{Value, json};

use crate::mixture::draws;
use crate::samples::{Order, Samples};

/// Name of the list in a run's folder: one JSON object a line with `step`, `key` and `error`.
pub const SKIPPED: &str = "skipped.jsonl";

/// How many samples are looked at before their share of broken ones counts.
const FIRST: usize = 1000;

/// How often another sample is drawn for one that cannot be used.
const ATTEMPTS: u64 = 100;

/// What is tolerated, and where the run stands.
#[derive(Debug, Clone, Copy)]
pub struct Tolerance {
    /// Share of the samples looked at that may be broken.
    pub max_share: f64,
    /// The order of the run's samples. Its seed also decides what takes the place of a broken one.
    pub order: Order,
    /// Ranks that share the samples; each counts its own.
    pub ranks: usize,
    /// Steps taken before this process.
    pub taken: u64,
}

/// Samples of which a few may be broken: another one, drawn at random, takes the place of each.
///
/// Wrong annotations and pictures that are missing or damaged are tolerated up to a share of the samples; a device
/// that fails is not. A run that goes on counts as one that was never stopped: what was skipped in steps that a
/// checkpoint holds counts, what was skipped later, in steps that are taken again, is forgotten.
pub struct Tolerant<'a, S> {
    inner: &'a dyn Samples<S>,
    tolerance: Tolerance,
    list: PathBuf,
    state: Mutex<State>,
}

/// Someone who has something to tell now and then.
pub(crate) trait News {
    /// What is new since the last call.
    fn news(&self) -> Vec<String>;
}

impl<S> News for Tolerant<'_, S> {
    fn news(&self) -> Vec<String> {
        std::mem::take(&mut self.state().news)
    }
}

struct State {
    skipped: BTreeSet<String>,
    /// Lines of the list that count, if it holds others too: it is rewritten before anything is added.
    rewrite: Option<Vec<String>>,
    /// Skipped since somebody last asked.
    news: Vec<String>,
}

impl<'a, S> Tolerant<'a, S> {
    /// `inner`, as far as `tolerance` goes. The list in `dir` is continued; nothing is written before the first sample is
    /// asked for.
    ///
    /// # Errors
    /// [`Error::Io`] if the list cannot be read.
    pub fn new(inner: &'a dyn Samples<S>, dir: &Path, tolerance: Tolerance) -> Result<Self> {
        let list = dir.join(SKIPPED);
        let text = match std::fs::read_to_string(&list) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(Error::io(&list, error)),
        };
        let counted = |line: &str| {
            let line: Value = serde_json::from_str(line).ok()?;
            let step = line.get("step")?.as_u64()?;
            (step <= tolerance.taken).then(|| line.get("key")?.as_str().map(str::to_owned))?
        };
        let (mut skipped, mut kept) = (BTreeSet::new(), Vec::new());
        for line in text.lines() {
            if let Some(key) = counted(line) {
                skipped.insert(key);
                kept.push(line.to_owned());
            }
        }
        // A line that a killed process has not finished has no end.
        let whole = kept.len() == text.lines().count() && (text.is_empty() || text.ends_with('\n'));
        let state = State { skipped, rewrite: (!whole).then_some(kept), news: Vec::new() };
        Ok(Self { inner, tolerance, list, state: Mutex::new(state) })
    }

    /// How many different samples were skipped since the run began.
    pub fn skipped(&self) -> usize {
        self.state().skipped.len()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops lines of steps that are taken again, as the log does.
    fn rewrite(&self) -> Result<()> {
        let mut state = self.state();
        if let Some(kept) = &state.rewrite {
            flmm::atomic::write(&self.list, |to| kept.iter().try_for_each(|line| writeln!(to, "{line}")))?;
            state.rewrite = None;
        }
        Ok(())
    }

    /// Notes that `key` is broken, which was asked for in place of sample `index` of `epoch`; an error if there are too
    /// many, or if it cannot be written down.
    fn skip(&self, (index, epoch): (usize, u64), key: &str, error: &Error) -> Result<()> {
        let Tolerance { max_share, order, ranks, .. } = self.tolerance;
        let step = order.step_of(index, epoch);
        // What follows tells epochs apart: a picture that is missing in all of them is one.
        let key = key.split('#').next().unwrap_or(key);
        let mut state = self.state();
        if !state.skipped.contains(key) {
            // In one piece: a line is there or not, whenever the process is killed.
            let line = format!("{}\n", json!({ "step": step, "key": key, "error": error.to_string() }));
            let file = OpenOptions::new().create(true).append(true).open(&self.list);
            let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
            written.map_err(|e| Error::io(&self.list, e))?;
            state.news.push(format!("skipped {key}: {error}"));
            state.skipped.insert(key.to_owned());
        }
        let len = self.inner.len();
        let seen =
            usize::try_from(step).unwrap_or(usize::MAX).saturating_mul(order.batch_size) / ranks.max(1);
        let of = seen.min(len).max(len.min(FIRST));
        if state.skipped.len() as f64 <= max_share * of as f64 {
            return Ok(());
        }
        Err(Error::request(
            format!(
                "{} of {of} samples cannot be used, more than {} %; the last one, {key}: {error}",
                state.skipped.len(),
                max_share * 100.0
            ),
            format!(
                "see {}; `flmm data check` tells what is missing, `data.max_broken` allows more",
                self.list.display()
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
        self.rewrite()?;
        let mut rng = draws(self.tolerance.order.seed ^ 0x736b_6970, epoch, index as u64);
        let mut at = index;
        let mut last = None;
        for _ in 0..ATTEMPTS {
            match self.inner.sample(at, epoch) {
                Ok(sample) => return Ok(sample),
                Err(error) if is_about_the_sample(&error) => {
                    self.skip((index, epoch), &self.inner.key(at, epoch), &error)?;
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

    /// One sample a step.
    fn tolerance(len: usize, max_share: f64, taken: u64) -> Tolerance {
        Tolerance { max_share, order: Order { len, batch_size: 1, seed: 5 }, ranks: 1, taken }
    }

    #[test]
    fn a_few_broken_samples_are_replaced_and_listed_once() {
        let dir = tempfile::tempdir().unwrap();
        let numbers = Numbers { len: 400, broken: vec![3, 77, 200, 201] };
        for epoch in 0..3 {
            let tolerant = Tolerant::new(&numbers, dir.path(), tolerance(400, 0.01, 400 * epoch)).unwrap();
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
        let tolerant = Tolerant::new(&numbers, dir.path(), tolerance(400, 0.01, 0)).unwrap();
        let error = (0..400).find_map(|i| tolerant.sample(i, 0).err()).unwrap();
        assert!(error.to_string().contains("5 of 400 samples cannot be used, more than 1 %"), "{error}");
        assert!(error.hint().unwrap().contains("flmm data check"));
        // A device that fails is not the sample's fault.
        let failing = crate::samples::from_fn(5, |_, _| -> Result<usize> {
            Err(candle_core::Error::Msg("out of memory".into()).into())
        });
        let tolerant = Tolerant::new(&failing, dir.path(), tolerance(5, 1.0, 0)).unwrap();
        assert!(matches!(tolerant.sample(0, 0), Err(Error::Tensor(_))));
    }

    /// Takes steps `from..to` of a run on `numbers`; what it saw, how much it skipped and the list.
    fn walk(numbers: &Numbers, dir: &Path, from: u64, to: u64) -> (Vec<usize>, usize, String) {
        let tolerance = tolerance(numbers.len, 0.01, from);
        let tolerant = Tolerant::new(numbers, dir, tolerance).unwrap();
        let jobs = tolerance.order.samples(from).take((to - from) as usize);
        let seen = jobs.map(|(epoch, index)| tolerant.sample(index, epoch).unwrap()).collect();
        (seen, tolerant.skipped(), std::fs::read_to_string(dir.join(SKIPPED)).unwrap_or_default())
    }

    #[test]
    fn a_run_that_goes_on_counts_as_one_that_was_not_stopped() {
        // Those of steps 100, 300 …: 20 of 4000 are few enough; the 15 of 3000 steps would be too many for a process
        // that begins to count anew.
        let order = tolerance(4000, 0.01, 0).order;
        let of_steps = |steps: usize| {
            let broken = order.samples(0).take(steps).skip(99).step_by(200);
            Numbers { len: 4000, broken: broken.map(|(_, index)| index).collect() }
        };
        let numbers = of_steps(4000);
        let (whole, cut) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (expected, skipped, list) = walk(&numbers, whole.path(), 0, 5000);
        assert_eq!(skipped, 20);
        // Killed at step 3500 with a checkpoint of step 3000, and while it wrote a line.
        walk(&numbers, cut.path(), 0, 3500);
        let mut file = OpenOptions::new().append(true).open(cut.path().join(SKIPPED)).unwrap();
        file.write_all(br#"{"step":3501,"ke"#).unwrap();
        let torn = std::fs::read(cut.path().join(SKIPPED)).unwrap();
        let (rest, counted, resumed) = walk(&numbers, cut.path(), 3000, 5000);
        assert_eq!(rest, expected[3000..]);
        assert_eq!((counted, resumed), (skipped, list));
        // What was broken only in steps that are taken again does not count.
        std::fs::write(cut.path().join(SKIPPED), torn).unwrap();
        let healed = of_steps(3000);
        let (_, counted, list) = walk(&healed, cut.path(), 3000, 4000);
        assert_eq!((counted, list.lines().count()), (healed.broken.len(), healed.broken.len()));
    }
}
