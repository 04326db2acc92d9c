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
