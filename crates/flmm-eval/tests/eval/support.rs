//! Worlds, models and silent progress.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use flmm::Grounder;
use flmm::grounder::{ModelPaths, Revision};
use flmm::weights::WeightFormat;
use flmm_data::Part;
use flmm_data::world::{Level, Split, write};
use flmm_eval::run::{RunOptions, Watch};
use flmm_eval::{Rows, Settings};

pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A world of `count` scenes, and the folder it lies in.
pub(crate) fn world(count: u64) -> (tempfile::TempDir, Settings) {
    world_of(Level::Two, count)
}

/// The same of a level.
pub(crate) fn world_of(level: Level, count: u64) -> (tempfile::TempDir, Settings) {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("world");
    write(&data, Split::Val, count, 7, level, &|_| {}).unwrap();
    (folder, Settings { data, ..Settings::default() })
}

/// The model of the repository.
pub(crate) fn tiny() -> Grounder {
    let bundle = ModelPaths::bundle(&repository().join("models/flmm-tiny"));
    Grounder::open(&bundle, &Device::Cpu, DType::F32).unwrap()
}

/// Some revision.
pub(crate) fn revision() -> Revision {
    Revision {
        lmm: "1".into(),
        sam: Some("2".into()),
        head: Some("3".into()),
        vision_towers: Vec::new(),
        dtype: "f32".into(),
        weights: WeightFormat::AsLoaded,
        sam_dtype: Some("f32".into()),
        image_size: None,
    }
}

pub(crate) fn options(out: &Path, limit: usize, rows: Rows) -> RunOptions {
    RunOptions { out: out.to_owned(), limit: Some(limit), shard: Part::default(), rows }
}

/// Counts what it is told; any failure ends the test.
#[derive(Default)]
pub(crate) struct Count {
    pub(crate) done: usize,
}

impl Watch for Count {
    fn begin(&mut self, _task: &str, _done: usize, _total: usize) {}

    fn done(&mut self, _id: &str) {
        self.done += 1;
    }

    fn failed(&mut self, id: &str, error: &flmm::Error) {
        panic!("sample {id}: {error}");
    }
}
