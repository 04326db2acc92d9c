//! PyTorch files: equal to their safetensors twins, and every hostile file is an error.

mod common;
#[path = "common/pickles.rs"]
mod pickles;

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use flmm::Error;
use flmm::weights::{load_checkpoint, load_pth, load_pth_bytes, load_safetensors};
use pickles::*;
use proptest::prelude::*;
use zip::write::SimpleFileOptions;

const CPU: &Device = &Device::Cpu;

fn read(bytes: &[u8]) -> Result<HashMap<String, Tensor>, Error> {
    load_pth_bytes(bytes, "test.pth", None, CPU)
}

/// The message of an error that must be about the weights, name the file and have a hint.
fn refusal(bytes: &[u8]) -> String {
    let error = read(bytes).expect_err("a hostile file was accepted");
    assert!(matches!(error, Error::Weights { .. }), "{error:?}");
    assert!(error.hint().is_some_and(|hint| !hint.is_empty()));
    let message = error.to_string();
    assert!(message.contains("test.pth"), "{message}");
    message
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

// ---- files that must load ----

#[test]
fn goldens_pth_equals_its_safetensors_twin() {
    let Some(dir) = common::golden_dir("lmm/_sam") else { return };
    let pth = load_pth(dir.join("sam_vit_tiny.pth"), None, CPU).unwrap();
    assert_eq!(pth.len(), 202);
    // The twin is too large for the repository's own fixtures.
    let twin = dir.join("sam_vit_tiny.safetensors");
    if twin.is_file() {
        let twin = load_safetensors(&[twin], None, CPU).unwrap();
        assert_eq!(pth.len(), twin.len());
        for (name, expected) in &twin {
            let found = pth.get(name).unwrap_or_else(|| panic!("`{name}` is missing"));
            assert_eq!(found.dtype(), expected.dtype(), "{name}");
            assert_eq!(
                common::max_abs_diff(found, expected).unwrap(),
                0.0,
                "first diverging tensor: `{name}`"
            );
        }
    }
    let half = load_checkpoint(dir.join("sam_vit_tiny.pth"), Some(DType::F16), CPU).unwrap();
    assert!(half.values().all(|t| t.dtype() == DType::F16));
}

#[test]
fn goldens_views_into_one_flat_storage() {
    let Some(dir) = common::golden_dir("lmm/llava15") else { return };
    let heads = load_pth(dir.join("heads.pth"), None, CPU).unwrap();
    // The widths of a released head follow from one another (spec/pipeline.md §3.4).
    let unet = heads["mask_head.encoder.0.0.convs.0.conv.weight"].dims().to_vec();
    assert_eq!(heads["mask_head.conv_seg.weight"].dims().first(), Some(&1));
    assert_eq!(heads["mask_head.conv_seg.weight"].dims().get(1), unet.first());
    let layers = values(&heads["text_layer_weights"]);
    assert!(layers.iter().all(|w| w.is_finite()) && layers.iter().any(|w| *w != layers[0]), "{layers:?}");
    // GroupNorm weights are near one: a wrong offset would show noise around zero.
    for (name, tensor) in heads.iter().filter(|(name, _)| name.ends_with("gn.weight")) {
        let values = values(tensor);
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        assert!((mean - 1.0).abs() < 0.5, "`{name}` has mean {mean}");
    }
}

#[test]
fn goldens_tower_pickles_load() {
    let mut found = 0;
    let Some(lmm) = common::golden_dir("lmm") else { return };
    for family in std::fs::read_dir(lmm).unwrap().flatten() {
        let Ok(towers) = std::fs::read_dir(family.path()) else { continue };
        for tower in towers.flatten().filter(|t| t.path().is_dir()) {
            if ["pytorch_model.bin", "open_clip_pytorch_model.bin"]
                .iter()
                .any(|f| tower.path().join(f).is_file())
            {
                let tensors = load_checkpoint(tower.path(), None, CPU).unwrap();
                assert!(!tensors.is_empty(), "{}", tower.path().display());
                found += 1;
            }
        }
    }
    println!("{found} pickled towers");
}

#[test]
fn honours_offsets_strides_and_shared_storages() {
    let flat = || storage("FloatStorage", "0", 12);
    let root = dict(&[
        ("all", tensor(flat(), 0, &[3, 4], &[4, 1])),
        ("transposed", tensor(flat(), 0, &[4, 3], &[1, 4])),
        ("part", tensor(flat(), 5, &[2, 2], &[4, 1])),
        ("row", tensor(flat(), 8, &[1, 4], &[999, 1])),
        ("expanded", tensor(flat(), 7, &[2, 3], &[0, 0])),
        ("scalar", tensor(flat(), 11, &[], &[])),
        // The same place read as another type.
        ("bits", tensor(storage("IntStorage", "0", 12), 11, &[], &[])),
        ("empty", tensor(flat(), 0, &[0, 4], &[4, 1])),
        ("epoch", int(3)),
    ]);
    let tensors = read(&archive(&pickle(root), &[("0", counting(12))])).unwrap();
    let rows = |name: &str| tensors[name].to_vec2::<f32>().unwrap();
    assert_eq!(rows("all")[1], [4.0, 5.0, 6.0, 7.0]);
    assert_eq!(rows("transposed"), [[0.0, 4.0, 8.0], [1.0, 5.0, 9.0], [2.0, 6.0, 10.0], [3.0, 7.0, 11.0]]);
    assert_eq!(rows("part"), [[5.0, 6.0], [9.0, 10.0]]);
    assert_eq!(rows("row"), [[8.0, 9.0, 10.0, 11.0]]);
    assert_eq!(rows("expanded"), [[7.0; 3]; 2]);
    assert_eq!(tensors["scalar"].to_scalar::<f32>().unwrap(), 11.0);
    assert_eq!(tensors["empty"].dims(), [0, 4]);
    assert_eq!(tensors["bits"].to_scalar::<i32>().unwrap() as u32, 11f32.to_bits());
    assert_eq!(tensors.len(), 8, "the epoch is not a tensor");
}

#[test]
fn reads_nested_ordered_and_parameter_dictionaries_of_many_types() {
    let parameter = call(
        global("torch._utils", "_rebuild_parameter"),
        &[tensor(storage("HalfStorage", "h", 2), 0, &[2], &[1]), vec![0x88], ordered_dict()],
    );
    let items = [
        [text("half"), parameter].concat(),
        [text("brain"), tensor(storage("BFloat16Storage", "b", 1), 0, &[1], &[1])].concat(),
        [text("ids"), tensor(storage("LongStorage", "i", 2), 0, &[2], &[1])].concat(),
        [text("flag"), tensor(storage("BoolStorage", "f", 2), 0, &[2], &[1])].concat(),
    ];
    // OrderedDict with items and a `_metadata` attribute, as `module.state_dict()` gives it.
    let state = dict(&[("_metadata", ordered_dict())]);
    let inner = [ordered_dict(), b"(".to_vec(), items.concat(), b"u".to_vec(), state, b"b".to_vec()].concat();
    let root = dict(&[("epoch", int(1)), ("lr", vec![b'G', 0, 0, 0, 0, 0, 0, 0, 0]), ("state_dict", inner)]);
    let records = [
        ("h", vec![0x00, 0x3c, 0x00, 0xc0]),
        ("b", vec![0x80, 0x3f]),
        ("i", [7i64.to_le_bytes(), (-1i64).to_le_bytes()].concat()),
        ("f", vec![1, 0]),
    ];
    let tensors =
        load_pth_bytes(&archive(&pickle(root), &records), "test.pth", Some(DType::F32), CPU).unwrap();
    assert_eq!(tensors["half"].to_vec1::<f32>().unwrap(), [1.0, -2.0]);
    assert_eq!(tensors["brain"].to_vec1::<f32>().unwrap(), [1.0]);
    assert_eq!(tensors["ids"].to_vec1::<i64>().unwrap(), [7, -1]);
    assert_eq!(tensors["flag"].to_vec1::<u8>().unwrap(), [1, 0]);
}

#[test]
fn reads_protocol_4() {
    let short = |s: &str| [&[0x8c, s.len() as u8], s.as_bytes()].concat();
    let named = |module: &str, name: &str| [short(module), short(name), vec![0x93, 0x94]].concat();
    let kind = named("torch", "FloatStorage");
    let id =
        [b"(".to_vec(), short("storage"), kind, short("0"), short("cpu"), vec![b'K', 2, b't', b'Q']].concat();
    let shape = vec![b'K', 2, 0x85];
    let strides = vec![b'K', 1, 0x85];
    let view = call(
        named("torch._utils", "_rebuild_tensor_v2"),
        &[id, int(0), shape, strides, vec![0x89], ordered_dict()],
    );
    let frame = [vec![0x95], 0u64.to_le_bytes().to_vec()].concat();
    let root = [vec![0x80, 4], frame, b"}".to_vec(), short("w"), view, b"s.".to_vec()].concat();
    let tensors = read(&archive(&root, &[("0", floats(&[3.0, 4.0]))])).unwrap();
    assert_eq!(tensors["w"].to_vec1::<f32>().unwrap(), [3.0, 4.0]);
}

// ---- files that must be refused ----

#[test]
fn refuses_every_foreign_global_by_name() {
    for (module, name) in [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch.storage", "_load_from_bytes"),
    ] {
        let root = dict(&[("w", call(global(module, name), &[text("touch /tmp/owned")]))]);
        let message = refusal(&archive(&pickle(root), &[]));
        assert!(message.contains(&format!("`{module}.{name}`")), "{message}");
        let stacked = [text(module), text(name), vec![0x93, b')', b'R']].concat();
        assert!(refusal(&archive(&pickle(stacked), &[])).contains(name));
    }
}

#[test]
fn refuses_opcodes_that_create_or_change_objects() {
    for ops in [
        &b"(ios\nsystem\n"[..],
        b")\x81",
        b"(o",
        b"\x82\x01",
        b"P1\n",
        b"\x8b\xff\xff\xff\x7f",
        b"\xff",
        b"Vx\n",
    ] {
        let message = refusal(&archive(&pickle(ops.to_vec()), &[]));
        assert!(message.contains("opcode") || message.contains("empty stack"), "{message}");
    }
    // BUILD on a tensor, and a call of a tensor.
    let view = || tensor(storage("FloatStorage", "0", 1), 0, &[1], &[1]);
    let build = [view(), b"}b".to_vec()].concat();
    assert!(refusal(&archive(&pickle(build), &[("0", counting(1))])).contains("refused"));
    assert!(refusal(&archive(&pickle(call(view(), &[])), &[("0", counting(1))])).contains("refused"));
}

#[test]
fn refuses_views_outside_their_storage() {
    type View = (i64, &'static [i64], &'static [i64], i64, &'static str);
    let cases: [View; 9] = [
        (9, &[4], &[1], 12, "beyond"),
        (0, &[3, 4], &[5, 1], 12, "beyond"),
        (i64::MAX, &[1], &[1], 12, "beyond"),
        (0, &[2], &[i64::MAX], 12, "beyond"),
        (0, &[i64::MAX, i64::MAX], &[1, 1], 12, "overflows"),
        (0, &[0, i64::MAX, i64::MAX], &[1, 1, 1], 12, "overflows"),
        (0, &[2], &[1], i64::MAX, "storage should have"),
        (0, &[2], &[1], 13, "storage should have"),
        (0, &[2, 2], &[1], 12, "strides"),
    ];
    for (offset, shape, strides, count, expected) in cases {
        let root = dict(&[("w", tensor(storage("FloatStorage", "0", count), offset, shape, strides))]);
        let message = refusal(&archive(&pickle(root), &[("0", counting(12))]));
        assert!(message.contains("`w`") && message.contains(expected), "{message}");
    }
    for (offset, shape, strides) in [(-1, vec![1], vec![1]), (0, vec![-4], vec![1]), (0, vec![4], vec![-1])] {
        let root = dict(&[("w", tensor(storage("FloatStorage", "0", 12), offset, &shape, &strides))]);
        refusal(&archive(&pickle(root), &[("0", counting(12))]));
    }
    let root = dict(&[("w", tensor(storage("FloatStorage", "7", 12), 0, &[1], &[1]))]);
    assert!(refusal(&archive(&pickle(root), &[])).contains("data/7"));
}

#[test]
fn refuses_views_that_multiply_the_file() {
    // A stride of zero makes a terabyte of one number; a thousand overlapping views make a gigabyte of a megabyte.
    let root = dict(&[("w", tensor(storage("FloatStorage", "0", 1), 0, &[1 << 20, 1 << 18], &[0, 0]))]);
    assert!(refusal(&archive(&pickle(root), &[("0", counting(1))])).contains("many times"));
    let names: Vec<String> = (0..1000).map(|i| i.to_string()).collect();
    let views: Vec<(&str, Ops)> = (0i64..)
        .zip(&names)
        .map(|(i, name)| (name.as_str(), tensor(storage("FloatStorage", "0", 262_144), i, &[261_000], &[1])))
        .collect();
    assert!(refusal(&archive(&pickle(dict(&views)), &[("0", counting(262_144))])).contains("many times"));
}

#[test]
fn survives_deep_nesting_and_self_reference() {
    let mut deep = vec![b'('; 2_000_000];
    deep.extend(vec![b't'; 2_000_000]);
    refusal(&archive(&pickle(deep), &[]));
    let lists = [vec![b']'; 1_000_000], vec![b'a'; 999_999]].concat();
    refusal(&archive(&pickle(lists), &[]));
    // A dictionary that contains itself under `state_dict`.
    let own = [b"}q\x00".to_vec(), text("state_dict"), b"h\x00s".to_vec()].concat();
    assert!(refusal(&archive(&pickle(own), &[])).contains("no tensors"));
}

#[test]
fn refuses_malformed_pickles() {
    for ops in [
        &b""[..],
        b".",
        b"t.",
        b"(((",
        b"X\xff\xff\xff\xff.",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffx.",
        b"h\x05.",
        b"0.",
        b"}K\x01u.",
        b"ctorch",
        b"(Q.",
        b"\x80\x09.",
        b"K",
        b"N.",
        b"}(",
    ] {
        refusal(&archive(ops, &[]));
    }
    assert!(refusal(&archive(&pickle(dict(&[("a", int(1)), ("b", text("x"))])), &[])).contains("keys: a, b"));
}

#[test]
fn refuses_compressed_records_and_foreign_files() {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated);
    zip.start_file("a/data.pkl", options).unwrap();
    zip.write_all(&[b'('; 100_000]).unwrap();
    assert!(refusal(&zip.finish().unwrap().into_inner()).contains("compressed"));
    let old = [0x80, 0x02, 0x8a, 0x0a, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19, b'.'];
    assert!(refusal(&old).contains("1.6"));
    assert!(refusal(b"hello").contains("not a PyTorch file"));
    assert!(refusal(b"PK\x03\x04").contains("truncated"));
}

#[test]
fn refuses_records_that_lead_out_of_the_archive() {
    for name in
        ["../data.pkl", "/etc/data.pkl", "archive/../../data.pkl", "archive\\..\\data.pkl", "a/\0/data.pkl"]
    {
        let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
        let options = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
        zip.start_file(name, options).unwrap();
        zip.write_all(b"x").unwrap();
        let message = refusal(&zip.finish().unwrap().into_inner());
        assert!(message.contains("leads out of the archive"), "{name:?}: {message}");
    }
}

fn small() -> Vec<u8> {
    let root = dict(&[
        ("a", tensor(storage("FloatStorage", "0", 12), 2, &[2, 3], &[3, 1])),
        ("b", tensor(storage("FloatStorage", "0", 12), 0, &[3, 4], &[1, 3])),
    ]);
    archive(&pickle(root), &[("0", counting(12))])
}

#[test]
fn every_truncation_is_refused() {
    let bytes = small();
    assert_eq!(read(&bytes).unwrap().len(), 2);
    for length in 0..bytes.len() {
        refusal(&bytes[..length]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_damage_never_panics(changes in prop::collection::vec((0usize..2000, any::<u8>()), 1..6)) {
        let mut bytes = small();
        for (at, value) in changes {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        if let Err(error) = read(&bytes) {
            prop_assert!(matches!(error, Error::Weights { .. }), "{error:?}");
        }
    }

    #[test]
    fn random_pickles_never_panic(ops in prop::collection::vec(prop::sample::select(&b"(.012NKMJGXTU)]}taesuqrhjcQRb\x80\x85\x86\x87\x88\x89\x8a\x8c\x8d\x93\x94\x95ab\n\x00\x01\x02"[..]), 0..200)) {
        prop_assert!(read(&archive(&pickle(ops), &[("0", counting(4))])).is_err());
    }
}

// ---- folders ----

#[test]
fn finds_the_checkpoint_of_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let error = |path: &Path| load_checkpoint(path, None, CPU).unwrap_err().to_string();
    assert!(error(dir).contains("no weights"));
    assert!(error(&dir.join("absent")).contains("no such file"));

    std::fs::write(dir.join("sam.pth"), small()).unwrap();
    assert_eq!(load_checkpoint(dir, None, CPU).unwrap().len(), 2);
    std::fs::write(dir.join("other.pth"), small()).unwrap();
    assert!(error(dir).contains("2 weight files"));

    let index = |text: &str| std::fs::write(dir.join("pytorch_model.bin.index.json"), text).unwrap();
    index(r#"{"weight_map": {"a": "sam.pth", "b": "sam.pth"}}"#);
    assert_eq!(load_checkpoint(dir, None, CPU).unwrap().len(), 2);
    index(r#"{"weight_map": {"a": "sam.pth", "c": "sam.pth"}}"#);
    assert!(error(dir).contains("`c`"));
    index(r#"{"weight_map": {"a": "missing.pth"}}"#);
    assert!(error(dir).contains("missing.pth"));
    index(r#"{"weight_map": {"a": "sam.pth", "b": "other.pth"}}"#);
    assert!(error(dir).contains("also in another shard"));
    for evil in ["../x.pth", "/etc/passwd", "..", ""] {
        index(&format!(r#"{{"weight_map": {{"a": "{evil}"}}}}"#));
        assert!(error(dir).contains("not a file name"), "{evil}");
    }
    index("{");
    assert!(error(dir).contains("JSON"));
}
