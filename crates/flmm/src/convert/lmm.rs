//! LMMs with their matrices in fewer bits.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::DType;

use super::{Staging, listed};
use crate::error::{Error, Result};
use crate::lmm::{self, OpenOptions};
use crate::weights::{
    CheckpointRead, Problem, WeightFormat, checkpoint_files, is_weight_file, load_checkpoint_packed,
    packed_metadata, rehearse, save_safetensors, scales_of,
};

/// What the conversion of an LMM did.
#[derive(Debug, Clone)]
pub struct ConvertedLmm {
    /// Its name in the list of known models.
    pub name: &'static str,
    /// Matrices that were packed.
    pub matrices: usize,
    /// Bytes of all weight files, before and after.
    pub bytes: [u64; 2],
}

/// Writes the folder `out` with the model of the folder `dir` as [`lmm::open_with`] would keep it in memory with `options`:
/// bf16, and matrices in [`OpenOptions::weights`]. Opened with the same options, it computes the same numbers, bit for bit.
///
/// What becomes of one weight file is in memory at a time. Configuration and tokenizer are copied; weight files that the model does not
/// need are not. Nothing is written on an error.
///
/// # Errors
/// What opening the model gives, all missing tensors in one error; [`Error::Weights`] for values that are not finite;
/// [`Error::Request`] if the model was converted before, and if `out` holds something and `force` is not given;
/// [`Error::Io`].
pub fn convert_lmm(dir: &Path, options: &OpenOptions, out: &Path, force: bool) -> Result<ConvertedLmm> {
    if let Some(found) = lmm::converted_to(dir)? {
        let what =
            format!("`{}` was converted to {} before", dir.display(), found.name().unwrap_or_default());
        return Err(Error::request(what, "give the folder of the model as published"));
    }
    if options.dtype != DType::BF16 || !options.device.is_cpu() {
        return Err(Error::request("models are converted from bf16, on the processor", "choose these"));
    }
    let (opened, findings) = rehearse(|| lmm::open_with(dir, options));
    let name = opened?.spec().name;
    if !findings.problems.is_empty() {
        let lines = findings.problems.iter().map(Problem::to_string).collect();
        return Err(Error::weights(dir, listed(lines), "download the model again"));
    }
    let mut checkpoints = findings.checkpoints;
    // Towers of other folders are read from there as ever.
    checkpoints.retain(|checkpoint| checkpoint.path.starts_with(dir));
    let others = other_files(dir)?;
    let same = |a: &Path, b: &Path| matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b);
    if same(dir, out) {
        return Err(Error::request(
            "a model cannot be converted into its own folder",
            "choose another place",
        ));
    }
    let staging = Staging::new(out, force)?;
    for file in &others {
        copy(&dir.join(file), &staging.folder.join(file))?;
    }
    let (mut matrices, mut bytes) = (0, [0, 0]);
    for checkpoint in &checkpoints {
        let below = checkpoint.path.strip_prefix(dir).unwrap_or(Path::new(""));
        let [packed, before, after] =
            convert_checkpoint(checkpoint, &staging.folder.join(below), options.weights)?;
        matrices += packed as usize;
        bytes = [bytes[0] + before, bytes[1] + after];
    }
    staging.finish(out)?;
    Ok(ConvertedLmm { name, matrices, bytes })
}

/// Files below `dir`, relative to it, that hold no weights.
fn other_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let (mut found, mut folders) = (Vec::new(), vec![PathBuf::new()]);
    while let Some(folder) = folders.pop() {
        let place = dir.join(&folder);
        for entry in std::fs::read_dir(&place).map_err(|e| Error::io(&place, e))? {
            let entry = entry.map_err(|e| Error::io(&place, e))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let path = folder.join(&name);
            // What a download left is hidden.
            if name.starts_with('.') || is_weight_file(&path) || name.ends_with(".index.json") {
                continue;
            }
            // In the hub's cache, files are links.
            if entry.path().is_dir() { folders.push(path) } else { found.push(path) }
        }
    }
    Ok(found)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let folder = to.parent().unwrap_or(to);
    std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    std::fs::copy(from, to).map(drop).map_err(|e| Error::io(from, e))
}

/// Writes a checkpoint into the folder `to`; gives the number of packed matrices, and bytes before and after.
fn convert_checkpoint(from: &CheckpointRead, to: &Path, format: WeightFormat) -> Result<[u64; 3]> {
    let files = checkpoint_files(&from.path)?;
    std::fs::create_dir_all(to).map_err(|e| Error::io(to, e))?;
    let size = |path: &Path| std::fs::metadata(path).map(|data| data.len()).map_err(|e| Error::io(path, e));
    let (mut counts, mut map) = ([0, 0, 0], BTreeMap::new());
    for (number, file) in files.iter().enumerate() {
        let name = match files.len() {
            1 => "model.safetensors".to_owned(),
            all => format!("model-{:05}-of-{all:05}.safetensors", number + 1),
        };
        let tensors: BTreeMap<_, _> =
            load_checkpoint_packed(file, &from.matrices, &mut |_| {})?.into_iter().collect();
        let packed =
            from.matrices.keys().filter(|name| tensors.contains_key(&scales_of(name))).count() as u64;
        let target = to.join(&name);
        save_safetensors(&target, &tensors, &packed_metadata(format))?;
        map.extend(tensors.into_keys().map(|tensor| (tensor, name.clone())));
        counts = [counts[0] + packed, counts[1] + size(file)?, counts[2] + size(&target)?];
    }
    if files.len() > 1 {
        let index = serde_json::json!({ "metadata": { "total_size": counts[2] }, "weight_map": map });
        let text = format!("{index:#}\n");
        crate::atomic::write(to.join("model.safetensors.index.json"), |to| to.write_all(text.as_bytes()))?;
    }
    Ok(counts)
}
