//! Writers that are killed, run into a full disk, or meet another one.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

const FOLDER: &str = "FLMM_TEST_CACHE";
const ENDLESS: usize = 100_000;

/// Not a test of its own: what the other tests run as a process. Adds sample after sample and tells every one.
#[test]
fn writer() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    let cache = open(Path::new(&folder)).unwrap();
    let made = Made::new(ENDLESS);
    let samples = CachedSamples::new(&cache, &made);
    for index in 0..ENDLESS {
        samples.sample(index, 0).unwrap();
        cache.take_notices().iter().for_each(|notice| println!("notice {notice}"));
        println!("sample {index}");
        if cache.is_full() {
            return;
        }
    }
}

fn command(dir: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "processes::writer", "--nocapture"]).env(FOLDER, dir).stdout(Stdio::piped());
    command
}

/// The number of the last sample the process told of, after it has ended or been killed.
fn last_told(mut child: Child) -> Option<usize> {
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(std::io::Result::ok);
    let told = lines.filter_map(|line| line.strip_prefix("sample ")?.parse().ok()).last();
    child.wait().unwrap();
    told
}

#[test]
fn a_killed_writer_loses_nothing_it_has_told_of() {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let mut have = 0;
    let mut grown = 0;
    for round in 0..60 {
        let mut child = command(dir.path()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(rng.random_range(1..120)));
        child.kill().unwrap();
        let told = last_told(child).map_or(0, |last| last + 1);
        grown += usize::from(told > have);
        have = have.max(told);
        let cache = open(dir.path()).unwrap();
        for index in 0..have {
            let sample = cache.get(&name(index)).unwrap_or_else(|| panic!("round {round}: {index} is lost"));
            if index + 20 >= have || index % 50 == 0 {
                assert_eq!(numbers(&sample), numbers(&small_head::sample(index)));
            }
        }
        assert!(cache.take_notices().is_empty());
    }
    assert!(grown > 10, "the writer was killed too early to write: {have} samples");
    assert_eq!(all_are_right(&open(dir.path()).unwrap(), have), 0);
}

#[test]
fn a_second_writer_of_the_same_part_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let one = open(dir.path()).unwrap();
    one.insert(&name(0), &small_head::sample(0)).unwrap();
    let two = open(dir.path()).unwrap();
    // Whoever fills a cache is refused before anything is made.
    let made = Made::new(9);
    let samples = CachedSamples::new(&two, &made);
    let all = |samples: &CachedSamples<'_>| {
        samples.fill(Part::default(), |_| true, |_, _| std::ops::ControlFlow::Continue(()))
    };
    let error = all(&samples).unwrap_err();
    assert!(error.to_string().contains("another process is writing part 1-of-1"), "{error}");
    assert!(error.hint().unwrap().contains("--shard"), "{error:?}");
    assert_eq!((made.count(), two.contents().samples), (0, 1));
    // Whoever trains beside it is told once, and goes on.
    let two = open(dir.path()).unwrap();
    let samples = CachedSamples::new(&two, &made);
    for index in 0..3 {
        assert_eq!(numbers(&samples.sample(index, 0).unwrap()), numbers(&small_head::sample(index)));
    }
    let notices = two.take_notices();
    assert_eq!((notices.len(), made.count(), two.contents().samples), (1, 2, 1));
    assert!(notices[0].contains("another process is writing part 1-of-1"), "{notices:?}");
    // When the other has ended, filling goes on.
    drop(one);
    assert_eq!(all(&samples).unwrap().added, 8);
}

/// `ulimit` makes the system refuse longer files, as a full disk does.
#[cfg(unix)]
#[test]
fn a_full_disk_keeps_what_is_there_and_training_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let writer = command(dir.path());
    // Shards end at 20,000 bytes; 16 blocks of 512 or 1024 bytes are less.
    let mut limited = Command::new("sh");
    limited.args(["-c", "trap '' XFSZ; ulimit -f 16; exec \"$0\" \"$@\""]).arg(writer.get_program());
    limited.args(writer.get_args()).env(FOLDER, dir.path());
    let output = limited.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    let notice = text.lines().find(|line| line.contains("notice ")).unwrap();
    assert!(notice.contains("features") && notice.contains("nothing more is added"), "{notice}");
    let told = text.lines().filter(|line| line.contains("sample ")).count();
    let cache = open(dir.path()).unwrap();
    let kept = cache.contents().samples;
    assert!(kept >= 2 && kept < told, "{kept} of {told}");
    assert!(cache.take_notices().is_empty(), "what is there is sound");
    assert_eq!(all_are_right(&cache, kept), 0);
    // With room again, the next writer goes on.
    assert_eq!(all_are_right(&cache, kept + 5), 5);
}
