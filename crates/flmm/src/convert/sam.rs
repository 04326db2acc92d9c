//! SAM checkpoints (`spec/pipeline.md` §5.4).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};

use super::head::check_values;
use super::{Converted, Staging, listed};
use crate::error::{Error, Result};
use crate::sam::{CONFIG_FILE, Sam, SamConfig, canonical, read_checkpoint};
use crate::weights::{Params, Problem, load_checkpoint_some, outline, rehearse, save_safetensors, stand_ins};

const EXPECTED: &str = "give one of the public files sam_vit_b_01ec64.pth, sam_vit_l_0b3195.pth or sam_vit_h_4b8939.pth, or a \
                        file with the same names; for other sizes put a sam_config.json beside it";

/// Constants of the preprocessing, which the program has itself.
const CONSTANTS: [&str; 2] = ["pixel_mean", "pixel_std"];

/// Reads a SAM checkpoint, checks it, and writes it as safetensors: to `out` itself if that name ends in
/// `.safetensors`, else into the folder `out`. Sizes that the tensors do not tell are written beside it as
/// `sam_config.json`. Values keep their type. Nothing is written on an error.
///
/// # Errors
/// [`Error::Weights`] with every tensor that is missing, misshapen, unexpected or not finite; [`Error::Request`] if
/// `out` holds something and `force` is not given; [`Error::Io`].
pub fn convert_sam(file: &Path, out: &Path, force: bool) -> Result<Converted> {
    let (opened, findings) = rehearse(|| {
        // The tensors here take no memory.
        let (config, tensors) = read_checkpoint(file, &Device::Cpu)?;
        let params = Params::new(file, tensors);
        Sam::load(&config, &params).map(|_| config)
    });
    let config = opened?;
    let mut lines: Vec<String> = findings.problems.iter().map(Problem::to_string).collect();
    let tensors = outline(file)?;
    let unexpected = findings.unused.iter().filter(|name| !CONSTANTS.contains(&name.as_str()));
    lines.extend(unexpected.map(|name| format!("unexpected tensor `{name}`")));
    if !lines.is_empty() {
        return Err(Error::weights(file, listed(lines), EXPECTED));
    }
    // The program sees the sizes of the public files in their tensors.
    let told = stand_ins(file, &tensors, None, &|_| true).and_then(|tensors| {
        let params = Params::new(file, canonical(tensors));
        let (config, _) = rehearse(|| SamConfig::from_tensors(&params, file));
        config
    });
    let config = match told {
        Ok(told) if told == config => None,
        _ => Some(format!("{:#}\n", serde_json::json!(config))),
    };
    let place = Place::new(file, out, config.as_deref(), force)?;
    let read = load_checkpoint_some(file, None, &Device::Cpu, &|name| !CONSTANTS.contains(&name))?;
    let read: BTreeMap<String, Tensor> = canonical(read).into_iter().collect();
    check_values(file, &read)?;
    let converted = Converted {
        file: place.file(),
        tensors: read.len(),
        parameters: findings.used_elements,
        left_out: tensors.len() - read.len(),
        from_sam: Vec::new(),
    };
    place.write(&read, config.as_deref())?;
    Ok(converted)
}

/// Where a SAM is written.
enum Place {
    /// The file itself, and the sizes beside it.
    File(PathBuf),
    /// A folder of its own, and the file's name in it.
    Folder(Staging, PathBuf, String),
}

impl Place {
    fn new(file: &Path, out: &Path, config: Option<&str>, force: bool) -> Result<Self> {
        if out.extension().is_none_or(|extension| extension != "safetensors") {
            let stem = file.file_stem().map_or("sam".into(), |stem| stem.to_string_lossy());
            return Ok(Self::Folder(
                Staging::new(out, force)?,
                out.to_owned(),
                format!("{stem}.safetensors"),
            ));
        }
        if out.exists() && !force {
            let what = format!("`{}` exists", out.display());
            return Err(Error::request(what, "choose another place, or give --force to replace it"));
        }
        // A file of sizes in the same folder would be read for this checkpoint too.
        let beside = out.with_file_name(CONFIG_FILE);
        if let Ok(old) = std::fs::read_to_string(&beside)
            && config.is_none_or(|new| new != old)
            && !(force && config.is_some())
        {
            let what = format!("`{}` has the sizes of another SAM", beside.display());
            return Err(Error::request(what, "choose a folder of its own"));
        }
        Ok(Self::File(out.to_owned()))
    }

    fn file(&self) -> PathBuf {
        match self {
            Self::File(file) => file.clone(),
            Self::Folder(_, out, name) => out.join(name),
        }
    }

    fn write(self, tensors: &BTreeMap<String, Tensor>, config: Option<&str>) -> Result<()> {
        let file = match &self {
            Self::File(file) => file.clone(),
            Self::Folder(staging, _, name) => staging.folder.join(name),
        };
        // Sizes first: a checkpoint without them could not be read, sizes without a checkpoint do no harm.
        if let Some(config) = config {
            let beside = file.with_file_name(CONFIG_FILE);
            crate::atomic::write(beside, |to| to.write_all(config.as_bytes()))?;
        }
        save_safetensors(&file, tensors, &BTreeMap::new())?;
        match self {
            Self::File(_) => Ok(()),
            Self::Folder(staging, out, _) => staging.finish(&out),
        }
    }
}
