//! Short texts that tell states of files and tensors apart.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use candle_core::{DType, Tensor};
use flmm::{Error, Result, hex};
use sha2::{Digest, Sha256};

/// SHA-256 of all bytes of a file, in hexadecimal.
pub(crate) fn file(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let mut reader = File::open(path).map_err(|e| Error::io(path, e))?;
    std::io::copy(&mut reader, &mut hash).map_err(|e| Error::io(path, e))?;
    Ok(hex(hash.finalize()))
}

/// The first half of a SHA-256 over names and values.
pub(crate) fn tensors<'a>(tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>) -> Result<String> {
    let mut hash = Sha256::new();
    for (name, tensor) in tensors.into_iter().collect::<BTreeMap<_, _>>() {
        hash.update(name.as_bytes());
        for value in tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()? {
            hash.update(value.to_le_bytes());
        }
    }
    Ok(short(hash))
}

/// The first half of the digest of `hash`, in hexadecimal.
pub(crate) fn short(hash: Sha256) -> String {
    hex(&hash.finalize()[..16])
}
