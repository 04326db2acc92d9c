//! Checkpoints as users have them: one file, or a folder with one file or with shards and an index.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use super::files;
use super::outline::TensorInfo;
use super::packed::{Stored, WeightFormat};
use super::watch::Watch;
use super::{pth, safetensors};
use crate::error::{Error, Result};

/// Names looked for in a folder, in this order. An index comes before a single file, safetensors before pickles.
pub(crate) const KNOWN: [&str; 7] = [
    "model.safetensors.index.json",
    "model.safetensors",
    "head.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
];

const EXPECTED: &str =
    "give a .safetensors, .bin, .pth or .pt file, or a folder with model.safetensors or pytorch_model.bin";

/// All tensors of the checkpoint at `path`, a file or a folder; floating-point tensors as `dtype` if given.
///
/// A folder is searched for Hugging Face's file names (sharded or not), else it must hold exactly one weight
/// file. The kind of a file follows from its extension.
///
/// # Errors
/// [`Error::Weights`] if there is no such checkpoint, if a shard is missing, or as [`super::load_safetensors`] and
/// [`super::load_pth`].
pub fn load_checkpoint(
    path: impl AsRef<Path>,
    dtype: Option<DType>,
    device: &Device,
) -> Result<HashMap<String, Tensor>> {
    load(path.as_ref(), dtype, device, &mut Watch::everything(&mut |_| {}))
}

/// As [`load_checkpoint`]; `read` receives the number of bytes of every tensor that was read, see
/// [`checkpoint_bytes`].
pub fn load_checkpoint_with(
    path: impl AsRef<Path>,
    dtype: Option<DType>,
    device: &Device,
    read: &mut dyn FnMut(u64),
) -> Result<HashMap<String, Tensor>> {
    load(path.as_ref(), dtype, device, &mut Watch::everything(read))
}

/// As [`load_checkpoint`], without reading the tensors whose names `keep` refuses.
///
/// # Errors
/// As [`load_checkpoint`].
pub fn load_checkpoint_some(
    path: impl AsRef<Path>,
    dtype: Option<DType>,
    device: &Device,
    keep: &dyn Fn(&str) -> bool,
) -> Result<HashMap<String, Tensor>> {
    load(path.as_ref(), dtype, device, &mut Watch { keep, ..Watch::everything(&mut |_| {}) })
}

/// As [`load_checkpoint_with`], in bf16 on the processor; `matrices` become what a converted file has of them, each as soon
/// as it is read, so that not all are ever in memory.
///
/// # Errors
/// As [`load_checkpoint`], and [`Error::Weights`] for a matrix with values that are not finite.
pub(crate) fn load_checkpoint_packed(
    path: &Path,
    matrices: &HashMap<String, WeightFormat>,
    read: &mut dyn FnMut(u64),
) -> Result<HashMap<String, Tensor>> {
    let watch = &mut Watch { matrices: Some(matrices), ..Watch::everything(read) };
    load(path, Some(DType::BF16), &Device::Cpu, watch)
}

fn load(
    path: &Path,
    dtype: Option<DType>,
    device: &Device,
    watch: &mut Watch<'_>,
) -> Result<HashMap<String, Tensor>> {
    if super::rehearsal::is_running() {
        // Where there are no weights, all that is asked for is missing: that is a finding, not a failure.
        let tensors = if find(path).is_ok() { outline(path)? } else { Vec::new() };
        let tensors = super::rehearsal::stand_ins(path, &tensors, dtype, watch.keep)?;
        super::rehearsal::note_checkpoint(path, &tensors);
        return Ok(tensors);
    }
    let file = find(path)?;
    if file.to_string_lossy().ends_with(".index.json") {
        return load_sharded(&file, dtype, device, watch);
    }
    load_file(&file, dtype, device, watch)
}

/// Names, types and shapes of all tensors of the checkpoint at `path`, sorted by name. Only headers are read.
///
/// # Errors
/// As [`load_checkpoint`].
pub fn outline(path: impl AsRef<Path>) -> Result<Vec<TensorInfo>> {
    let file = find(path.as_ref())?;
    let shards = if file.to_string_lossy().ends_with(".index.json") {
        Index::read(&file)?.existing(&file)?
    } else {
        vec![file]
    };
    let mut tensors = Vec::new();
    for shard in &shards {
        tensors.extend(match kind(shard)? {
            Kind::Safetensors => super::safetensors::outline(shard)?,
            Kind::Pickle => super::pth::outline(shard)?,
        });
    }
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(tensors)
}

/// The weight file at `path`, or the one to load of the folder.
fn find(path: &Path) -> Result<PathBuf> {
    let file = if files::is_dir(path) { weight_file(path)? } else { path.to_owned() };
    match files::is_file(&file) {
        true => Ok(file),
        false => Err(Error::weights(&file, "no such file or folder", EXPECTED)),
    }
}

/// The weight files of the checkpoint at `path` without reading them: one, or all shards of an index.
pub fn checkpoint_files(path: impl AsRef<Path>) -> Result<Vec<PathBuf>> {
    let path = path.as_ref();
    let file = if files::is_dir(path) { weight_file(path)? } else { path.to_owned() };
    if !file.to_string_lossy().ends_with(".index.json") {
        return Ok(vec![file]);
    }
    Ok(Index::read(&file)?.shards)
}

/// The size of the checkpoint at `path` in bytes, headers included; 0 where it cannot be told.
pub fn checkpoint_bytes(path: impl AsRef<Path>) -> u64 {
    let files = checkpoint_files(path).unwrap_or_default();
    files.iter().filter_map(|file| Some(std::fs::metadata(file).ok()?.len())).sum()
}

fn load_file(
    file: &Path,
    dtype: Option<DType>,
    device: &Device,
    watch: &mut Watch<'_>,
) -> Result<HashMap<String, Tensor>> {
    match kind(file)? {
        Kind::Safetensors => {
            let mut tensors = HashMap::new();
            safetensors::load_file(file, dtype, device, &mut tensors, watch)?;
            Ok(tensors)
        }
        Kind::Pickle => pth::load_file(file, dtype, device, watch),
    }
}

/// Whether the file's extension is one of those that weights are read from.
pub(crate) fn is_weight_file(path: &Path) -> bool {
    matches!(path.extension().and_then(|e| e.to_str()), Some("safetensors" | "bin" | "pth" | "pt"))
}

/// Whether it is safetensors by its extension.
pub(super) fn is_safetensors(file: &Path) -> bool {
    matches!(kind(file), Ok(Kind::Safetensors))
}

/// The two kinds of weight files.
enum Kind {
    Safetensors,
    Pickle,
}

/// The kind that the file's extension tells.
fn kind(file: &Path) -> Result<Kind> {
    match file.extension().and_then(|e| e.to_str()) {
        Some("safetensors") => Ok(Kind::Safetensors),
        Some("bin" | "pth" | "pt") => Ok(Kind::Pickle),
        _ => Err(Error::weights(file, "the kind of this file cannot be told from its extension", EXPECTED)),
    }
}

/// Loads the shards named by an index and checks that they hold every tensor it lists.
fn load_sharded(
    file: &Path,
    dtype: Option<DType>,
    device: &Device,
    watch: &mut Watch<'_>,
) -> Result<HashMap<String, Tensor>> {
    let index = Index::read(file)?;
    let mut tensors = HashMap::new();
    for shard in &index.existing(file)? {
        for (name, tensor) in load_file(shard, dtype, device, watch)? {
            if tensors.contains_key(&name) {
                let what = format!("tensor `{name}` is also in another shard");
                return Err(Error::weights(shard, what, "remove shards that belong to another download"));
            }
            tensors.insert(name, tensor);
        }
    }
    let is_there = |name: &String| {
        let packed = || Stored::ALL.iter().any(|stored| tensors.contains_key(&stored.bytes_of(name)));
        tensors.contains_key(name) || watch.packs(name) && packed()
    };
    let missing: Vec<&str> =
        index.names.iter().filter(|n| (watch.keep)(n) && !is_there(n)).map(|n| n.as_str()).collect();
    if let Some(first) = missing.first() {
        let what = format!("{} tensors of the index are in no shard, the first is `{first}`", missing.len());
        return Err(Error::weights(
            file,
            what,
            "index and shards do not belong together; download both again",
        ));
    }
    Ok(tensors)
}

/// A `….index.json`: which shard holds which tensor.
struct Index {
    /// Tensor names.
    names: BTreeSet<String>,
    /// Shards, sorted, each once.
    shards: Vec<PathBuf>,
}

impl Index {
    fn read(file: &Path) -> Result<Self> {
        let text = files::read_text(file)?;
        let damaged = |what: String| Error::weights(file, what, "download the index file again");
        let json: serde_json::Value =
            serde_json::from_str(&text).map_err(|e| damaged(format!("not a JSON file: {e}")))?;
        let map = json.get("weight_map").and_then(|m| m.as_object());
        let map = map.ok_or_else(|| damaged("the index has no `weight_map`".to_owned()))?;
        let mut shards = BTreeSet::new();
        for (name, shard) in map {
            // A shard lies beside its index; a name that leads elsewhere is not followed.
            let plain = shard.as_str().filter(|s| Path::new(s).file_name().is_some_and(|f| f == *s));
            let plain =
                plain.ok_or_else(|| damaged(format!("tensor `{name}`: {shard} is not a file name")))?;
            shards.insert(file.with_file_name(plain));
        }
        if shards.is_empty() {
            return Err(damaged("the index lists no tensors".to_owned()));
        }
        Ok(Self { names: map.keys().cloned().collect(), shards: shards.into_iter().collect() })
    }

    /// The shards of the index in `file`, if all are there.
    fn existing(&self, file: &Path) -> Result<Vec<PathBuf>> {
        match self.shards.iter().find(|shard| !files::is_file(shard)) {
            Some(shard) => {
                let what = format!("the index names the shard `{}`, which is not there", shard.display());
                Err(Error::weights(file, what, "download the missing shard"))
            }
            None => Ok(self.shards.clone()),
        }
    }
}

/// The file in `folder` to load.
fn weight_file(folder: &Path) -> Result<PathBuf> {
    if let Some(known) = KNOWN.iter().map(|name| folder.join(name)).find(|file| files::is_file(file)) {
        return Ok(known);
    }
    let mut found = files::list(folder)?;
    found.retain(|path| is_weight_file(path));
    found.sort();
    match found.as_slice() {
        [one] => Ok(one.clone()),
        [] => Err(Error::weights(folder, "no weights in this folder", EXPECTED)),
        [first, second, ..] => {
            let what = format!(
                "{} weight files and no index, for example `{}` and `{}`",
                found.len(),
                first.display(),
                second.display()
            );
            Err(Error::weights(folder, what, "name the file itself, or add the missing index file"))
        }
    }
}
