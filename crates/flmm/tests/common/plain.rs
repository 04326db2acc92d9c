//! What the parity tests share: where the goldens are, and how tensors are compared.
#![allow(dead_code)] // every test file uses a part of it

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

/// Folders that may hold goldens: `$FLMM_GOLDENS`, else `../shared/goldens` beside the repository; last the
/// repository's own `fixtures`.
fn roots() -> Vec<PathBuf> {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let first = match std::env::var_os("FLMM_GOLDENS") {
        Some(folder) => PathBuf::from(folder),
        None => repository.join("../shared/goldens"),
    };
    vec![first, repository.join("fixtures")]
}

/// The folder of a case such as `preprocess` or `lmm/llava15`; `None` if neither the goldens nor the fixtures
/// have it.
pub(crate) fn golden_dir(case: &str) -> Option<PathBuf> {
    roots().into_iter().map(|root| root.join(case)).find(|dir| dir.is_dir())
}

/// A JSON file.
pub(crate) fn json(path: impl AsRef<Path>) -> serde_json::Value {
    let path = path.as_ref();
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// All tensors of a safetensors file, in their own types.
pub(crate) fn tensors(path: impl AsRef<Path>) -> HashMap<String, Tensor> {
    let path = path.as_ref();
    candle_core::safetensors::load(path, &Device::Cpu).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The elements in row-major order as f32.
pub(crate) fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest absolute difference; infinite if the shapes differ or a value is not a number.
pub(crate) fn max_abs_diff(a: &Tensor, b: &Tensor) -> f32 {
    if a.dims() != b.dims() {
        return f32::INFINITY;
    }
    let differences =
        values(a).into_iter().zip(values(b)).map(|(a, b)| if a == b { 0.0 } else { (a - b).abs() });
    differences.fold(0.0, |worst, d| if d.is_nan() { f32::INFINITY } else { worst.max(d) })
}

/// `‖a − b‖ / ‖b‖` (L2); infinite if the shapes differ or a value is not a number.
pub(crate) fn rel_l2(a: &Tensor, b: &Tensor) -> f64 {
    if a.dims() != b.dims() {
        return f64::INFINITY;
    }
    let (mut difference, mut norm) = (0.0, 0.0);
    for (a, b) in values(a).into_iter().zip(values(b)) {
        difference += f64::from(a - b).powi(2);
        norm += f64::from(b).powi(2);
    }
    let ratio = (difference / norm.max(f64::MIN_POSITIVE)).sqrt();
    if ratio.is_nan() { f64::INFINITY } else { ratio }
}
