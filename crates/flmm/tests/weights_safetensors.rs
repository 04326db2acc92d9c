//! Safetensors files: round trips, conversion, and every way a file can be damaged.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use candle_core::{DType, Device, Tensor};
use flmm::Error;
use flmm::weights::{
    load_safetensors, load_safetensors_bytes, safetensors_metadata, save_safetensors, save_safetensors_as,
};
use proptest::prelude::*;

const CPU: &Device = &Device::Cpu;

fn sample() -> BTreeMap<String, Tensor> {
    let a = Tensor::from_vec(vec![0.5f32, -1.0, 2.0, 1e-3, f32::MAX, 0.0], (2, 3), CPU).unwrap();
    let b = Tensor::from_vec(vec![1i64, -7], (2,), CPU).unwrap();
    let c = Tensor::from_vec(vec![3u8], (1,), CPU).unwrap();
    let scalar = Tensor::new(4.25f32, CPU).unwrap();
    BTreeMap::from([("a".into(), a), ("b.ids".into(), b), ("c".into(), c), ("scalar".into(), scalar)])
}

fn saved(folder: &Path) -> (PathBuf, Vec<u8>) {
    let path = folder.join("w.safetensors");
    let metadata = BTreeMap::from([("format".into(), "pt".into()), ("note".into(), "x".into())]);
    save_safetensors(&path, &sample(), &metadata).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    (path, bytes)
}

fn message(error: Error) -> String {
    assert!(error.hint().is_some_and(|hint| !hint.is_empty()), "no hint: {error}");
    error.to_string()
}

#[test]
fn round_trip_keeps_values_types_and_metadata() {
    let folder = tempfile::tempdir().unwrap();
    let (path, bytes) = saved(folder.path());
    let loaded = load_safetensors(std::slice::from_ref(&path), None, CPU).unwrap();
    assert_eq!(loaded.len(), 4);
    for (name, expected) in sample() {
        let found = &loaded[&name];
        assert_eq!(found.dtype(), expected.dtype(), "{name}");
        assert_eq!(found.dims(), expected.dims(), "{name}");
        let values =
            |t: &Tensor| t.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
        assert_eq!(values(found), values(&expected), "{name}");
    }
    assert_eq!(safetensors_metadata(&path).unwrap()["note"], "x");
    // The same content gives the same bytes.
    assert_eq!(saved(folder.path()).1, bytes);
    // The ecosystem's own reader agrees.
    let other = candle_core::safetensors::load(&path, CPU).unwrap();
    assert_eq!(other["a"].to_vec2::<f32>().unwrap(), loaded["a"].to_vec2::<f32>().unwrap());
}

#[test]
fn converts_floats_and_leaves_integers() {
    let folder = tempfile::tempdir().unwrap();
    let (path, _) = saved(folder.path());
    let loaded = load_safetensors(&[path], Some(DType::BF16), CPU).unwrap();
    assert_eq!(loaded["a"].dtype(), DType::BF16);
    assert_eq!(loaded["b.ids"].to_vec1::<i64>().unwrap(), [1, -7]);

    let half = folder.path().join("half.safetensors");
    save_safetensors_as(&half, &sample(), Some(DType::F16), &BTreeMap::new()).unwrap();
    let loaded = load_safetensors(&[half], None, CPU).unwrap();
    assert_eq!(loaded["a"].dtype(), DType::F16);
    let a = loaded["a"].to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(a[..3], [0.5, -1.0, 2.0]);
    assert!((a[3] - 1e-3).abs() < 1e-6);
    assert_eq!(loaded["b.ids"].dtype(), DType::I64);
}

#[test]
fn widens_types_that_the_tensor_library_lacks() {
    let header = br#"{"t":{"dtype":"BOOL","shape":[2],"data_offsets":[0,2]},"i":{"dtype":"I8","shape":[2],"data_offsets":[2,4]},"u":{"dtype":"U16","shape":[1],"data_offsets":[4,6]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend([1, 0, 0xff, 5, 0x34, 0x12]);
    let loaded = load_safetensors_bytes(&bytes, "memory", None, CPU).unwrap();
    assert_eq!(loaded["t"].to_vec1::<u8>().unwrap(), [1, 0]);
    assert_eq!(loaded["i"].to_vec1::<i16>().unwrap(), [-1, 5]);
    assert_eq!(loaded["u"].to_vec1::<u32>().unwrap(), [0x1234]);
}

#[test]
fn every_truncation_is_an_error_that_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let (_, bytes) = saved(folder.path());
    let path = folder.path().join("cut.safetensors");
    for length in 0..bytes.len() {
        std::fs::write(&path, &bytes[..length]).unwrap();
        let error = message(load_safetensors(std::slice::from_ref(&path), None, CPU).unwrap_err());
        assert!(error.contains("cut.safetensors"), "{length}: {error}");
    }
}

#[test]
fn refuses_a_huge_header_before_reading_it() {
    let mut bytes = u64::MAX.to_le_bytes().to_vec();
    bytes.extend([b'{'; 100]);
    let error = message(load_safetensors_bytes(&bytes, "evil", None, CPU).unwrap_err());
    assert!(error.contains("limit"), "{error}");
    bytes[..8].copy_from_slice(&99_000_000u64.to_le_bytes());
    let error = message(load_safetensors_bytes(&bytes, "evil", None, CPU).unwrap_err());
    assert!(error.contains("truncated"), "{error}");
}

#[test]
fn refuses_wrong_offsets_and_shapes() {
    for entry in [
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,16]}}"#,
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#,
        r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}"#,
        r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,99]}}"#,
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[3],"data_offsets":[4,16]}}"#,
        r#"{"a":{"dtype":"Q9","shape":[4],"data_offsets":[0,16]}}"#,
        "[]",
        "",
    ] {
        let mut bytes = (entry.len() as u64).to_le_bytes().to_vec();
        bytes.extend(entry.as_bytes());
        bytes.extend([0; 16]);
        let error = load_safetensors_bytes(&bytes, "evil", None, CPU);
        assert!(matches!(error, Err(Error::Weights { .. })), "{entry}");
    }
}

#[test]
fn names_a_tensor_found_in_two_files() {
    let folder = tempfile::tempdir().unwrap();
    let (path, bytes) = saved(folder.path());
    let twin = folder.path().join("twin.safetensors");
    std::fs::write(&twin, bytes).unwrap();
    let error = message(load_safetensors(&[path, twin], None, CPU).unwrap_err());
    assert!(error.contains("also in another"), "{error}");
}

#[test]
fn recognises_a_git_lfs_pointer_and_a_missing_file() {
    let text = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
    let error = message(load_safetensors_bytes(text, "model.safetensors", None, CPU).unwrap_err());
    assert!(error.contains("LFS"), "{error}");
    let missing = load_safetensors(&["/nowhere/x.safetensors".into()], None, CPU);
    assert!(matches!(missing, Err(Error::Io { .. })));
}

/// [`saved`], written once.
static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| saved(tempfile::tempdir().unwrap().path()).1);

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_damage_never_panics(cuts in prop::collection::vec((0usize..600, any::<u8>()), 1..8), keep in 0usize..700) {
        let mut bytes = BYTES.clone();
        bytes.truncate(keep);
        for (at, value) in cuts {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        if let Err(error) = load_safetensors_bytes(&bytes, "fuzz", None, CPU) {
            prop_assert!(matches!(error, Error::Weights { .. }), "{error}");
        }
    }
}
