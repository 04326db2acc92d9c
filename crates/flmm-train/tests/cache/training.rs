//! Training on cached samples.

use std::ops::ControlFlow;
use std::sync::Mutex;

use super::small_head::{train, train_config};
use super::*;

const SAMPLES: usize = 12;

#[test]
fn a_cache_in_f32_changes_no_bit_and_others_only_rounding() {
    let dir = tempfile::tempdir().unwrap();
    let config = train_config(4, 3);
    let (expected, tensors) = train(&Made::new(SAMPLES), config.clone(), &dir.path().join("plain")).unwrap();
    assert_eq!(expected.len(), 16);

    for (values, maps, tolerance) in [
        (Values::F32, MapValues::Same, 0.0),
        (Values::F16, MapValues::Same, 2e-3),
        (Values::Bf16, MapValues::Same, 1e-2),
        (Values::F16, MapValues::Int8, 1e-2),
    ] {
        let name = format!("{values:?}-{maps:?}");
        let key = CacheKey { maps, ..key(values) };
        let cache = FeatureCache::open(dir.path().join(&name), key.clone(), CacheOptions::default()).unwrap();
        let made = Made::new(SAMPLES);
        let run = dir.path().join("run").join(&name);
        let (steps, same) = train(&CachedSamples::new(&cache, &made), config.clone(), &run).unwrap();
        assert_eq!(made.count(), SAMPLES, "every sample is made once");
        let difference = (expected[0].loss - steps[0].loss).abs() / expected[0].loss;
        assert!(difference <= tolerance, "{name}: {} and {}", expected[0].loss, steps[0].loss);
        // A head this small, learning this fast, amplifies rounding from step to step; the curve is the same.
        let mean =
            |steps: &[flmm_train::Step]| steps.iter().map(|step| step.loss).sum::<f64>() / steps.len() as f64;
        let difference = (mean(&expected) - mean(&steps)).abs() / mean(&expected);
        assert!(difference <= 10.0 * tolerance, "{name}: curves differ by {difference}");
        assert_eq!(tensors == same, values == Values::F32, "{name}");
        drop(cache);

        // Another process finds everything and opens nothing.
        let cache = FeatureCache::open(dir.path().join(&name), key, CacheOptions::default()).unwrap();
        let made = Made::new(SAMPLES);
        let run = dir.path().join("again").join(&name);
        let (again, _) = train(&CachedSamples::new(&cache, &made), config.clone(), &run).unwrap();
        assert_eq!(made.count(), 0, "the frozen models are not asked");
        assert_eq!(again, steps, "{name}: the first epoch sees what later ones see");
    }
}

#[test]
fn pictures_are_stored_once_and_sizes_are_told_before() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path()).unwrap();
    let made = Made::new(40);
    let samples = CachedSamples::new(&cache, &made);
    let estimate = samples.estimate(Part::default(), 8, |_| false).unwrap();
    assert_eq!((estimate.missing, estimate.samples), (40, 40));
    assert!(estimate.free.unwrap() > estimate.bytes);
    samples.fill(Part::default(), |_| false, |_, _| ControlFlow::Continue(())).unwrap();
    let contents = cache.contents();
    assert_eq!((contents.samples, contents.pictures), (40, 20));
    let counted_twice = estimate.bytes_per_picture * 20;
    let ratio = (estimate.bytes - counted_twice) as f64 / contents.bytes as f64;
    assert!((0.8..1.25).contains(&ratio), "estimated {}, is {}", estimate.bytes, contents.bytes);
    assert_eq!(samples.estimate(Part::default(), 8, |_| false).unwrap().bytes, 0);
    let text = estimate.to_string();
    assert!(text.starts_with("40 of 40 samples to add") && text.contains("free"), "{text}");
}

#[test]
fn filling_stops_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let made = Made::new(10);
    let cache = open(dir.path()).unwrap();
    let stop = |done: usize, _| if done == 7 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    assert_eq!(CachedSamples::new(&cache, &made).fill(Part::default(), |_| false, stop).unwrap().added, 7);
    drop(cache);
    let cache = open(dir.path()).unwrap();
    assert_eq!(CachedSamples::new(&cache, &made).fill(Part::default(), |_| false, stop).unwrap().added, 3);
    assert_eq!(all_are_right(&cache, 10), 0);
}

#[test]
fn parts_of_several_writers_join_without_copying() {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = (dir.path().join("here"), dir.path().join("there"));
    for index in 0..3 {
        let part = Part { index, count: 3 };
        let folder = if index == 2 { &there } else { &here };
        let options = CacheOptions { part, ..CacheOptions::default() };
        let cache = FeatureCache::open(folder, key(Values::F32), options).unwrap();
        let made = Made::new(10);
        CachedSamples::new(&cache, &made).fill(part, |_| false, |_, _| ControlFlow::Continue(())).unwrap();
    }
    let cache = open(&here).unwrap();
    assert!(CachedSamples::new(&cache, &Made::new(10)).missing(0).len() >= 3);
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(&there, here.join("machine-3")).unwrap();
        assert_eq!(all_are_right(&open(&here).unwrap(), 10), 0);
    }
}

#[test]
fn another_key_is_refused_by_what_differs() {
    let dir = tempfile::tempdir().unwrap();
    build(dir.path(), 2);
    let other = CacheKey {
        lmm_revision: "89ab".into(),
        data: serde_json::json!({"sentences": "first"}),
        ..key(Values::F16)
    };
    let error = FeatureCache::open(dir.path(), other, CacheOptions::default()).err().unwrap();
    let text = error.to_string();
    for part in [
        "1-of-1.00000.features",
        "lmm_revision: \"0123\" in the cache, \"89ab\" wanted",
        "values",
        "sentences",
    ] {
        assert!(text.contains(part), "{text}");
    }
    assert!(!text.contains("prompt") && error.hint().unwrap().contains("another folder"), "{text}");
    // More rows than wanted are no harm; fewer are.
    let all = CacheKey { rows: Rows::All, ..key(Values::F32) };
    assert!(FeatureCache::open(dir.path(), all, CacheOptions::default()).is_err());
}

#[test]
fn a_sample_that_cannot_be_made_stays_an_error_until_it_is_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path()).unwrap();
    let broken = Broken(Mutex::new(true));
    let samples = CachedSamples::new(&cache, &broken);
    let error = samples.estimate(Part::default(), 1, |_| false).unwrap_err();
    assert!(error.to_string().contains("no picture"), "{error}");
    let known = samples.estimate(Part::default(), 1, |_| false).unwrap();
    assert_eq!((known.missing, known.bytes), (0, 0));
    let elsewhere = tempfile::tempdir().unwrap();
    let empty = open(elsewhere.path()).unwrap();
    assert_eq!(CachedSamples::new(&empty, &broken).estimate(Part::default(), 1, |_| true).unwrap().bytes, 0);
    *broken.0.lock().unwrap() = false;
    let error = samples.sample(0, 0).err().unwrap();
    assert!(error.to_string().contains("no picture"), "{error}");
    assert!(error.hint().unwrap().contains("flmm features"));
    assert_eq!(cache.contents().samples, 0);
    samples.fill(Part::default(), |_| false, |_, _| ControlFlow::Continue(())).unwrap();
    samples.sample(0, 0).unwrap();
    assert_eq!(cache.contents().samples, 1);
}

/// One sample, whose picture is missing at first.
struct Broken(Mutex<bool>);

impl Samples<HeadSample> for Broken {
    fn len(&self) -> usize {
        1
    }

    fn sample(&self, index: usize, _: u64) -> Result<HeadSample> {
        match *self.0.lock().unwrap() {
            true => Err(flmm::Error::request("no picture", "look for it")),
            false => Ok(small_head::sample(index)),
        }
    }

    fn key(&self, index: usize, _: u64) -> String {
        name(index)
    }
}
