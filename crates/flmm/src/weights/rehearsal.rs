//! Opening a model without reading it: which tensors would it ask for?
//!
//! While a rehearsal runs on a thread, [`super::load_checkpoint`] reads headers only and hands out tensors that take
//! no memory, and [`Params::finish`] lets problems pass. So every loader can be asked what it needs, whatever its
//! family, and none has to describe itself a second time.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, TensorId};

use super::element::elem_count;
use super::outline::TensorInfo;
use super::packed::WeightFormat;
use super::params::{Params, Problem};
use crate::error::{Error, Result};

thread_local! {
    /// What was built and read since the rehearsal on this thread began; `None` without one.
    static RUNNING: RefCell<Option<Noted>> = const { RefCell::new(None) };
}

/// What a rehearsal is told.
#[derive(Default)]
struct Noted {
    built: Vec<Params>,
    /// Checkpoints that were read: where they are, and the names in them by the stand-ins that were handed out.
    checkpoints: Vec<(PathBuf, HashMap<TensorId, String>)>,
    /// Stand-ins that became matrices of linear layers.
    matrices: Vec<(TensorId, WeightFormat)>,
}

/// What a rehearsal found.
#[derive(Debug, Clone, Default)]
pub struct Findings {
    /// Missing and misshapen tensors.
    pub problems: Vec<Problem>,
    /// Tensors that nothing asked for, sorted whatever files they are in.
    pub unused: Vec<String>,
    /// Elements of all tensors that were asked for and are there.
    pub used_elements: usize,
    /// Checkpoints that were read, in the order of reading.
    pub(crate) checkpoints: Vec<CheckpointRead>,
}

/// A checkpoint that was read.
#[derive(Debug, Clone)]
pub(crate) struct CheckpointRead {
    /// The file or folder.
    pub(crate) path: PathBuf,
    /// Of its tensors, by their names in it, those that are matrices of frozen linear layers, and how those are to be kept.
    pub(crate) matrices: HashMap<String, WeightFormat>,
}

/// Which matrices of which checkpoints are packed as soon as they are read.
#[derive(Debug, Clone, Default)]
pub struct Packing(Arc<Vec<CheckpointRead>>);

impl Packing {
    /// What `open` asks for as matrices of linear layers.
    pub(crate) fn of<T>(open: impl FnOnce() -> T) -> Self {
        let (_, findings) = rehearse(open);
        Self(Arc::new(findings.checkpoints))
    }

    /// Those of the checkpoint at `path`.
    pub(crate) fn at(&self, path: &Path) -> Option<&HashMap<String, WeightFormat>> {
        self.0.iter().find(|read| read.path == path).map(|read| &read.matrices)
    }
}

/// Ends the rehearsal even if `open` panics.
struct Guard(Option<Noted>);

impl Drop for Guard {
    fn drop(&mut self) {
        RUNNING.set(self.0.take());
    }
}

/// Runs `open`, which loads a model on this thread, without reading or computing with its weights.
///
/// The tensors of whatever `open` returns are zeros of the right shapes and must not be computed with.
pub fn rehearse<T>(open: impl FnOnce() -> T) -> (T, Findings) {
    let guard = Guard(RUNNING.replace(Some(Noted::default())));
    let result = open();
    let Noted { built, checkpoints, matrices } = RUNNING.take().unwrap_or_default();
    drop(guard);
    // A file may have been looked at more than once, say for its sizes first: a tensor is unused if nobody asked.
    let mut asked: BTreeMap<(PathBuf, String), (bool, usize)> = BTreeMap::new();
    let mut problems = Vec::new();
    for params in built {
        problems.extend(params.problems());
        for (name, used, elements) in params.uses() {
            let entry = asked.entry((params.file().to_owned(), name)).or_insert((false, elements));
            entry.0 |= used;
        }
    }
    let used_elements = asked.values().filter(|(used, _)| *used).map(|(_, elements)| elements);
    let used_elements = used_elements.fold(0, |sum: usize, &elements| sum.saturating_add(elements));
    let mut unused: Vec<_> =
        asked.into_iter().filter(|(_, (used, _))| !used).map(|((_, name), _)| name).collect();
    unused.sort();
    let checkpoints = checkpoints.into_iter().map(|(path, mut names)| {
        let named = matrices.iter().filter_map(|(id, format)| Some((names.remove(id)?, *format)));
        CheckpointRead { matrices: named.collect(), path }
    });
    let checkpoints = checkpoints.collect();
    (result, Findings { problems, unused, used_elements, checkpoints })
}

pub(crate) fn is_running() -> bool {
    RUNNING.with_borrow(Option::is_some)
}

/// Notes that a model is built from `params`.
pub(super) fn note(params: &Params) {
    RUNNING.with_borrow_mut(|running| {
        if let Some(noted) = running {
            noted.built.push(params.clone());
        }
    });
}

/// Notes that `weight` is the matrix of a frozen linear layer, to be kept in `format`.
pub(super) fn note_matrix(weight: &Tensor, format: WeightFormat) {
    RUNNING.with_borrow_mut(|running| {
        if let Some(noted) = running {
            noted.matrices.push((weight.id(), format));
        }
    });
}

/// Notes that the checkpoint at `path` was read as the stand-ins `tensors`.
pub(super) fn note_checkpoint(path: &Path, tensors: &HashMap<String, Tensor>) {
    RUNNING.with_borrow_mut(|running| {
        if let Some(noted) = running {
            let names = tensors.iter().map(|(name, tensor)| (tensor.id(), name.clone()));
            noted.checkpoints.push((path.to_owned(), names.collect()));
        }
    });
}

/// Tensors of the right names and shapes that take no memory.
///
/// # Errors
/// [`Error::Weights`] naming `file` for a claimed shape that no memory could hold.
pub(crate) fn stand_ins(
    file: &Path,
    outline: &[TensorInfo],
    dtype: Option<DType>,
    keep: &dyn Fn(&str) -> bool,
) -> Result<HashMap<String, Tensor>> {
    let stand_in = |info: &TensorInfo| {
        if elem_count(&info.shape).is_none() {
            let what = format!("tensor `{}`: shape {:?} overflows", info.name, info.shape);
            return Err(Error::weights(file, what, "download or copy the file again"));
        }
        let dtype = if info.is_float() { dtype.unwrap_or(DType::F32) } else { DType::I64 };
        let zero = Tensor::zeros((), dtype, &Device::Cpu)?;
        Ok((info.name.clone(), zero.broadcast_as(info.shape.as_slice())?))
    };
    outline.iter().filter(|info| keep(&info.name)).map(stand_in).collect()
}
