//! PyTorch's zip files (`.pth`, `.pt`, `.bin`): a pickle that describes tensors, and one record per storage.

use std::collections::HashMap;
use std::io::Cursor;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use zip::{CompressionMethod, ZipArchive};

use super::element::{Element, elem_count};
use super::mmap::map;
use super::outline::TensorInfo;
use super::pickle::{Id, Pickle, TensorRef, Value};
use super::watch::Watch;
use crate::error::{Error, Result};

/// Largest description (`data.pkl`) that is read. A checkpoint of 10,000 tensors needs about 3 MB.
const MAX_PICKLE: usize = 64 << 20;

/// Where training scripts put the parameters when the file holds more than those.
const NESTED: [&str; 4] = ["state_dict", "model_state_dict", "model", "module"];

const RESAVE: &str = "in Python: `torch.save({k: v.detach().cpu() for k, v in state_dict.items()}, file)`, or save as safetensors";
const DAMAGED: &str = "download or copy the file again";

/// All tensors of the PyTorch file `file` by name.
///
/// The file is a dictionary of tensors, plain or nested under `state_dict` (`spec/pipeline.md` §7); entries that
/// are not tensors are left out. Storage offsets, strides and shared storages are honoured. Nothing in the file
/// is executed. The file is mapped, every size is checked against it before memory is taken, and floating-point
/// tensors are converted to `dtype` one at a time; integer buffers keep their type.
///
/// # Errors
/// [`Error::Weights`] naming the file and what is wrong: not a zip file, truncated, a Python object or a pickle
/// opcode that tensors do not need, a view outside its storage, or no tensor at all.
pub fn load_pth(
    file: impl AsRef<Path>,
    dtype: Option<DType>,
    device: &Device,
) -> Result<HashMap<String, Tensor>> {
    load_file(file.as_ref(), dtype, device, &mut Watch::everything(&mut |_| {}))
}

/// The tensors of a file that `watch` keeps.
pub(super) fn load_file(
    file: &Path,
    dtype: Option<DType>,
    device: &Device,
    watch: &mut Watch<'_>,
) -> Result<HashMap<String, Tensor>> {
    let bytes = map(file)?;
    let mut read = bytes.releasing(watch.read);
    load_from(&bytes, file, dtype, device, &mut Watch { read: &mut read, ..*watch })
}

/// Names, types and shapes of a file's tensors, from its description.
pub(super) fn outline(file: &Path) -> Result<Vec<TensorInfo>> {
    let bytes = map(file)?;
    let pickle = describe(&Archive::open(&bytes, file)?, file)?;
    let entries = parameters(&pickle).map_err(|what| Error::weights(file, what, RESAVE))?;
    let info = |(name, view): (String, &TensorRef)| TensorInfo {
        name,
        dtype: view.storage.element.name().to_owned(),
        shape: view.shape.clone(),
    };
    Ok(entries.into_iter().map(info).collect())
}

/// As [`load_pth`], from bytes at hand; `name` is what errors call them.
pub fn load_pth_bytes(
    bytes: &[u8],
    name: impl AsRef<Path>,
    dtype: Option<DType>,
    device: &Device,
) -> Result<HashMap<String, Tensor>> {
    load_from(bytes, name.as_ref(), dtype, device, &mut Watch::everything(&mut |_| {}))
}

fn describe(archive: &Archive<'_>, file: &Path) -> Result<Pickle> {
    Pickle::read(archive.pickle).map_err(|what| Error::weights(file, what, RESAVE))
}

fn load_from(
    bytes: &[u8],
    file: &Path,
    dtype: Option<DType>,
    device: &Device,
    watch: &mut Watch<'_>,
) -> Result<HashMap<String, Tensor>> {
    let archive = Archive::open(bytes, file)?;
    let pickle = describe(&archive, file)?;
    let entries = parameters(&pickle).map_err(|what| Error::weights(file, what, RESAVE))?;

    // Two names of one view share a tensor. What remains can be larger than the file only by overlapping views.
    let mut views: HashMap<&TensorRef, Tensor> = HashMap::new();
    let mut budget = bytes.len().saturating_mul(4);
    let mut tensors = HashMap::with_capacity(entries.len());
    for (name, view) in entries.into_iter().filter(|(name, _)| (watch.keep)(name)) {
        let tensor = match views.get(view) {
            Some(tensor) => tensor.clone(),
            None => {
                let tensor = archive
                    .tensor(view, &mut budget, dtype, device)
                    .map_err(|e| e.into_error(file, &name))?;
                if !watch.packs(&name) {
                    views.insert(view, tensor.clone());
                }
                (watch.read)((tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64);
                tensor
            }
        };
        // As in Python, a later entry of the same name replaces an earlier one.
        tensors.extend(watch.made(name, tensor, file)?);
    }
    Ok(tensors)
}

/// The dictionary of tensors that the pickle describes, or why there is none.
fn parameters(pickle: &Pickle) -> Result<Vec<(String, &TensorRef)>, String> {
    let mut found: &[(Id, Id)] = match pickle.value(pickle.root) {
        Value::Dict(items) => items,
        Value::Tensor(_) => {
            return Err("the file holds one tensor without a name, expected a dictionary".into());
        }
        _ => return Err("the file does not hold a dictionary of tensors".into()),
    };
    // A checkpoint can wrap a model that wraps its parameters; deeper nesting is not seen in practice.
    for _ in 0..3 {
        let inner = NESTED.iter().find_map(|wanted| {
            found.iter().find_map(|&(key, value)| match (pickle.value(key), pickle.value(value)) {
                (Value::Str(key), Value::Dict(items)) if key == wanted => Some(items.as_slice()),
                _ => None,
            })
        });
        match inner {
            Some(items) => found = items,
            None => break,
        }
    }
    let mut tensors = Vec::new();
    let mut others = Vec::new();
    for &(key, value) in found {
        match (pickle.value(key), pickle.value(value)) {
            (Value::Str(name), Value::Tensor(tensor)) => tensors.push((name.clone(), tensor)),
            (Value::Str(name), _) => others.push(name.as_str()),
            _ => {}
        }
    }
    if tensors.is_empty() {
        others.truncate(8);
        return Err(format!("the file's dictionary holds no tensors (keys: {})", others.join(", ")));
    }
    Ok(tensors)
}

/// The parts of a zip file that matter, as slices of it.
struct Archive<'a> {
    pickle: &'a [u8],
    /// Records below `data/` by name.
    records: HashMap<String, &'a [u8]>,
}

impl<'a> Archive<'a> {
    fn open(bytes: &'a [u8], file: &Path) -> Result<Self> {
        if !bytes.starts_with(b"PK") {
            let (what, hint) = if bytes.starts_with(&[0x80, 0x02, 0x8a, 0x0a]) {
                ("this is PyTorch's old format from before version 1.6, which is not supported", RESAVE)
            } else if bytes.starts_with(b"version https://git-lfs") {
                (
                    "this is a Git LFS pointer, not the file it points to",
                    "fetch it, for example with `git lfs pull`",
                )
            } else {
                ("not a PyTorch file (no zip archive)", DAMAGED)
            };
            return Err(Error::weights(file, what, hint));
        }
        let broken = |e: zip::result::ZipError| {
            Error::weights(file, format!("the zip archive is truncated or damaged: {e}"), DAMAGED)
        };
        let mut zip = ZipArchive::new(Cursor::new(bytes)).map_err(broken)?;
        let mut pickle = None;
        let mut records = HashMap::new();
        let mut byte_order = None;
        for index in 0..zip.len() {
            let entry = zip.by_index_raw(index).map_err(broken)?;
            let name = entry.name().map_err(broken)?.into_owned();
            // Nothing is unpacked, so such a name does no harm here; but no honest writer makes it.
            if name.starts_with('/')
                || name.contains(['\\', '\0'])
                || name.split('/').any(|part| part == "..")
            {
                let what = format!("record `{}` leads out of the archive", name.escape_debug());
                return Err(Error::weights(file, what, "do not use this file: it was made to do harm"));
            }
            // torch.save puts everything in one folder, named after the file.
            let Some((_, inner)) = name.split_once('/') else { continue };
            let record = inner.strip_prefix("data/");
            if record.is_none() && inner != "data.pkl" && inner != "byteorder" {
                continue;
            }
            if entry.compression() != CompressionMethod::Stored || entry.encrypted() {
                let what = format!("record `{name}` is compressed or encrypted, which PyTorch never does");
                return Err(Error::weights(file, what, RESAVE));
            }
            let slice = entry.data_start().and_then(|start| {
                let start = usize::try_from(start).ok()?;
                let end = start.checked_add(usize::try_from(entry.size()).ok()?)?;
                bytes.get(start..end)
            });
            let slice = slice.ok_or_else(|| {
                let what = format!("truncated: record `{name}` reaches beyond the end of the file");
                Error::weights(file, what, DAMAGED)
            })?;
            match record {
                Some(key) => drop(records.insert(key.to_owned(), slice)),
                None if inner == "data.pkl" => pickle = Some(slice),
                None => byte_order = Some(slice),
            }
        }
        if byte_order.is_some_and(|order| order != b"little") {
            return Err(Error::weights(file, "the file was written on a big-endian machine", RESAVE));
        }
        let pickle = pickle.ok_or_else(|| {
            Error::weights(file, "the zip archive has no `data.pkl`: not a PyTorch checkpoint", RESAVE)
        })?;
        if pickle.len() > MAX_PICKLE {
            let what = format!("its description is {} bytes long (limit {MAX_PICKLE})", pickle.len());
            return Err(Error::weights(file, what, RESAVE));
        }
        Ok(Self { pickle, records })
    }

    /// Reads one view; `budget` is the number of bytes that may still be taken for tensors.
    fn tensor(
        &self,
        view: &TensorRef,
        budget: &mut usize,
        dtype: Option<DType>,
        device: &Device,
    ) -> Result<Tensor, Fault> {
        let Storage { element, bytes } = self.storage(view)?;
        let size = element.size();
        if view.shape.len() != view.strides.len() {
            return Err(Fault::new(format!("{} axes but {} strides", view.shape.len(), view.strides.len())));
        }
        let count = elem_count(&view.shape).and_then(|n| n.checked_mul(size));
        let count = count.ok_or_else(|| Fault::new(format!("shape {:?} overflows", view.shape)))?;
        if count == 0 {
            return Ok(element.tensor(&[], &view.shape, dtype, device)?);
        }
        let end = last_element(view).and_then(|last| last.checked_add(1)?.checked_mul(size));
        if end.is_none_or(|end| end > bytes.len()) {
            let found = bytes.len() / size;
            return Err(Fault::new(format!(
                "shape {:?} with strides {:?} at offset {} reaches beyond its storage of {found} elements",
                view.shape, view.strides, view.offset
            )));
        }
        *budget = budget.checked_sub(count).ok_or_else(|| {
            Fault::new(
                "the tensors overlap so much that they would need many times the file's size".to_owned(),
            )
        })?;
        let bytes = &bytes[view.offset * size..];
        if is_contiguous(view) {
            return Ok(element.tensor(&bytes[..count], &view.shape, dtype, device)?);
        }
        Ok(element.tensor(&gather(bytes, size, count, view), &view.shape, dtype, device)?)
    }

    fn storage(&self, view: &TensorRef) -> Result<Storage<'a>, Fault> {
        let storage = &view.storage;
        let bytes = *self
            .records
            .get(&storage.key)
            .ok_or_else(|| Fault::new(format!("its storage `data/{}` is not in the file", storage.key)))?;
        let needed = storage.count.checked_mul(storage.element.size());
        if needed.is_none_or(|needed| needed > bytes.len()) {
            return Err(Fault::new(format!(
                "its storage should have {} elements of {} bytes, but the record has {} bytes",
                storage.count,
                storage.element.size(),
                bytes.len()
            )));
        }
        Ok(Storage { element: storage.element, bytes })
    }
}

struct Storage<'a> {
    element: Element,
    bytes: &'a [u8],
}

/// What is wrong with one tensor, before its name is known.
enum Fault {
    What(String),
    Other(Error),
}

impl Fault {
    fn new(what: String) -> Self {
        Self::What(what)
    }

    fn into_error(self, file: &Path, name: &str) -> Error {
        match self {
            Self::What(what) => Error::weights(file, format!("tensor `{name}`: {what}"), DAMAGED),
            Self::Other(error) => error,
        }
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

/// The highest element index of a view with at least one element, unless it overflows.
fn last_element(view: &TensorRef) -> Option<usize> {
    view.shape
        .iter()
        .zip(&view.strides)
        .try_fold(view.offset, |last, (&d, &stride)| last.checked_add((d - 1).checked_mul(stride)?))
}

/// Whether the elements lie one after the other in row-major order; the stride of an axis of length 1 is free.
fn is_contiguous(view: &TensorRef) -> bool {
    let mut expected = 1;
    for (&d, &stride) in view.shape.iter().zip(&view.strides).rev() {
        if d != 1 && stride != expected {
            return false;
        }
        expected *= d;
    }
    true
}

/// Copies a strided view into row-major order. `bytes` begins at the view's offset and holds all of it.
fn gather(bytes: &[u8], size: usize, count: usize, view: &TensorRef) -> Vec<u8> {
    let mut out = Vec::with_capacity(count);
    let mut index = vec![0; view.shape.len()];
    let mut at = 0;
    while out.len() < count {
        out.extend_from_slice(&bytes[at * size..(at + 1) * size]);
        for axis in (0..index.len()).rev() {
            index[axis] += 1;
            at += view.strides[axis];
            if index[axis] < view.shape[axis] {
                break;
            }
            at -= view.strides[axis] * view.shape[axis];
            index[axis] = 0;
        }
    }
    out
}
