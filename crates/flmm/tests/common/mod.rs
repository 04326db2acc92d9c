//! Where the golden numbers lie and how tensors are compared with them.
#![allow(dead_code, unreachable_pub, reason = "every test file uses its own part")]

pub mod models;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

/// Any failure of a test: a library error, a file error, or a sentence.
pub type TestResult<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// The folder of a golden case: below `$FLMM_GOLDENS` if set, else below `../shared/goldens` beside the repository if
/// that exists; where the case is not there, below the repository's `fixtures/`.
///
/// `None` (the test is skipped) only if the case is in neither place.
pub fn golden_dir(case: &str) -> Option<PathBuf> {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let shared = repository.join("../shared/goldens");
    let first = match std::env::var_os("FLMM_GOLDENS") {
        Some(folder) => PathBuf::from(folder),
        None if shared.is_dir() => shared,
        None => repository.join("fixtures"),
    };
    [first, repository.join("fixtures")]
        .into_iter()
        .map(|folder| folder.join(case))
        .find(|folder| folder.is_dir())
}

/// The tiny SAM in a golden folder, in whichever format it is there.
pub fn tiny_sam(folder: &Path) -> TestResult<PathBuf> {
    let files = ["sam_vit_tiny.safetensors", "sam_vit_tiny.pth"].map(|name| folder.join(name));
    let found = files.into_iter().find(|file| file.is_file());
    found.ok_or_else(|| format!("{}: no SAM", folder.display()).into())
}

/// All tensors of a safetensors file, in their own types.
pub fn tensors(file: &Path) -> TestResult<HashMap<String, Tensor>> {
    Ok(flmm::weights::load_safetensors(&[file.to_owned()], None, &Device::Cpu)?)
}

/// A JSON file.
pub fn json(file: &Path) -> TestResult<serde_json::Value> {
    let text = std::fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?;
    Ok(serde_json::from_str(&text).map_err(|e| format!("{}: {e}", file.display()))?)
}

fn flat(x: &Tensor) -> TestResult<Vec<f64>> {
    Ok(x.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

fn same_shape(a: &Tensor, b: &Tensor) -> TestResult {
    match a.dims() == b.dims() {
        true => Ok(()),
        false => Err(format!("shapes differ: {:?} and {:?}", a.dims(), b.dims()).into()),
    }
}

/// Largest absolute difference of two tensors of one shape; not-a-number counts as infinite.
pub fn max_abs_diff(a: &Tensor, b: &Tensor) -> TestResult<f64> {
    same_shape(a, b)?;
    let differences = flat(a)?.into_iter().zip(flat(b)?).map(|(a, b)| (a - b).abs());
    Ok(differences.fold(0.0, |most, d| if d.is_nan() { f64::INFINITY } else { d.max(most) }))
}

/// ‖a − b‖ / ‖b‖.
pub fn rel_l2(a: &Tensor, b: &Tensor) -> TestResult<f64> {
    same_shape(a, b)?;
    let (a, b) = (flat(a)?, flat(b)?);
    let difference: f64 = a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum();
    let size: f64 = b.iter().map(|b| b * b).sum();
    Ok((difference / size.max(f64::MIN_POSITIVE)).sqrt())
}

/// Values of a golden tensor that is given by a formula instead of a file: `c + k·(u − ½)` with u a hash of the
/// tensor's name, the manifest's seed and the row-major index.
pub fn formula(name: &str, seed: u32, shape: &[usize], c: f64, k: f64) -> TestResult<Tensor> {
    let hash =
        name.bytes().fold(0x811C_9DC5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let start = hash ^ seed;
    let value = |i: u32| {
        let mut x = i.wrapping_mul(0x9E37_79B1).wrapping_add(start);
        x = (x ^ (x >> 16)).wrapping_mul(0x7FEB_352D);
        x = (x ^ (x >> 15)).wrapping_mul(0x846C_A68B);
        x ^= x >> 16;
        let u = f64::from(x >> 8) / f64::from(1 << 24);
        (c + k * (u - 0.5)) as f32
    };
    let values: Vec<f32> = (0..shape.iter().product::<usize>() as u32).map(value).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// All tensors of a `manifest.json` (`seed`, `tensors: [{name, shape, c, k, head}]`), checked against the `head`s.
pub fn formula_weights(manifest: &serde_json::Value) -> TestResult<BTreeMap<String, Tensor>> {
    let seed = manifest["seed"].as_u64().ok_or("manifest without `seed`")? as u32;
    let mut weights = BTreeMap::new();
    for entry in manifest["tensors"].as_array().ok_or("manifest without `tensors`")? {
        let name = entry["name"].as_str().ok_or("tensor without `name`")?;
        let shape: Vec<usize> = serde_json::from_value(entry["shape"].clone())?;
        let (c, k) = (entry["c"].as_f64().ok_or("no `c`")?, entry["k"].as_f64().ok_or("no `k`")?);
        let tensor = formula(name, seed, &shape, c, k)?;
        let head: Vec<f64> = serde_json::from_value(entry["head"].clone())?;
        let values = tensor.flatten_all()?.to_vec1::<f32>()?;
        if head.iter().zip(&values).any(|(a, b)| *a as f32 != *b) {
            return Err(
                format!("formula of `{name}` gives {:?}, expected {head:?}", &values[..head.len()]).into()
            );
        }
        weights.insert(name.to_owned(), tensor);
    }
    Ok(weights)
}

/// Compares tensors with the recorded ones and remembers the largest difference per kind.
pub struct Golden {
    /// What failures call this case.
    pub case: String,
    /// The recorded tensors.
    pub tensors: HashMap<String, Tensor>,
    compared: usize,
}

impl Golden {
    /// The tensors of `file`.
    pub fn open(file: &Path) -> TestResult<Self> {
        let case = file.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Self { case, tensors: tensors(file)?, compared: 0 })
    }

    /// A recorded tensor that the test cannot do without.
    pub fn get(&self, name: &str) -> TestResult<&Tensor> {
        self.tensors.get(name).ok_or_else(|| format!("{}: `{name}` is not recorded", self.case).into())
    }

    /// Whether `name` was recorded (large tensors are left out of the repository's fixtures).
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Fails, naming the tensor, if `actual` is further than `tolerance` from the recorded `name` anywhere.
    /// A tensor that was not recorded is passed over.
    pub fn check(&mut self, name: &str, actual: &Tensor, tolerance: f64) -> TestResult {
        let Some(expected) = self.tensors.get(name) else { return Ok(()) };
        let difference = max_abs_diff(actual, expected).map_err(|e| format!("{}: {name}: {e}", self.case))?;
        println!("{}: {name}: {difference:.2e} (tolerance {tolerance:.0e})", self.case);
        self.compared += 1;
        match difference <= tolerance {
            true => Ok(()),
            false => {
                Err(format!("{}: first diverging tensor `{name}`: {difference:e} > {tolerance:e}", self.case)
                    .into())
            }
        }
    }

    /// How many tensors were compared; call it at the end, so that a test cannot pass on nothing.
    pub fn finish(self) -> TestResult<usize> {
        match self.compared {
            0 => Err(format!("{}: nothing was compared", self.case).into()),
            n => Ok(n),
        }
    }
}
