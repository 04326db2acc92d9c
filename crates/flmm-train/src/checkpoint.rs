//! Checkpoints of a run: complete or absent, and refused by a run with another configuration.
//!
//! `checkpoints/step-N/` holds `head.safetensors` (trained tensors under their published names) and `head.json` (what they
//! do not tell), so that the folder can be used as a grounding head, `optimizer.safetensors` (moments) and `state.json`
//! (everything else).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use flmm::weights::{load_safetensors, save_safetensors};
use flmm::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::digest;
use crate::optim::AdamW;
use crate::start::{HEAD_JSON, TENSORS};

const FORMAT: u32 = 1;
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";

/// The part of a checkpoint that is not tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Version of this layout.
    pub format: u32,
    /// Version of the program that wrote it.
    pub version: String,
    /// Steps taken.
    pub step: u64,
    /// Epoch of the next step, and its number within the epoch: with the seed of `config`, the whole state of
    /// the random generator, which is seeded anew for every epoch and sample.
    pub epoch: u64,
    /// See `epoch`.
    pub position: u64,
    /// Everything that changes what is learnt.
    pub config: Value,
    /// Sums and weights of logged values since the last line of the log.
    pub pending: BTreeMap<String, (f64, f64)>,
    /// SHA-256 of the tensor files, by file name.
    #[serde(default)]
    pub sha256: BTreeMap<String, String>,
}

impl State {
    /// The state after `step` steps.
    pub fn new(
        step: u64,
        steps_per_epoch: u64,
        config: Value,
        pending: BTreeMap<String, (f64, f64)>,
    ) -> Self {
        let per_epoch = steps_per_epoch.max(1);
        Self {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION").into(),
            step,
            epoch: step / per_epoch,
            position: step % per_epoch,
            config,
            pending,
            sha256: BTreeMap::new(),
        }
    }
}

/// Writes `folder/step-N` (through a temporary name) and removes all but the newest `keep` checkpoints. `description` is
/// what its `head.json` says, if it is a whole head.
///
/// On an error, a full disk say, the checkpoints that were there stay and nothing else is left.
pub fn save(
    folder: &Path,
    optimizer: &AdamW,
    state: &State,
    description: Option<&Value>,
    keep: usize,
) -> Result<PathBuf> {
    let name = format!("step-{:07}", state.step);
    let (path, temporary) = (folder.join(&name), folder.join(format!(".{name}.{}.tmp", std::process::id())));
    remove_if_there(&temporary)?;
    let written = write(&temporary, optimizer, state, description).and_then(|()| {
        remove_if_there(&path)?;
        fs::rename(&temporary, &path).map_err(|e| Error::io(&path, e))
    });
    if let Err(error) = written {
        // The first error is the one to tell.
        let _ = fs::remove_dir_all(&temporary);
        return Err(error);
    }
    let all = list(folder)?;
    for (_, old) in &all[..all.len().saturating_sub(keep.max(1))] {
        // Its state goes first: what is half removed when the process is killed does not look complete.
        match fs::remove_file(old.join(STATE)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(old, e)),
            _ => remove_if_there(old)?,
        }
    }
    Ok(path)
}

/// Writes the files of a checkpoint into `folder`, a new one.
fn write(folder: &Path, optimizer: &AdamW, state: &State, description: Option<&Value>) -> Result<()> {
    fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    let vars = optimizer.vars().iter();
    let tensors: BTreeMap<String, Tensor> =
        vars.map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect();
    let metadata = BTreeMap::from([("step".to_owned(), state.step.to_string())]);
    let mut state = state.clone();
    for (file, tensors) in [(TENSORS, &tensors), (OPTIMIZER, &optimizer.state())] {
        save_safetensors(folder.join(file), tensors, &metadata)?;
        state.sha256.insert(file.to_owned(), digest::file(&folder.join(file))?);
    }
    if let Some(description) = description {
        flmm::atomic::write(folder.join(HEAD_JSON), |writer| writeln!(writer, "{description:#}"))?;
    }
    let json = serde_json::to_vec_pretty(&state).map_err(|e| Error::io(folder, e.into()))?;
    flmm::atomic::write(folder.join(STATE), |writer| writer.write_all(&json))
}

/// An error about a checkpoint that was changed or damaged after it was written.
fn damaged(checkpoint: &Path, file: &Path, what: impl std::fmt::Display) -> Error {
    let older = checkpoint.parent().and_then(|folder| list(folder).ok()).unwrap_or_default();
    let older = older.into_iter().rev().map(|(_, path)| path).find(|path| path < &checkpoint.to_owned());
    let hint = match older {
        Some(older) => format!(
            "move `{}` away to go on from `{}`",
            checkpoint.display(),
            older.file_name().unwrap_or_default().to_string_lossy()
        ),
        None => format!("restore it from a copy, or move `{}` away to begin anew", checkpoint.display()),
    };
    Error::config(file, format!("the checkpoint is damaged: {what}"), hint)
}

/// The newest checkpoint in `folder`, if there is one.
pub fn latest(folder: &Path) -> Result<Option<PathBuf>> {
    Ok(list(folder)?.pop().map(|(_, path)| path))
}

/// The steps that the newest checkpoint in `folder` holds; 0 if there is none.
pub(crate) fn steps(folder: &Path) -> Result<u64> {
    Ok(list(folder)?.pop().map_or(0, |(step, _)| step))
}

/// Restores the tensors and moments of `optimizer` from `checkpoint`; nothing changes on an error.
///
/// # Errors
/// [`Error::Config`] naming every key in which the checkpoint's configuration differs from `config`,
/// or saying that it is damaged, [`Error::Weights`] for missing, misshapen or unexpected tensors.
pub fn load(checkpoint: &Path, optimizer: &mut AdamW, config: &Value) -> Result<State> {
    let file = checkpoint.join(STATE);
    let text = fs::read(&file).map_err(|e| Error::io(&file, e))?;
    let state: State = serde_json::from_slice(&text).map_err(|e| damaged(checkpoint, &file, e))?;
    if state.format != FORMAT {
        let what = format!("format {}, expected {FORMAT}", state.format);
        return Err(Error::config(&file, what, "resume with the program version that wrote it"));
    }
    let mut differences = Vec::new();
    differing(&state.config, config, "", &mut differences);
    if !differences.is_empty() {
        return Err(Error::config(
            &file,
            format!("the checkpoint belongs to another configuration:\n{}", differences.join("\n")),
            "resume with the configuration of the checkpoint, or begin a run in another folder",
        ));
    }
    for (name, expected) in &state.sha256 {
        let file = checkpoint.join(name);
        let found = digest::file(&file).map_err(|e| damaged(checkpoint, &file, e))?;
        if found != *expected {
            return Err(damaged(checkpoint, &file, "its content is not what was written"));
        }
    }
    let device = optimizer.vars().values().next().map_or(Device::Cpu, |var| var.device().clone());
    let read = |name: &str| load_safetensors(&[checkpoint.join(name)], None, &device);
    let tensors = read(TENSORS)?;
    let mut problems: Vec<String> = Vec::new();
    for (name, var) in optimizer.vars() {
        match tensors.get(name) {
            Some(t) if t.dims() == var.dims() && t.dtype() == var.dtype() => {}
            Some(t) => problems.push(format!(
                "tensor `{name}`: expected {:?} {:?}, found {:?} {:?}",
                var.dtype(),
                var.dims(),
                t.dtype(),
                t.dims()
            )),
            None => problems.push(format!("tensor `{name}` is missing")),
        }
    }
    let unexpected = tensors.keys().filter(|name| !optimizer.vars().contains_key(*name));
    problems.extend(unexpected.map(|name| format!("unexpected tensor `{name}`")));
    if !problems.is_empty() {
        problems.sort();
        let hint = "resume with the configuration of the checkpoint";
        return Err(Error::weights(checkpoint.join(TENSORS), problems.join("\n"), hint));
    }
    optimizer.restore(&read(OPTIMIZER)?.into_iter().collect(), state.step)?;
    for (name, var) in optimizer.vars() {
        var.set(&tensors[name])?;
    }
    Ok(state)
}

/// Complete checkpoints by step, oldest first.
fn list(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(found),
        Err(e) => return Err(Error::io(folder, e)),
    };
    for entry in entries {
        let path = entry.map_err(|e| Error::io(folder, e))?.path();
        let step = path.file_name().and_then(|name| name.to_str()?.strip_prefix("step-")?.parse().ok());
        if let Some(step) = step
            && path.join(STATE).is_file()
        {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

fn remove_if_there(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(folder, e)),
        _ => Ok(()),
    }
}

/// One line per key whose value differs, as `train.seed: 1 in the checkpoint, 2 now`.
fn differing(old: &Value, new: &Value, key: &str, lines: &mut Vec<String>) {
    if let (Value::Object(old), Value::Object(new)) = (old, new) {
        let names: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
        for name in names {
            let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
            differing(
                old.get(name).unwrap_or(&Value::Null),
                new.get(name).unwrap_or(&Value::Null),
                &key,
                lines,
            );
        }
    } else if old != new {
        lines.push(format!("{key}: {old} in the checkpoint, {new} now"));
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;
    use serde_json::json;

    use super::*;
    use crate::optim::AdamWConfig;

    fn optimizer(value: f32) -> AdamW {
        let var = Var::new(&[value, 2.0], &Device::Cpu).unwrap();
        AdamW::new(BTreeMap::from([("a.weight".to_owned(), var)]), AdamWConfig::default()).unwrap()
    }

    fn state(step: u64) -> State {
        State::new(step, 10, json!({"train": {"seed": 1, "epochs": 2}}), BTreeMap::new())
    }

    #[test]
    fn keeps_the_newest_and_finds_it() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(latest(&folder.path().join("none")).unwrap(), None);
        for step in [9, 100, 20] {
            save(folder.path(), &optimizer(1.0), &state(step), None, 2).unwrap();
        }
        let names: Vec<u64> = list(folder.path()).unwrap().into_iter().map(|(step, _)| step).collect();
        assert_eq!(names, [20, 100]);
        // A folder that was not finished is passed over.
        fs::create_dir(folder.path().join("step-0000999")).unwrap();
        assert!(latest(folder.path()).unwrap().unwrap().ends_with("step-0000100"));
    }

    #[test]
    fn another_configuration_is_refused_by_key() {
        let folder = tempfile::tempdir().unwrap();
        let path = save(folder.path(), &optimizer(1.0), &state(3), None, 1).unwrap();
        let mut other = optimizer(5.0);
        let config = json!({"train": {"seed": 2, "epochs": 2}, "extra": true});
        let message = load(&path, &mut other, &config).unwrap_err().to_string();
        assert!(message.contains("train.seed: 1 in the checkpoint, 2 now"), "{message}");
        assert!(message.contains("extra: null in the checkpoint, true now"), "{message}");
        assert!(!message.contains("epochs"), "{message}");
        assert_eq!(other.vars()["a.weight"].to_vec1::<f32>().unwrap(), [5.0, 2.0]);
        load(&path, &mut other, &state(3).config).unwrap();
        assert_eq!((other.steps(), other.vars()["a.weight"].to_vec1::<f32>().unwrap()), (3, vec![1.0, 2.0]));
    }

    #[test]
    fn damage_is_told_with_the_way_out_and_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        save(folder.path(), &optimizer(1.0), &state(3), None, 2).unwrap();
        let path = save(folder.path(), &optimizer(2.0), &state(4), None, 2).unwrap();
        for file in [TENSORS, OPTIMIZER, STATE] {
            let good = fs::read(path.join(file)).unwrap();
            let mut flipped = good.clone();
            let last = flipped.len() - 2;
            flipped[last] ^= 0x10;
            for bad in [&flipped, &good[..good.len() / 2], &[][..]] {
                fs::write(path.join(file), bad).unwrap();
                let mut other = optimizer(5.0);
                let error = load(&path, &mut other, &state(4).config).unwrap_err();
                assert!(error.to_string().contains("damaged"), "{error}");
                assert!(error.hint().unwrap().contains("go on from `step-0000003`"), "{error:?}");
                assert_eq!(other.vars()["a.weight"].to_vec1::<f32>().unwrap(), [5.0, 2.0]);
            }
            fs::write(path.join(file), &good).unwrap();
        }
        load(&path, &mut optimizer(5.0), &state(4).config).unwrap();
    }

    #[test]
    fn other_tensors_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = save(folder.path(), &optimizer(1.0), &state(3), None, 1).unwrap();
        let var = Var::new(&[1f32], &Device::Cpu).unwrap();
        let vars = BTreeMap::from([("b.weight".to_owned(), var)]);
        let mut other = AdamW::new(vars, AdamWConfig::default()).unwrap();
        let message = load(&path, &mut other, &state(3).config).unwrap_err().to_string();
        assert!(message.contains("tensor `b.weight` is missing"), "{message}");
        assert!(message.contains("unexpected tensor `a.weight`"), "{message}");
    }
}
