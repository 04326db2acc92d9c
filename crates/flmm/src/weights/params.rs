//! Named tensors handed to a module while it is built, with all problems gathered into one error.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard};

use candle_core::{DType, Device, Tensor};
use half::bf16;

use super::packed::{Packed, Stored, WeightFormat, scales_of};
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
    in_layers: bool,
    shared: Arc<Shared>,
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
    /// In few bits.
    Packed(Packed),
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
        let (prefix, format) = (String::new(), WeightFormat::default());
        let params = Self { prefix, format, in_layers: false, shared: Arc::new(shared) };
        rehearsal::note(&params);
        params
    }

    /// The same tensors, of which linear layers keep their matrices in `format`.
    pub fn in_format(&self, format: WeightFormat) -> Self {
        Self { format, ..self.clone() }
    }

    /// The same tensors as those of a decoder's layers, which alone [`WeightFormat::Int4`] keeps in four bits.
    pub(crate) fn in_layers(&self) -> Self {
        Self { in_layers: true, ..self.clone() }
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

    /// As [`Params::get`], for the weight `[outputs, inputs]` of a frozen linear layer: in few bits, if that is its format
    /// or the file has it so. The tensors it is made of are given up: whoever asks for them again gets zeros.
    pub(crate) fn matrix(&self, shape: [usize; 2], name: &str) -> Result<Matrix> {
        if let Some(stored) = Stored::ALL.into_iter().find(|stored| self.has(&stored.bytes_of(name))) {
            return self.stored(stored, shape, name);
        }
        let weight = self.get(&shape, name)?;
        let format = if self.in_layers { self.format } else { self.format.outside_layers() };
        if !frozen_bf16(&[&weight]) || weight.elem_count() == 0 {
            return Ok(Matrix::AsLoaded(weight));
        }
        rehearsal::note_matrix(&weight, format);
        // A stand-in for a tensor that is missing has no numbers of its own.
        if !weight.is_contiguous() || rehearsal::is_running() {
            return Ok(Matrix::AsLoaded(weight));
        }
        let packed = {
            let elements = Elements::of(&weight);
            Packed::quantise(format, elements.get_as::<bf16>()?, shape[1])
        };
        Ok(match packed {
            None => Matrix::AsLoaded(weight),
            Some(packed) => {
                self.give_up_one(name, &shape)?;
                Matrix::Packed(packed)
            }
        })
    }

    /// The matrix `name` as [`Packed::tensors`] has it.
    fn stored(&self, stored: Stored, shape: [usize; 2], name: &str) -> Result<Matrix> {
        let [outputs, inputs] = shape;
        let names = [stored.bytes_of(name), scales_of(name)];
        let shapes = stored.part_sizes(inputs).map(|width| [outputs, width]);
        let [bytes, scales] = [0, 1].map(|part| self.get(&shapes[part], &names[part]));
        let (bytes, scales) = (bytes?, scales?);
        if rehearsal::is_running() || !bytes.is_contiguous() || !scales.is_contiguous() {
            return Ok(Matrix::AsLoaded(stand_in(&shape)?));
        }
        let packed = match (bytes.dtype(), scales.dtype()) {
            (DType::U8, DType::BF16) => Packed::from_parts(stored, &bytes, &scales, shape)?,
            _ => None,
        };
        let packed = packed.ok_or_else(|| {
            let types = format!("{:?} and {:?}", bytes.dtype(), scales.dtype());
            let what = format!(
                "tensors `{}` and its scales: expected U8 and BF16, found {types}",
                self.full(&names[0])
            );
            Error::weights(&self.shared.file, what, "convert the model again, with `flmm convert lmm`")
        })?;
        names.iter().zip(&shapes).try_for_each(|(name, shape)| self.give_up_one(name, shape))?;
        Ok(Matrix::Packed(packed))
    }

    /// Frees the tensor `name` as far as these parameters hold it.
    fn give_up_one(&self, name: &str, shape: &[usize]) -> Result<()> {
        let mut tensors = self.shared.tensors.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        tensors.insert(self.full(name), stand_in(shape)?);
        Ok(())
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
