//! Writing a world to disk in the published formats, in the reference's folder layout (`training.md` §1).
//!
//! ```text
//! OUT/world.json                                       settings and attribution
//! OUT/coco/annotations/{png_coco,panoptic}_<S>2017.json, panoptic_<S>2017/*.png
//! OUT/coco/{refcoco,refcoco+,refcocog}/{instances.json, refs(unc|umd).p}
//! OUT/coco/grefcoco/{instances.json, grefs(unc).json}
//! OUT/coco/{<S>2017,train2014}/*.jpg                   the same pictures under both names
//! OUT/ReasonSeg/<S>/*.{jpg,json}
//! OUT/GranDf/val_test/<S>_gcg_coco_{caption,mask}_gt.json, GranDf/images/*.jpg
//! OUT/viscot/world.json, viscot/cot/world/*.jpg
//! OUT/qa/{mme,mmbench,mmvet,llavabench,pope,gqa,vqav2,ai2d}/, coco/val2014/*.jpg   not of the training split
//! ```

use super::files::Records;
use super::records::Record;
use super::{ATTRIBUTION, Level, Split, WORLD_VERSION, WorldConfig, generate};
use flmm::{Error, Result};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// What `world.json` says: two folders with the same settings hold the same bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// [`WORLD_VERSION`] of the writer.
    pub world_version: u8,
    /// Which split.
    pub split: Split,
    /// Number of scenes.
    pub count: u64,
    /// Seed of the scenes.
    pub seed: u64,
    /// What scenes look like.
    pub config: WorldConfig,
    /// The credit that the licence of the drawings asks for.
    pub attribution: String,
}

/// Writes scenes 0..count of a split below `out`, in all published formats. `progress` is told how many are done.
///
/// `out` appears only when everything is written. An error, with nothing changed, if `out` exists and is neither
/// empty nor a world of the same settings, if `count` is 0, or if a file cannot be written.
pub fn write(
    out: &Path,
    split: Split,
    count: u64,
    seed: u64,
    level: Level,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<()> {
    let config = WorldConfig::new(level);
    let attribution = ATTRIBUTION.to_owned();
    let settings = Settings { world_version: WORLD_VERSION, split, count, seed, config, attribution };
    if count == 0 {
        return Err(Error::request("a world needs at least one scene", "raise the count"));
    }
    check_target(out, &settings)?;
    let folder = Unfinished::beside(out)?;
    let paths = Paths::make(&folder.path, split)?;

    let done = AtomicU64::new(0);
    let records: Result<Vec<Record>> = (0..count)
        .into_par_iter()
        .map(|index| {
            let scene = generate(&settings.config, split, seed, index);
            let record = Record::new(&scene, split, index)?;
            record.write_pictures(&paths)?;
            progress(done.fetch_add(1, Ordering::Relaxed) + 1);
            Ok(record)
        })
        .collect();
    let records = Records::new(split, level, records?);
    records.write(&paths)?;
    if split != Split::Train {
        super::qa::write(&folder.path.join("qa"), &paths.pictures, level, records.all())?;
    }
    write_json(&folder.path.join("world.json"), &settings)?;
    folder.finish(out)
}

/// Refuses a target that holds anything but a world of these settings.
fn check_target(out: &Path, settings: &Settings) -> Result<()> {
    let hint = "name another folder, or remove this one";
    if out.file_name().is_none() {
        return Err(Error::request(format!("{} cannot be replaced by a world", out.display()), hint));
    }
    let mut entries = match fs::read_dir(out) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io(out, error)),
    };
    if entries.next().is_none() {
        return Ok(());
    }
    let found = fs::read(out.join("world.json")).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    match found {
        Some(found) if found == *settings => Ok(()),
        Some(Settings { split, count, seed, config, .. }) => {
            let (split, level) = (split.name(), config.level.number());
            let what = format!("--split {split} --count {count} --seed {seed} --level {level}");
            Err(Error::request(format!("{} holds another world ({what})", out.display()), hint))
        }
        None => Err(Error::request(format!("{} is not empty and not a world", out.display()), hint)),
    }
}

/// A folder under a temporary name, removed again unless it is finished.
struct Unfinished {
    path: PathBuf,
}

impl Unfinished {
    fn beside(out: &Path) -> Result<Self> {
        let path = sibling(out, "unfinished");
        if path.exists() {
            fs::remove_dir_all(&path).map_err(|error| Error::io(&path, error))?;
        }
        make_folder(&path)?;
        Ok(Self { path })
    }

    /// Gives the folder its name. A world of the same settings that has it is replaced.
    fn finish(self, out: &Path) -> Result<()> {
        let old = sibling(out, "old");
        let replaced = out.exists();
        if replaced {
            fs::rename(out, &old).map_err(|error| Error::io(out, error))?;
        }
        fs::rename(&self.path, out).map_err(|error| Error::io(out, error))?;
        if replaced {
            fs::remove_dir_all(&old).map_err(|error| Error::io(&old, error))?;
        }
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // After `finish` the temporary name is gone and there is nothing to remove.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// A hidden name beside `out` that no other process uses.
fn sibling(out: &Path, what: &str) -> PathBuf {
    let name = out.file_name().unwrap_or_default().to_string_lossy();
    out.with_file_name(format!(".{name}.{what}-{}", std::process::id()))
}

/// Where everything goes.
pub(super) struct Paths {
    pub(super) annotations: PathBuf,
    pub(super) panoptic: PathBuf,
    pub(super) pictures: PathBuf,
    pub(super) pictures_2014: PathBuf,
    /// For benchmarks that take their pictures from there; the training split has none.
    pub(super) pictures_val2014: Option<PathBuf>,
    pub(super) coco: PathBuf,
    pub(super) reasonseg: PathBuf,
    pub(super) gcg: PathBuf,
    pub(super) gcg_pictures: PathBuf,
    pub(super) viscot: PathBuf,
    pub(super) viscot_pictures: PathBuf,
}

impl Paths {
    fn make(root: &Path, split: Split) -> Result<Self> {
        let name = split.name();
        let (coco, gcg, viscot) = (root.join("coco"), root.join("GranDf"), root.join("viscot"));
        let annotations = coco.join("annotations");
        let paths = Self {
            panoptic: annotations.join(format!("panoptic_{name}2017")),
            annotations,
            pictures: coco.join(format!("{name}2017")),
            pictures_2014: coco.join("train2014"),
            pictures_val2014: (split != Split::Train).then(|| coco.join("val2014")),
            coco,
            reasonseg: root.join("ReasonSeg").join(name),
            gcg: gcg.join("val_test"),
            gcg_pictures: gcg.join("images"),
            viscot_pictures: viscot.join("cot").join("world"),
            viscot,
        };
        for folder in [
            &paths.panoptic,
            &paths.pictures,
            &paths.pictures_2014,
            &paths.coco.join("refcoco"),
            &paths.coco.join("refcoco+"),
            &paths.coco.join("refcocog"),
            &paths.coco.join("grefcoco"),
            &paths.reasonseg,
            &paths.gcg,
            &paths.gcg_pictures,
            &paths.viscot_pictures,
        ] {
            make_folder(folder)?;
        }
        if let Some(folder) = &paths.pictures_val2014 {
            make_folder(folder)?;
        }
        Ok(paths)
    }
}

pub(super) fn make_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|error| Error::io(path, error))
}

pub(super) fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).map_err(|error| Error::io(path, error))
}

pub(super) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let bytes = serde_json::to_vec(value).map_err(|error| {
        Error::request(format!("cannot write {}: {error}", path.display()), "this is a bug")
    })?;
    write_file(path, &bytes)
}

/// A second name for a picture, unless it has it already; a copy where the file system has no links.
pub(super) fn link(from: &Path, to: &Path) -> Result<()> {
    match fs::hard_link(from, to) {
        Ok(()) => Ok(()),
        // Copying a picture onto a link of itself would empty it.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(_) => fs::copy(from, to).map(drop).map_err(|error| Error::io(to, error)),
    }
}
