//! Safetensors files: mapped, checked, converted tensor by tensor, written atomically.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use safetensors::{SafeTensorError, SafeTensors};

use super::element::{Element, elem_count};
use super::mmap::map;
use super::outline::TensorInfo;
use super::watch::Watch;
use crate::atomic;
use crate::error::{Error, Result};

/// Largest header that is read or written, in bytes. The format itself has the same limit.
pub const MAX_HEADER: usize = 100_000_000;

const DAMAGED: &str = "download or copy the file again; if it stays like this, its writer is at fault";

/// All tensors of `files` by name.
///
/// The files are mapped, never read as a whole, and floating-point tensors are converted to `dtype` one at a
/// time, so memory stays near the size of the result. Integer tensors keep their type; types that candle lacks
/// (bool, i8, u16) are widened.
///
/// # Errors
/// [`Error::Weights`] naming the file if it is truncated, if its header is damaged or larger than
/// [`MAX_HEADER`], if its offsets overlap or leave the file, if a tensor has a type that is not supported, or if
/// two files hold a tensor of the same name.
pub fn load_safetensors(
    files: &[PathBuf],
    dtype: Option<DType>,
    device: &Device,
) -> Result<HashMap<String, Tensor>> {
    let mut tensors = HashMap::new();
    for file in files {
        load_file(file, dtype, device, &mut tensors, &mut Watch::everything(&mut |_| {}))?;
    }
    Ok(tensors)
}

/// Adds the tensors of one file that `watch` keeps to `tensors`.
pub(super) fn load_file(
    file: &Path,
    dtype: Option<DType>,
    device: &Device,
    tensors: &mut HashMap<String, Tensor>,
    watch: &mut Watch<'_>,
) -> Result<()> {
    let bytes = map(file)?;
    let mut read = bytes.releasing(watch.read);
    load_from(&bytes, file, dtype, device, tensors, &mut Watch { read: &mut read, ..*watch })
}

/// Names, types and shapes of a file's tensors, from its header.
pub(super) fn outline(file: &Path) -> Result<Vec<TensorInfo>> {
    let bytes = map(file)?;
    check_frame(&bytes, file)?;
    let views = SafeTensors::deserialize(&bytes).map_err(|e| explain(e, &bytes, file))?;
    let info = |(name, view): (&str, safetensors::tensor::TensorView<'_>)| TensorInfo {
        name: name.to_owned(),
        dtype: Element::from_safetensors(view.dtype())
            .map_or_else(|| format!("{:?}", view.dtype()), |element| element.name().to_owned()),
        shape: view.shape().to_vec(),
    };
    Ok(views.iter().map(info).collect())
}

/// As [`load_safetensors`], from bytes at hand; `name` is what errors call them.
pub fn load_safetensors_bytes(
    bytes: &[u8],
    name: impl AsRef<Path>,
    dtype: Option<DType>,
    device: &Device,
) -> Result<HashMap<String, Tensor>> {
    let mut tensors = HashMap::new();
    load_from(bytes, name.as_ref(), dtype, device, &mut tensors, &mut Watch::everything(&mut |_| {}))?;
    Ok(tensors)
}

/// The free-form `__metadata__` of a safetensors file, sorted; empty if it has none.
pub fn safetensors_metadata(file: impl AsRef<Path>) -> Result<BTreeMap<String, String>> {
    let file = file.as_ref();
    let bytes = map(file)?;
    check_frame(&bytes, file)?;
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| explain(e, &bytes, file))?;
    Ok(header.metadata().clone().unwrap_or_default().into_iter().collect())
}

fn load_from(
    bytes: &[u8],
    file: &Path,
    dtype: Option<DType>,
    device: &Device,
    tensors: &mut HashMap<String, Tensor>,
    watch: &mut Watch<'_>,
) -> Result<()> {
    check_frame(bytes, file)?;
    let views = SafeTensors::deserialize(bytes).map_err(|e| explain(e, bytes, file))?;
    // In the order of the file: one sweep over the disk.
    let mut views: Vec<_> = views.iter().filter(|(name, _)| (watch.keep)(name)).collect();
    views.sort_by_key(|(_, view)| view.data().as_ptr());
    for (name, view) in views {
        let Some(element) = Element::from_safetensors(view.dtype()) else {
            let what = format!("tensor `{name}` has the type {:?}, which is not supported", view.dtype());
            return Err(Error::weights(file, what, "save the tensor as f32, f16 or bf16"));
        };
        // The reader has compared these already; a tensor must never be built from a wrong count of bytes.
        let expected = elem_count(view.shape()).and_then(|n| n.checked_mul(element.size()));
        if expected != Some(view.data().len()) {
            let what = format!("tensor `{name}`: shape {:?} does not fit its bytes", view.shape());
            return Err(Error::weights(file, what, DAMAGED));
        }
        let tensor = element.tensor(view.data(), view.shape(), dtype, device)?;
        for (made, tensor) in watch.made(name.to_owned(), tensor, file)? {
            if tensors.insert(made, tensor).is_some() {
                let what = format!("tensor `{name}` is also in another of the files");
                return Err(Error::weights(file, what, "load each shard once and remove stale shards"));
            }
        }
        (watch.read)(view.data().len() as u64);
    }
    Ok(())
}

/// Checks the length prefix and the header's size against the file before anything is allocated.
fn check_frame(bytes: &[u8], file: &Path) -> Result<()> {
    let Some((prefix, rest)) = bytes.split_first_chunk::<8>() else {
        let what = format!("not a safetensors file: only {} bytes long", bytes.len());
        return Err(Error::weights(file, what, DAMAGED));
    };
    if bytes.starts_with(b"version https://git-lfs") {
        let hint = "fetch the real file, for example with `git lfs pull`";
        return Err(Error::weights(file, "this is a Git LFS pointer, not the file it points to", hint));
    }
    let header = u64::from_le_bytes(*prefix);
    if header > MAX_HEADER as u64 {
        let what = format!("not a safetensors file: its header would be {header} bytes (limit {MAX_HEADER})");
        return Err(Error::weights(file, what, DAMAGED));
    }
    if header > rest.len() as u64 {
        let what = format!("truncated: the header needs {header} bytes, the file has {} left", rest.len());
        return Err(Error::weights(file, what, DAMAGED));
    }
    Ok(())
}

/// The reader's error in words that name the file and what to do.
fn explain(error: SafeTensorError, bytes: &[u8], file: &Path) -> Error {
    let what = match error {
        SafeTensorError::MetadataIncompleteBuffer => {
            format!("truncated or too long: {} bytes do not match the sizes in the header", bytes.len())
        }
        SafeTensorError::InvalidOffset(name) => {
            format!("tensor `{name}`: its offsets overlap or leave a gap")
        }
        SafeTensorError::TensorInvalidInfo => "a tensor's shape does not fit its offsets".to_owned(),
        other => format!("damaged header: {other}"),
    };
    Error::weights(file, what, DAMAGED)
}

/// Writes `tensors` to `path` atomically, each in its own type, with free-form `metadata` in the header.
///
/// The same tensors and metadata give the same bytes. Tensors of wider types come first, then by name, so that
/// every tensor is aligned to its element size.
///
/// # Errors
/// [`Error::Weights`] for a tensor whose type the format (or flmm) lacks; [`Error::Io`] if the disk refuses.
pub fn save_safetensors(
    path: impl AsRef<Path>,
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    save_safetensors_as(path, tensors, None, metadata)
}

/// As [`save_safetensors`]; floating-point tensors are converted to `dtype` (say [`DType::F16`]) on the way, one
/// at a time.
pub fn save_safetensors_as(
    path: impl AsRef<Path>,
    tensors: &BTreeMap<String, Tensor>,
    dtype: Option<DType>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let path = path.as_ref();
    let stored_as = |tensor: &Tensor| match dtype {
        Some(dtype) if tensor.dtype().is_float() => dtype,
        _ => tensor.dtype(),
    };
    let mut order: Vec<(&String, &Tensor)> = tensors.iter().collect();
    order.sort_by_key(|(name, tensor)| (std::cmp::Reverse(stored_as(tensor).size_in_bytes()), *name));

    let mut entries = serde_json::Map::new();
    if !metadata.is_empty() {
        entries.insert("__metadata__".to_owned(), serde_json::json!(metadata));
    }
    let mut offset = 0;
    for (name, tensor) in &order {
        if name.as_str() == "__metadata__" {
            let hint = "rename the tensor";
            return Err(Error::weights(path, "a tensor cannot be called `__metadata__`", hint));
        }
        let stored = stored_as(tensor);
        let Some(label) = label(stored) else {
            let what = format!("tensor `{name}` cannot be stored as {stored:?}");
            return Err(Error::weights(path, what, "convert it to f32, f16 or bf16 first"));
        };
        let end = offset + tensor.elem_count() * stored.size_in_bytes();
        let entry = serde_json::json!({
            "dtype": label, "shape": tensor.dims(), "data_offsets": [offset, end],
        });
        entries.insert((*name).clone(), entry);
        offset = end;
    }
    let mut header = serde_json::Value::Object(entries).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    if header.len() > MAX_HEADER {
        let what = format!("the header would be {} bytes (limit {MAX_HEADER})", header.len());
        return Err(Error::weights(path, what, "save fewer tensors in one file"));
    }

    let mut failed = None;
    let written = atomic::write(path, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for (_, tensor) in &order {
            let tensor = tensor.to_dtype(stored_as(tensor)).map_err(Error::from);
            if let Err(error) = tensor.and_then(|t| write_elements(&t, out, path)) {
                failed = Some(error);
                return Err(std::io::Error::other("a tensor could not be written"));
            }
        }
        Ok(())
    });
    match failed {
        Some(error) => Err(error),
        None => written,
    }
}

/// The format's name for `dtype`.
fn label(dtype: DType) -> Option<&'static str> {
    Some(match dtype {
        DType::U8 => "U8",
        DType::U32 => "U32",
        DType::I16 => "I16",
        DType::I32 => "I32",
        DType::I64 => "I64",
        DType::BF16 => "BF16",
        DType::F16 => "F16",
        DType::F32 => "F32",
        DType::F64 => "F64",
        _ => return None,
    })
}

/// Writes the elements in little-endian order.
fn write_elements(tensor: &Tensor, out: &mut dyn Write, path: &Path) -> Result<()> {
    let flat = tensor.flatten_all()?;
    let written = match flat.dtype() {
        DType::U8 => out.write_all(&flat.to_vec1::<u8>()?),
        DType::U32 => write_all(out, &flat.to_vec1::<u32>()?, |x| x.to_le_bytes()),
        DType::I16 => write_all(out, &flat.to_vec1::<i16>()?, |x| x.to_le_bytes()),
        DType::I32 => write_all(out, &flat.to_vec1::<i32>()?, |x| x.to_le_bytes()),
        DType::I64 => write_all(out, &flat.to_vec1::<i64>()?, |x| x.to_le_bytes()),
        DType::BF16 => write_all(out, &flat.to_vec1::<bf16>()?, |x| x.to_le_bytes()),
        DType::F16 => write_all(out, &flat.to_vec1::<f16>()?, |x| x.to_le_bytes()),
        DType::F32 => write_all(out, &flat.to_vec1::<f32>()?, |x| x.to_le_bytes()),
        DType::F64 => write_all(out, &flat.to_vec1::<f64>()?, |x| x.to_le_bytes()),
        // `label` has refused all others before the file was begun.
        other => return Err(Error::weights(path, format!("cannot store {other:?}"), "convert it first")),
    };
    written.map_err(|e| Error::io(path, e))
}

fn write_all<T: Copy, const N: usize>(
    out: &mut dyn Write,
    values: &[T],
    bytes: impl Fn(T) -> [u8; N],
) -> std::io::Result<()> {
    let mut block = Vec::with_capacity(4096 * N);
    for chunk in values.chunks(4096) {
        block.clear();
        block.extend(chunk.iter().flat_map(|&x| bytes(x)));
        out.write_all(&block)?;
    }
    Ok(())
}
