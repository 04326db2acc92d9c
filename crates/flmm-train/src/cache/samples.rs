//! Samples that are read from a cache, and made by the frozen models where it lacks them.

use std::ops::ControlFlow;

use candle_core::Device;
use flmm::{Error, Result};
use flmm_data::Part;

use super::record::{Encoded, encode};
use super::store::FeatureCache;
use crate::head::HeadSample;
use crate::samples::Samples;
use crate::tolerant::is_about_the_sample;

/// Any samples behind a [`FeatureCache`].
///
/// A sample comes out the same whether it was read or just made: the cache's rounding is applied either way. The inner
/// samples are asked only for what the cache lacks, so they may open the frozen models when they are first asked.
/// A sample that cannot be made is kept with the reason and is the same error from then on; [`CachedSamples::fill`] tries
/// it again.
/// Samples that are drawn anew every epoch have new names every epoch; then a cache saves nothing.
pub struct CachedSamples<'a> {
    cache: &'a FeatureCache,
    inner: &'a dyn Samples<HeadSample>,
    device: Device,
}

/// What filling a cache has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Filled {
    /// Samples that were added.
    pub added: usize,
    /// Samples that could not be made.
    pub broken: usize,
    /// Whether all samples that can be made are there: nothing was left for another time.
    pub complete: bool,
}

/// What filling a cache will take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// Samples that are missing.
    pub missing: usize,
    /// Samples in all.
    pub samples: usize,
    /// Bytes of a sample, on average over those that were tried; without its picture.
    pub bytes_per_sample: u64,
    /// Bytes of a picture's SAM embedding.
    pub bytes_per_picture: u64,
    /// Bytes that will be written at most: pictures that samples share are counted once for each.
    pub bytes: u64,
    /// Bytes that are free in the cache's folder, where the system tells.
    pub free: Option<u64>,
}

impl std::fmt::Display for Estimate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let size = |bytes: u64| indicatif::HumanBytes(bytes).to_string();
        write!(
            f,
            "{} of {} samples to add, {} each and {} per picture: at most {}",
            self.missing,
            self.samples,
            size(self.bytes_per_sample),
            size(self.bytes_per_picture),
            size(self.bytes)
        )?;
        self.free.map_or(Ok(()), |free| write!(f, "; {} free", size(free)))
    }
}

impl<'a> CachedSamples<'a> {
    /// `inner`, whose samples are stored in `cache` under their keys.
    pub fn new(cache: &'a FeatureCache, inner: &'a dyn Samples<HeadSample>) -> Self {
        Self { cache, inner, device: Device::Cpu }
    }

    /// The same, whose samples are given on `device`: the cache itself is in memory of the processor.
    pub fn on(self, device: &Device) -> Self {
        Self { device: device.clone(), ..self }
    }

    /// Numbers of the samples of `epoch` of which the cache knows nothing, not even that they cannot be made.
    pub fn missing(&self, epoch: u64) -> Vec<usize> {
        (0..self.inner.len()).filter(|&index| self.lacks(index, epoch)).collect()
    }

    /// The same for the samples of `part` in epoch 0.
    pub fn missing_of(&self, part: Part) -> Vec<usize> {
        part.range(self.inner.len()).filter(|&index| self.lacks(index, 0)).collect()
    }

    fn lacks(&self, index: usize, epoch: u64) -> bool {
        let key = self.inner.key(index, epoch);
        !self.cache.contains(&key) && self.cache.broken(&key).is_none()
    }

    /// Makes a sample and keeps it, or why it cannot be made.
    fn make(&self, index: usize, epoch: u64) -> Result<HeadSample> {
        let key = self.inner.key(index, epoch);
        match self.inner.sample(index, epoch) {
            Ok(sample) => self.cache.insert(&key, &sample),
            Err(error) => {
                if is_about_the_sample(&error) {
                    self.cache.insert_broken(&key, &error.to_string())?;
                }
                Err(error)
            }
        }
    }

    /// How much would be written to complete epoch 0 of `part`, from `probes` samples that are made (and kept). Samples
    /// whose error is `tolerable` are passed over.
    ///
    /// # Errors
    /// The first other error of a sample; [`Error::Request`] if there is not enough room on the disk.
    pub fn estimate(
        &self,
        part: Part,
        probes: usize,
        tolerable: impl Fn(&Error) -> bool,
    ) -> Result<Estimate> {
        let missing = self.missing_of(part);
        let mut estimate = Estimate {
            missing: missing.len(),
            samples: part.range(self.inner.len()).len(),
            bytes_per_sample: 0,
            bytes_per_picture: 0,
            bytes: 0,
            free: fs4::available_space(existing(self.cache.dir())).ok(),
        };
        let count = probes.min(missing.len());
        let tried: Vec<usize> = (0..count).map(|i| missing[i * missing.len() / count]).collect();
        if tried.is_empty() {
            return Ok(estimate);
        }
        let mut measured = 0u64;
        for &index in &tried {
            let sample = match self.sample(index, 0) {
                Ok(sample) => sample,
                // It is told of when it is asked for.
                Err(error) if tolerable(&error) => continue,
                Err(error) => return Err(error),
            };
            measured += 1;
            let Encoded { sample, picture, .. } = encode(&sample, self.cache.key())?;
            estimate.bytes_per_sample += sample.len() as u64;
            estimate.bytes_per_picture = picture.len() as u64;
        }
        estimate.bytes_per_sample /= measured.max(1);
        estimate.bytes = (estimate.bytes_per_sample + estimate.bytes_per_picture) * missing.len() as u64;
        if let Some(free) = estimate.free.filter(|free| *free < estimate.bytes) {
            return Err(Error::request(
                format!(
                    "{}: the feature cache needs {}, but only {} are free",
                    self.cache.dir().display(),
                    indicatif::HumanBytes(estimate.bytes),
                    indicatif::HumanBytes(free)
                ),
                "choose a folder on a larger disk, store narrower values or int8 maps, or cache fewer samples",
            ));
        }
        Ok(estimate)
    }

    /// Adds every sample of `part` that the cache lacks and completes the shard; what is there is passed over. Samples
    /// that could not be made earlier are tried again.
    ///
    /// A sample whose error is `tolerable` is passed over and counted. `on_sample(done, of)` is called after every
    /// sample; when it breaks, the rest is left for another time.
    ///
    /// # Errors
    /// The first other error of a sample; [`Error::Request`] if another process is writing this part, or if the disk
    /// refuses (what was added before stays).
    pub fn fill(
        &self,
        part: Part,
        tolerable: impl Fn(&Error) -> bool,
        mut on_sample: impl FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Filled> {
        let lacks = |index: &usize| !self.cache.contains(&self.inner.key(*index, 0));
        let missing: Vec<usize> = part.range(self.inner.len()).filter(lacks).collect();
        if !missing.is_empty() {
            self.cache.begin_writing()?;
        }
        let mut filled = Filled { added: 0, broken: 0, complete: true };
        for (done, &index) in missing.iter().enumerate() {
            match self.make(index, 0) {
                Ok(_) => filled.added += 1,
                Err(error) if tolerable(&error) => filled.broken += 1,
                Err(error) => return Err(error),
            }
            if self.cache.is_full() {
                return Err(Error::request(
                    format!(
                        "{}: the disk takes no more; the samples that were added before stay",
                        self.cache.dir().display()
                    ),
                    "make room and run the same command again: it goes on where it stopped",
                ));
            }
            if on_sample(done + 1, missing.len()).is_break() {
                filled.complete = done + 1 == missing.len();
                break;
            }
        }
        self.cache.commit()?;
        Ok(filled)
    }
}

impl Samples<HeadSample> for CachedSamples<'_> {
    fn len(&self) -> usize {
        self.inner.len()
    }

    fn sample(&self, index: usize, epoch: u64) -> Result<HeadSample> {
        let key = self.inner.key(index, epoch);
        // Before reading: a sample that turns out to be damaged could be made once, whatever was found before that.
        let broken = self.cache.broken(&key);
        let sample = match (self.cache.get(&key), broken) {
            (Some(sample), _) => sample,
            (None, Some(reason)) => {
                return Err(Error::request(
                    reason,
                    "mend the data, then run `flmm features`: it tries the sample again",
                ));
            }
            (None, None) => self.make(index, epoch)?,
        };
        sample.to_device(&self.device)
    }

    fn key(&self, index: usize, epoch: u64) -> String {
        self.inner.key(index, epoch)
    }
}

/// `path` or the nearest folder above it that exists.
fn existing(path: &std::path::Path) -> &std::path::Path {
    path.ancestors().find(|path| path.exists()).unwrap_or(std::path::Path::new("."))
}
