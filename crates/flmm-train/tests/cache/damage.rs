//! Bytes that change, files that are cut or vanish.

use std::fs;
use std::path::PathBuf;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

const SAMPLES: usize = 9;

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "features" || e == "index"))
        .collect();
    files.sort();
    files
}

#[test]
fn a_changed_byte_anywhere_is_noticed_and_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let pristine = dir.path().join("pristine");
    build(&pristine, SAMPLES);
    let all = files(&pristine);
    assert!(all.len() >= 4, "several shards: {all:?}");
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let (mut rebuilt, mut refused) = (0, 0);
    for round in 0..300 {
        let copy = dir.path().join(format!("copy-{round}"));
        fs::create_dir(&copy).unwrap();
        for file in &all {
            fs::copy(file, copy.join(file.file_name().unwrap())).unwrap();
        }
        let victim = copy.join(all[round % all.len()].file_name().unwrap());
        let mut bytes = fs::read(&victim).unwrap();
        // Half of them in the headers, where most of the structure is.
        let limit = if rng.random() { bytes.len() } else { bytes.len().min(700) };
        let at = rng.random_range(0..limit);
        bytes[at] ^= 1 << rng.random_range(0..8);
        fs::write(&victim, bytes).unwrap();
        match open(&copy) {
            Ok(cache) => {
                let made = all_are_right(&cache, SAMPLES);
                rebuilt += made;
                drop(cache);
                assert_eq!(all_are_right(&open(&copy).unwrap(), SAMPLES), 0, "round {round}: not repaired");
            }
            // The version number in the header is told apart from damage.
            Err(error) => {
                assert!(error.to_string().contains("version"), "{error}");
                refused += 1;
            }
        }
        fs::remove_dir_all(&copy).unwrap();
    }
    assert!(rebuilt > 100, "{rebuilt} samples were made again");
    assert!(refused < 10, "{refused} caches were refused");
}

#[test]
fn the_notice_names_shard_and_record() {
    let dir = tempfile::tempdir().unwrap();
    build(dir.path(), 2);
    let shard = dir.path().join("1-of-1.00000.features");
    let mut bytes = fs::read(&shard).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&shard, bytes).unwrap();
    let cache = open(dir.path()).unwrap();
    let made = Made::new(2);
    let samples = CachedSamples::new(&cache, &made);
    (0..2).for_each(|i| drop(samples.sample(i, 0).unwrap()));
    let notices = cache.take_notices();
    assert_eq!(notices.len(), 1);
    let text = &notices[0];
    assert!(text.contains("1-of-1.00000.features") && text.contains("made-up/1"), "{text}");
    assert!(text.contains("checksum is wrong"), "{text}");
    assert_eq!(made.count(), 1);
}

#[test]
fn cut_empty_and_missing_files_are_survived() {
    let dir = tempfile::tempdir().unwrap();
    let pristine = dir.path().join("pristine");
    build(&pristine, SAMPLES);
    let all = files(&pristine);
    for victim in 0..all.len() {
        for keep in [None, Some(0.0), Some(0.01), Some(0.5), Some(0.99)] {
            let copy = dir.path().join("copy");
            fs::create_dir(&copy).unwrap();
            for (number, file) in all.iter().enumerate() {
                let mut bytes = fs::read(file).unwrap();
                match keep {
                    None if number == victim => continue,
                    Some(keep) if number == victim => bytes.truncate((bytes.len() as f64 * keep) as usize),
                    _ => {}
                }
                fs::write(copy.join(file.file_name().unwrap()), bytes).unwrap();
            }
            all_are_right(&open(&copy).unwrap(), SAMPLES);
            assert_eq!(all_are_right(&open(&copy).unwrap(), SAMPLES), 0, "{:?} {keep:?}", all[victim]);
            fs::remove_dir_all(&copy).unwrap();
        }
    }
}

/// As [`Made`], but sample 1 cannot be made.
struct OneBroken(Made);

impl Samples<HeadSample> for OneBroken {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn sample(&self, index: usize, epoch: u64) -> Result<HeadSample> {
        match (self.0.sample(index, epoch)?, index) {
            (_, 1) => Err(flmm::Error::image("`b.jpg` is damaged", "download it again")),
            (sample, _) => Ok(sample),
        }
    }

    fn key(&self, index: usize, epoch: u64) -> String {
        self.0.key(index, epoch)
    }
}

#[test]
fn what_cannot_be_made_is_known_until_it_can() {
    let dir = tempfile::tempdir().unwrap();
    let broken = OneBroken(Made::new(3));
    let go_on = |_, _| std::ops::ControlFlow::Continue(());
    let text = "cannot use the picture: `b.jpg` is damaged";
    {
        let cache = open(dir.path()).unwrap();
        let samples = CachedSamples::new(&cache, &broken);
        (0..3).for_each(|index| assert_eq!(samples.sample(index, 0).is_err(), index == 1));
    }
    // Another process, with the index and without it.
    for index in [true, false] {
        let shard = dir.path().join("1-of-1.00000.index");
        assert!(index && shard.exists() || std::fs::remove_file(shard).is_ok());
        let cache = open(dir.path()).unwrap();
        let samples = CachedSamples::new(&cache, &broken);
        assert!(samples.missing(0).is_empty());
        assert_eq!(samples.sample(1, 1).unwrap_err().to_string(), text);
        assert_eq!((broken.0.count(), cache.contents().samples), (3, 2));
    }
    // Filling tries again; the same reason is not kept twice.
    let cache = open(dir.path()).unwrap();
    let filled = CachedSamples::new(&cache, &broken).fill(Part::default(), |_| true, go_on).unwrap();
    assert_eq!((filled.added, filled.broken, filled.complete, broken.0.count()), (0, 1, true, 4));
    let bytes = cache.contents().bytes;
    CachedSamples::new(&cache, &broken).fill(Part::default(), |_| true, go_on).unwrap();
    assert_eq!(cache.contents().bytes, bytes);
    // Once the data is mended, the sample counts and the reason does not.
    let mended = Made::new(3);
    let filled = CachedSamples::new(&cache, &mended).fill(Part::default(), |_| false, go_on).unwrap();
    assert_eq!((filled.added, mended.count(), cache.broken(&name(1))), (1, 1, None));
    drop(cache);
    assert_eq!(all_are_right(&open(dir.path()).unwrap(), 3), 0);
}
