//! The feature cache: same training with and without it, and nothing that happens to a disk gives wrong numbers.

#[path = "../common/small_head.rs"]
mod small_head;

mod damage;
mod processes;
mod training;

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use flmm::Result;
use flmm_data::Part;
use flmm_train::cache::{CacheKey, CacheOptions, CachedSamples, FeatureCache, MapValues, Rows, Values};
use flmm_train::{HeadSample, Samples};

fn key(values: Values) -> CacheKey {
    CacheKey {
        lmm: "small".into(),
        lmm_revision: "0123".into(),
        lmm_dtype: "f32".into(),
        sam_revision: "4567".into(),
        preprocessing: 1,
        capture: 1,
        prompt: "Please give me a description of the image.".into(),
        annotations: Default::default(),
        data: serde_json::json!({"sentences": "random", "seed": 1}),
        values,
        maps: MapValues::Same,
        rows: Rows::Phrases,
    }
}

fn name(index: usize) -> String {
    format!("made-up/{index}")
}

fn open(dir: &Path) -> Result<FeatureCache> {
    FeatureCache::open(dir, key(Values::F32), CacheOptions { shard_bytes: 20_000, ..CacheOptions::default() })
}

/// What the frozen models make, and how often they were asked.
struct Made {
    len: usize,
    count: AtomicUsize,
}

impl Made {
    fn new(len: usize) -> Self {
        Self { len, count: AtomicUsize::new(0) }
    }

    fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }
}

impl Samples<HeadSample> for Made {
    fn len(&self) -> usize {
        self.len
    }

    fn sample(&self, index: usize, _: u64) -> Result<HeadSample> {
        self.count.fetch_add(1, Ordering::Relaxed);
        Ok(small_head::sample(index))
    }

    fn key(&self, index: usize, _: u64) -> String {
        name(index)
    }
}

/// Every number of a sample that masks depend on.
fn numbers(sample: &HeadSample) -> Vec<f32> {
    let o = &sample.observation;
    let rows: Vec<u32> = o.phrases.iter().flatten().map(|&row| row as u32).collect();
    let rows = candle_core::Tensor::new(rows, &candle_core::Device::Cpu).unwrap();
    let hidden = o.hidden.index_select(&rows, 1).unwrap();
    [&o.maps, &hidden, &o.sam_embedding, &sample.masks]
        .iter()
        .flat_map(|x| {
            x.to_dtype(candle_core::DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
        })
        .collect()
}

/// Fails unless all `len` samples are what they should be; returns how many had to be made.
fn all_are_right(cache: &FeatureCache, len: usize) -> usize {
    let made = Made::new(len);
    let samples = CachedSamples::new(cache, &made);
    for index in 0..len {
        let sample = samples.sample(index, 0).unwrap();
        assert_eq!(numbers(&sample), numbers(&small_head::sample(index)), "sample {index}");
    }
    made.count()
}

/// A complete cache of `len` samples in several shards.
fn build(dir: &Path, len: usize) {
    let cache = open(dir).unwrap();
    let made = Made::new(len);
    let samples = CachedSamples::new(&cache, &made);
    let all = samples.fill(Part::default(), |_| false, |_, _| std::ops::ControlFlow::Continue(()));
    assert_eq!((all.unwrap().added, made.count()), (len, len));
}
