//! Named tensors handed to a module while it is built, with all problems gathered into one error.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard};

use candle_core::{DType, Device, Tensor};
use flmm_kernels::Int8Weight;
use half::bf16;
use serde::{Deserialize, Serialize};

use super::rehearsal;
use crate::error::{Error, Result};
use crate::nn::host::{Elements, frozen_bf16};

/// Hands out tensors by name and records which were used, missing or misshapen.
///
/// The tensors may be frozen (mmapped files) or trainable (`Var::as_tensor`): modules do not know which.
/// A module calls [`Params::get`] for every tensor it needs; the owner calls [`Params::finish`] once at the
/// end, which reports *every* problem in one [`Error::Weights`].
#[derive(Clone)]
pub struct Params {
    prefix: String,
    format: WeightFormat,
    shared: Arc<Shared>,
}

/// How the matrices of frozen linear layers are kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WeightFormat {
    /// In the type in which they are loaded.
    #[default]
    AsLoaded,
    /// bf16 on the CPU as eight-bit integers, 128 neighbouring inputs of an output sharing a scale; others as loaded.
    Int8,
}

struct Shared {
    file: PathBuf,
    tensors: RwLock<HashMap<String, Tensor>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    used: BTreeSet<String>,
    problems: Vec<Problem>,
    /// Prefixes below which every tensor must be used, and parts of names that are excepted.
    claims: Vec<(String, &'static [&'static str])>,
}

/// The weight of a frozen linear layer.
#[derive(Debug, Clone)]
pub(crate) enum Matrix {
    /// `[outputs, inputs]`
    AsLoaded(Tensor),
    /// See [`WeightFormat::Int8`].
    Int8(Arc<Int8Weight>),
}

/// A view of one zero: a wrong folder must not cost the memory of a whole model.
fn stand_in(shape: &[usize]) -> Result<Tensor> {
    Ok(Tensor::zeros((), DType::F32, &Device::Cpu)?.broadcast_as(shape)?)
}

/// A tensor that is not as a model needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Its full name.
    pub name: String,
    /// The shape that was asked for.
    pub expected: Vec<usize>,
    /// The shape it has; `None` if there is no such tensor.
    pub found: Option<Vec<usize>>,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, expected, found } = self;
        match found {
            Some(found) => write!(f, "tensor `{name}`: expected shape {expected:?}, found {found:?}"),
            None => write!(f, "tensor `{name}` is missing: expected shape {expected:?}"),
        }
    }
}

impl Params {
    /// Tensors by full name; `file` is what error messages call their origin.
    pub fn new(file: impl AsRef<Path>, tensors: HashMap<String, Tensor>) -> Self {
        let shared =
            Shared { file: file.as_ref().to_owned(), tensors: RwLock::new(tensors), state: Mutex::default() };
        let params =
            Self { prefix: String::new(), format: WeightFormat::default(), shared: Arc::new(shared) };
        rehearsal::note(&params);
        params
    }

    /// The same tensors, of which linear layers keep their matrices in `format`.
    pub fn in_format(&self, format: WeightFormat) -> Self {
        Self { format, ..self.clone() }
    }

    /// The same tensors seen below `name.`.
    pub fn pp(&self, name: impl std::fmt::Display) -> Self {
        Self { prefix: format!("{}{name}.", self.prefix), ..self.clone() }
    }

    /// Whether `name` exists below the prefix.
    pub fn has(&self, name: &str) -> bool {
        self.tensors().contains_key(&self.full(name))
    }

    /// The shape of `name`, for sizes that only the tensors tell.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors().get(&self.full(name)).map(|t| t.dims().to_vec())
    }

    /// The tensor `name` of exactly `shape`.
    ///
    /// A missing or misshapen tensor is recorded and replaced by zeros, so that one pass over the model finds
    /// every problem; [`Params::finish`] turns the record into an error.
    pub fn get(&self, shape: &[usize], name: &str) -> Result<Tensor> {
        let full = self.full(name);
        let mut state = self.shared.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match self.tensors().get(&full) {
            Some(tensor) if tensor.dims() == shape => {
                state.used.insert(full);
                return Ok(tensor.clone());
            }
            other => {
                let found = other.map(|tensor| tensor.dims().to_vec());
                if found.is_some() {
                    state.used.insert(full.clone());
                }
                state.problems.push(Problem { name: full, expected: shape.to_vec(), found });
            }
        }
        stand_in(shape)
    }

    /// As [`Params::get`], for the weight `[outputs, inputs]` of a frozen linear layer in eight bits, if that is its
    /// format. The tensor it is made of is given up: whoever asks for it again gets zeros.
    pub(crate) fn matrix(&self, shape: [usize; 2], name: &str) -> Result<Matrix> {
        let weight = self.get(&shape, name)?;
        // A stand-in for a tensor that is missing has no numbers of its own.
        let fits = frozen_bf16(&[&weight]) && weight.is_contiguous() && weight.elem_count() > 0;
        if self.format == WeightFormat::AsLoaded || !fits || rehearsal::is_running() {
            return Ok(Matrix::AsLoaded(weight));
        }
        let int8 = Int8Weight::quantise(Elements::of(&weight).get_as::<bf16>()?, shape[1]);
        let mut tensors = self.shared.tensors.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        tensors.insert(self.full(name), stand_in(&shape)?);
        Ok(Matrix::Int8(Arc::new(int8)))
    }

    /// Gives up every tensor below the prefix: whoever asks for one again gets zeros.
    pub(crate) fn give_up(&self) -> Result<()> {
        let mut tensors = self.shared.tensors.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        let below = tensors.iter_mut().filter(|(name, _)| name.starts_with(&self.prefix));
        for (_, tensor) in below {
            *tensor = stand_in(tensor.dims())?;
        }
        Ok(())
    }

    fn tensors(&self) -> RwLockReadGuard<'_, HashMap<String, Tensor>> {
        self.shared.tensors.read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Says that every tensor below the prefix is the module's: what nobody asks for there is an error of
    /// [`Params::finish`], because the module would not be the one that was trained (a layer too few, a bias left out).
    /// Names that contain one of `constants` are excepted.
    pub fn claim(&self, constants: &'static [&'static str]) {
        let mut state = self.shared.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        state.claims.push((self.prefix.clone(), constants));
    }

    /// Names below a claimed prefix that were never asked for, sorted.
    fn unexpected(&self) -> Vec<String> {
        let mut unused = self.unused();
        let state = self.shared.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        unused.retain(|name| {
            let claims = state.claims.iter().filter(|(prefix, _)| name.starts_with(prefix.as_str()));
            claims.into_iter().any(|(_, constants)| !constants.iter().any(|part| name.contains(part)))
        });
        unused
    }

    /// Names that were never asked for, sorted.
    pub fn unused(&self) -> Vec<String> {
        let state = self.shared.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let tensors = self.tensors();
        let all: BTreeMap<_, _> = tensors.iter().collect();
        all.into_keys().filter(|name| !state.used.contains(*name)).cloned().collect()
    }

    /// Missing and misshapen tensors so far.
    pub fn problems(&self) -> Vec<Problem> {
        let state = self.shared.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        state.problems.clone()
    }

    /// Every tensor: its name, whether it was asked for, and its number of elements.
    pub(super) fn uses(&self) -> Vec<(String, bool, usize)> {
        let state = self.shared.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let tensors = self.tensors();
        tensors
            .iter()
            .map(|(name, tensor)| (name.clone(), state.used.contains(name), tensor.elem_count()))
            .collect()
    }

    /// What error messages call the tensors' origin.
    pub(super) fn file(&self) -> &Path {
        &self.shared.file
    }

    /// Fails with every missing, misshapen and unexpected tensor in one error; not in a rehearsal
    /// ([`super::rehearse`]).
    pub fn finish(&self, hint: &str) -> Result<()> {
        if rehearsal::is_running() {
            return Ok(());
        }
        let unexpected = self.unexpected();
        let mut lines: Vec<String> = self.problems().iter().map(Problem::to_string).collect();
        lines.extend(unexpected.iter().map(|name| format!("unexpected tensor `{name}`")));
        if lines.is_empty() {
            return Ok(());
        }
        Err(Error::weights(&self.shared.file, lines.join("\n"), hint))
    }

    fn full(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_up_keeps_its_shape_and_nothing_else_changes() -> Result<()> {
        let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu);
        let tensors =
            HashMap::from([("a.b.weight".to_owned(), ones(&[2, 3])?), ("a.bias".to_owned(), ones(&[3])?)]);
        let params = Params::new("test", tensors);
        let kept = params.pp("a").pp("b").get(&[2, 3], "weight")?;
        params.pp("a").pp("b").give_up()?;
        let sum = |tensor: Tensor| Ok::<_, Error>(tensor.sum_all()?.to_scalar::<f32>()?);
        assert_eq!(sum(params.get(&[2, 3], "a.b.weight")?)?, 0.0);
        assert_eq!((sum(params.get(&[3], "a.bias")?)?, sum(kept)?), (3.0, 6.0));
        params.finish("")
    }
}
