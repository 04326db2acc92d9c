//! Runs with a feature cache, and building one without training.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use flmm::{Error, Result};
use flmm_data::{ImageStore, Part};

use crate::cache::{CacheOptions, CachedSamples, FeatureCache, Filled, MapValues, Values};
use crate::config::{Config, Mode};
use crate::frozen::Frozen;
use crate::mixture::{DataRevision, Expressions, Mixture};
use crate::observed::Observed;
use crate::run::Models;
use crate::start::begun_with;
use crate::tolerant::{News, is_about_the_sample};
use crate::watch::Watch;

/// Samples whose size is measured before a cache is filled.
pub(crate) const PROBES: usize = 8;

/// Where a feature cache lies, and how it stores numbers.
#[derive(Debug, Clone)]
pub struct FeatureOptions {
    /// Its folder.
    pub dir: PathBuf,
    /// How numbers are stored.
    pub values: Values,
    /// How maps are stored.
    pub maps: MapValues,
}

impl FeatureOptions {
    /// Opens the cache for a run, whose data must be the same in every epoch.
    pub(crate) fn open(
        &self,
        config: &Config,
        frozen: &Frozen,
        mixture: &Mixture,
        revision: &DataRevision,
        part: Part,
    ) -> Result<FeatureCache> {
        if config.mode == Mode::Selector {
            return Err(Error::request(
                "a feature cache is for training a head, not the keyword selector alone",
                "leave --feature-cache out, or train the selector along with the head",
            ));
        }
        if config.data.expressions == Expressions::PerEpoch {
            return Err(Error::request(
                "expressions are drawn anew every epoch, so a feature cache would save nothing",
                "set data.expressions to once, or leave --feature-cache out",
            ));
        }
        let key = frozen.cache_key(config, mixture, revision, (self.values, self.maps))?;
        FeatureCache::open(&self.dir, key, CacheOptions { part, ..CacheOptions::default() })
    }
}

/// Adds what `part` of the training samples lacks to the cache in `options`, and says what it will take before.
///
/// `on_sample(done, of)` is told of every sample; when it breaks, the rest is left for another time.
///
/// # Errors
/// What opening models and data gives; [`Error::Request`] if another process writes this part, or if the disk has not
/// enough room or takes no more.
pub fn build_features(
    config: &Config,
    models: &Models,
    data: &Path,
    options: &FeatureOptions,
    part: Part,
    watch: &mut dyn Watch,
    on_sample: impl FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Filled> {
    watch.stage("reading the annotations");
    let (config, _) = begun_with(config, models)?;
    let images = ImageStore::open(data)?;
    let mixture = Mixture::open(data, "train", &config.data, config.train.seed)?;
    let revision = mixture.revision()?;
    let frozen = Frozen::new(&config, models)?;
    let cache = options.open(&config, &frozen, &mixture, &revision, part)?;
    let before = cache.contents().samples;
    let observed = Observed { frozen: &frozen, mixture: &mixture, images: &images };
    let samples = CachedSamples::new(&cache, &observed);
    if !samples.missing_of(part).is_empty() {
        // Before hours go into samples that another process makes too.
        cache.begin_writing()?;
    }
    watch.stage("measuring samples");
    let estimate = samples.estimate(part, PROBES, is_about_the_sample)?;
    watch.note(&estimate.to_string());
    watch.stage("observing");
    let filled = samples.fill(part, is_about_the_sample, on_sample)?;
    cache.take_notices().iter().for_each(|notice| watch.note(notice));
    // Those that were measured are among them.
    let added = cache.contents().samples - before;
    Ok(Filled { added, ..filled })
}

/// What samples and cache have to tell.
pub(crate) struct Both<'a> {
    pub(crate) samples: &'a dyn News,
    pub(crate) cache: Option<&'a FeatureCache>,
}

impl News for Both<'_> {
    fn news(&self) -> Vec<String> {
        let mut news = self.samples.news();
        news.extend(self.cache.into_iter().flat_map(FeatureCache::take_notices));
        news
    }
}
