//! Released heads and SAM checkpoints as files of this program.

mod common;
#[path = "common/pickles.rs"]
mod pickles;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use flmm::convert::{HeadTarget, convert_head, convert_sam, examine_head, head_target};
use flmm::grounder::{Grounder, HeadSettings, ModelPaths};
use flmm::mask_head::UNetConfig;
use flmm::sam::{CONFIG_FILE, Refiner, Sam, SamConfig};
use flmm::weights::{TensorInfo, load_checkpoint, outline, rehearse, save_safetensors};
use half::{bf16, f16};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

const CPU: &Device = &Device::Cpu;
const BUFFER: &str = "sam.model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix";

fn llava() -> (PathBuf, PathBuf) {
    let dir = common::golden_dir("lmm/llava15").expect("the case is in fixtures/");
    (dir.join("model"), dir.join("heads.pth"))
}

fn target() -> HeadTarget {
    head_target(&llava().0.display().to_string()).unwrap()
}

/// Names, shapes and values of the golden head, to be changed.
fn head() -> HashMap<String, Tensor> {
    load_checkpoint(llava().1, None, CPU).unwrap()
}

/// Writes `tensors` as a PyTorch file of elements of type `kind`.
fn write(file: &Path, tensors: &HashMap<String, Tensor>, kind: &str, nested: &[&str]) {
    let bytes = |tensor: &Tensor| -> Vec<u8> {
        let values: Vec<f32> = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        match kind {
            "HalfStorage" => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
            "BFloat16Storage" => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
            _ => pickles::floats(&values),
        }
    };
    let parts: Vec<_> =
        tensors.iter().map(|(name, t)| (name.as_str(), t.dims().to_vec(), bytes(t))).collect();
    std::fs::write(file, pickles::checkpoint(kind, &parts, nested)).unwrap();
}

#[track_caller]
fn same(found: &HashMap<String, Tensor>, expected: &HashMap<String, Tensor>) {
    let names = |of: &HashMap<String, Tensor>| of.keys().cloned().collect::<std::collections::BTreeSet<_>>();
    assert_eq!(names(found), names(expected));
    for (name, tensor) in expected {
        let difference = common::max_abs_diff(&found[name], tensor).unwrap();
        assert_eq!(difference, 0.0, "{name}");
    }
}

#[test]
fn a_released_head_becomes_a_folder_with_the_same_values() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("heads/llava");
    let done = convert_head(&llava().1, &target(), &out, false).unwrap();
    let found = load_checkpoint(&out, None, CPU).unwrap();
    same(&found, &head());
    let parameters: usize =
        head().iter().filter(|(name, _)| *name != BUFFER).map(|(_, t)| t.elem_count()).sum();
    assert_eq!((done.tensors, done.parameters, done.left_out), (head().len(), parameters, 0));
    let about: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(out.join("head.json")).unwrap()).unwrap();
    assert_eq!(about["lmm"], "llava-hf/llava-1.5-7b-hf");
    assert_eq!((&about["channels"], &about["format"]), (&8.into(), &1.into()));
    // The folder is what the program opens.
    let sam = common::golden_dir("lmm/_sam").unwrap().join("sam_vit_tiny.pth");
    Grounder::open(&ModelPaths { model: llava().0, sam, head: Some(out) }, CPU, DType::F32).unwrap();
    let entries: Vec<_> = std::fs::read_dir(place.path().join("heads")).unwrap().collect();
    assert_eq!(entries.len(), 1, "{entries:?}");
}

#[test]
fn types_nesting_and_frozen_parts_make_no_difference() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("iter_76320.pth");
    let mut whole = head();
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, CPU).unwrap();
    whole.insert("llm.model.layers.0.mlp.up_proj.weight".into(), zeros(&[4, 4]));
    whole.insert("sam.model.image_encoder.pos_embed".into(), zeros(&[1, 4, 4, 8]));
    whole.insert("sam.model.pixel_mean".into(), zeros(&[3, 1, 1]));
    for (kind, dtype) in
        [("FloatStorage", DType::F32), ("HalfStorage", DType::F16), ("BFloat16Storage", DType::BF16)]
    {
        write(&file, &whole, kind, &["state_dict"]);
        let out = place.path().join(kind);
        let done = convert_head(&file, &target(), &out, false).unwrap();
        assert_eq!((done.tensors, done.left_out), (head().len(), 3), "{kind}");
        let rounded = head().into_iter().map(|(name, t)| (name, t.to_dtype(dtype).unwrap())).collect();
        let found = load_checkpoint(&out, None, CPU).unwrap();
        assert!(found.values().all(|tensor| tensor.dtype() == dtype));
        let wide = |of: HashMap<String, Tensor>| -> HashMap<String, Tensor> {
            of.into_iter().map(|(name, t)| (name, t.to_dtype(DType::F32).unwrap())).collect()
        };
        same(&wide(found), &wide(rounded));
    }
}

#[test]
fn what_sam_supplies_may_be_missing() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("head.pth");
    let mut trained = head();
    trained.remove(BUFFER);
    trained.remove("sam.model.prompt_encoder.not_a_point_embed.weight");
    write(&file, &trained, "FloatStorage", &[]);
    let done = convert_head(&file, &target(), &place.path().join("out"), false).unwrap();
    assert_eq!(done.from_sam, ["sam.model.prompt_encoder.not_a_point_embed.weight", BUFFER]);
}

/// The error's text and hint; nothing may have been written.
#[track_caller]
fn refused(tensors: &HashMap<String, Tensor>, target: &HeadTarget) -> String {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("head.pth");
    write(&file, tensors, "FloatStorage", &[]);
    let error = convert_head(&file, target, &place.path().join("out"), false).unwrap_err();
    assert!(error.hint().is_some());
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 1);
    error.to_string()
}

#[test]
fn heads_that_do_not_fit_are_refused() {
    let change = |name: &str, tensor: Option<Tensor>| {
        let mut changed = head();
        assert!(changed.remove(name).is_some() || tensor.is_some(), "{name}");
        changed.extend(tensor.map(|tensor| (name.to_owned(), tensor)));
        changed
    };
    let zeros = |shape: &[usize]| Some(Tensor::zeros(shape, DType::F32, CPU).unwrap());
    let gn = "mask_head.decoder.1.conv_block.convs.0.gn.weight";
    let message = refused(&change(gn, None), &target());
    assert!(message.contains(&format!("tensor `{gn}` is missing: expected shape [16]")), "{message}");
    let message = refused(&change(gn, zeros(&[15])), &target());
    assert!(message.contains("expected shape [16], found [15]"), "{message}");
    let message = refused(&change("mask_head.extra.weight", zeros(&[1])), &target());
    assert!(message.contains("unexpected tensor `mask_head.extra.weight`"), "{message}");
    let message = refused(&change("text_proj.bias", None), &target());
    assert!(message.contains("`text_proj.bias` is missing"), "{message}");
    let nan = Tensor::full(f32::NAN, (2,), CPU).unwrap();
    let message = refused(&change("text_layer_weights", Some(nan)), &target());
    assert!(message.contains("`text_layer_weights` has values that are not finite"), "{message}");
    for name in ["text_layer_weights", "text_proj.weight", "mask_head.encoder.0.0.convs.0.conv.weight"] {
        assert!(refused(&change(name, None), &target()).contains("not a grounding head"));
    }
    let published = head_target("llava-1.5-7b").unwrap();
    let message = refused(&head(), &published);
    assert!(message.contains("the head is for 8 attention maps, LLaVA-1.5-7B has 1024"), "{message}");
    assert!(message.contains("2 decoder layers, LLaVA-1.5-7B has 32"), "{message}");
    let wider = HeadTarget { hidden_size: Some(4096), ..target() };
    assert!(refused(&head(), &wider).contains("48 hidden values"));
    assert!(head_target("gpt").unwrap_err().hint().unwrap().contains("LLaVA-1.5-7B"));
}

#[test]
fn a_folder_that_holds_something_is_kept() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("out");
    std::fs::create_dir(&out).unwrap();
    convert_head(&llava().1, &target(), &out, false).unwrap();
    std::fs::write(out.join("notes.txt"), "mine").unwrap();
    let before = std::fs::read(out.join("head.safetensors")).unwrap();
    let error = convert_head(&llava().1, &target(), &out, false).unwrap_err();
    assert!(error.hint().unwrap().contains("--force"));
    std::fs::write(out.join("head.safetensors"), "damaged").unwrap();
    convert_head(&llava().1, &target(), &out, true).unwrap();
    assert_eq!(std::fs::read(out.join("head.safetensors")).unwrap(), before);
    assert_eq!(std::fs::read(out.join("notes.txt")).unwrap(), b"mine");
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 1);
}

#[test]
fn parameter_counts_of_the_published_heads() {
    // spec/pipeline.md §7: channels, layers, hidden size, trained parameters.
    for (channels, layers, hidden, count) in [
        (384, 24, 2048, 11_993_097),
        (144, 18, 2048, 11_854_851),
        (1024, 32, 4096, 12_886_033),
        (960, 30, 4096, 12_849_167),
        (2048, 32, 4096, 13_475_857),
    ] {
        let mut shapes: Vec<(String, Vec<usize>)> = UNetConfig::new(channels)
            .shapes()
            .into_iter()
            .map(|(name, shape)| (format!("mask_head.{name}"), shape))
            .collect();
        let refiner = Refiner::init(&SamConfig::vit_l(), &mut ChaCha8Rng::seed_from_u64(0)).unwrap();
        shapes.extend(refiner.iter().map(|(name, t)| (format!("sam.model.{name}"), t.dims().to_vec())));
        shapes.push(("text_proj.weight".into(), vec![256, hidden]));
        shapes.push(("text_proj.bias".into(), vec![256]));
        shapes.push(("text_layer_weights".into(), vec![layers]));
        let info = |(name, shape)| TensorInfo { name, dtype: "F32".into(), shape };
        let infos: Vec<_> = shapes.into_iter().map(info).collect();
        let (found, problems, unexpected) = examine_head(Path::new("head.pth"), &infos).unwrap();
        assert_eq!((problems, unexpected), (Vec::new(), Vec::new()));
        assert_eq!((found.parameters, found.layers, found.hidden_size), (count, layers, Some(hidden)));
    }
}

#[test]
fn heads_of_few_maps_and_without_a_refiner_are_known_as_such() {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("small");
    std::fs::create_dir(&folder).unwrap();
    let mut tensors: BTreeMap<String, Tensor> = head().into_iter().collect();
    tensors.retain(|name, _| !name.starts_with("sam.") && !name.starts_with("text_proj."));
    let first = "mask_head.encoder.0.0.convs.0.conv.weight";
    let kept = tensors[first].narrow(1, 0, 3).unwrap().contiguous().unwrap();
    tensors.insert(first.into(), kept);
    save_safetensors(folder.join("head.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    let settings = r#"{"channels_used": [5, 0, 2], "refiner": "none"}"#;
    std::fs::write(folder.join("head.json"), settings).unwrap();

    let (found, problems, unexpected) = examine_head(&folder, &outline(&folder).unwrap()).unwrap();
    assert_eq!((problems, unexpected), (Vec::new(), Vec::new()));
    assert_eq!((found.channels, found.hidden_size, found.prompt_embed_dim), (3, None, None));
    // Converted, it is the same head still; the file alone has its description beside it too.
    for (from, to) in [(folder.clone(), "again"), (folder.join("head.safetensors"), "of the file")] {
        let out = place.path().join(to);
        convert_head(&from, &target(), &out, false).unwrap();
        assert_eq!(HeadSettings::read(&out).unwrap(), HeadSettings::read(&folder).unwrap());
        let paths = ModelPaths { model: llava().0, sam: "no SAM".into(), head: Some(out) };
        Grounder::open(&paths, CPU, DType::F32).unwrap();
    }
    let fewer = HeadTarget { channels: 4, ..target() };
    let error = convert_head(&folder, &fewer, &place.path().join("fewer"), false).unwrap_err().to_string();
    assert!(error.contains("map 5"), "{error}");
}

#[test]
fn a_sam_keeps_values_and_sizes() {
    let place = tempfile::tempdir().unwrap();
    let dir = common::golden_dir("lmm/_sam").unwrap();
    let file = dir.join("sam_vit_tiny.pth");
    let original = load_checkpoint(&file, None, CPU).unwrap();
    let config = SamConfig::from_file(&dir.join(CONFIG_FILE)).unwrap();
    for out in ["folder", "other/sam.safetensors"] {
        let out = place.path().join(out);
        if out.extension().is_some() {
            std::fs::create_dir(out.parent().unwrap()).unwrap();
        }
        let done = convert_sam(&file, &out, false).unwrap();
        assert_eq!(done.tensors, original.len());
        same(&load_checkpoint(&out, None, CPU).unwrap(), &original);
        // Sizes that shapes do not tell came along.
        assert_eq!(*Sam::open(&out, CPU).unwrap().config(), config);
        assert!(convert_sam(&file, &out, false).unwrap_err().hint().unwrap().contains("--force"));
        convert_sam(&file, &out, true).unwrap();
    }
    // A head is no SAM, and a SAM with a tensor too many or too few is none either.
    let no = place.path().join("no");
    assert!(convert_sam(&llava().1, &no, false).unwrap_err().to_string().contains("image_encoder"));
    let changed = place.path().join("changed");
    std::fs::create_dir(&changed).unwrap();
    std::fs::copy(dir.join(CONFIG_FILE), changed.join(CONFIG_FILE)).unwrap();
    let mut tensors = original;
    let moved = tensors.remove("mask_decoder.iou_token.weight").unwrap();
    tensors.insert("mask_decoder.other.weight".into(), moved);
    write(&changed.join("sam.pth"), &tensors, "FloatStorage", &["model"]);
    let message = convert_sam(&changed.join("sam.pth"), &no, false).unwrap_err().to_string();
    assert!(message.contains("`mask_decoder.iou_token.weight` is missing"), "{message}");
    assert!(message.contains("unexpected tensor `mask_decoder.other.weight`"), "{message}");
    assert!(!no.exists());
}

#[test]
fn a_rehearsal_finds_what_is_missing_without_reading() {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(llava().0).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let open = || rehearse(|| flmm::lmm::open(dir.path(), DType::F32, CPU));
    let (model, findings) = open();
    assert_eq!(model.unwrap().spec().channels, 8);
    assert_eq!(findings.problems, Vec::new());
    // The second last layer of the tower is what the model reads: the last one is never asked for.
    let last = ["vision_tower.vision_model.encoder.layers.2.", "vision_tower.vision_model.post_layernorm."];
    assert!(findings.unused.iter().all(|name| last.iter().any(|prefix| name.starts_with(prefix))));
    let infos = outline(dir.path()).unwrap();
    let used = infos.iter().filter(|info| !findings.unused.contains(&info.name));
    assert_eq!(findings.used_elements, used.map(TensorInfo::elements).sum::<usize>());
    assert_eq!(findings.unused.len(), 18);
    // Without weights everything is missing; after the rehearsal that is an error again.
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let (model, findings) = open();
    assert!(model.is_ok() && findings.problems.len() > 50);
    assert!(flmm::lmm::open(dir.path(), DType::F32, CPU).is_err());
    assert_eq!(head_target(&dir.path().display().to_string()).unwrap().hidden_size, Some(48));
}

#[test]
fn impossible_shapes_are_refused_before_memory_is_taken() {
    for shape in [&[1i64 << 40, 1 << 40][..], &[1 << 40, 2], &[0, 2]] {
        let huge = pickles::tensor(pickles::storage("FloatStorage", "0", 4), 0, shape, &[1, 1]);
        let root = pickles::dict(&[("text_proj.weight", huge.clone()), ("mask_head.a", huge)]);
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("head.pth");
        std::fs::write(&file, pickles::archive(&pickles::pickle(root), &[("0", pickles::counting(4))]))
            .unwrap();
        assert!(convert_head(&file, &target(), &place.path().join("out"), false).is_err());
        assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 1);
    }
}

/// The name that the `transformers` library gives to the tensor that the public files call `name`.
fn in_transformers(name: &str) -> String {
    let mut name = name.to_owned();
    for (public, theirs) in [
        ("mask_decoder.output_upscaling.0", "mask_decoder.upscale_conv1"),
        ("mask_decoder.output_upscaling.1", "mask_decoder.upscale_layer_norm"),
        ("mask_decoder.output_upscaling.3", "mask_decoder.upscale_conv2"),
        ("mask_downscaling.0", "mask_embed.conv1"),
        ("mask_downscaling.1", "mask_embed.layer_norm1"),
        ("mask_downscaling.3", "mask_embed.conv2"),
        ("mask_downscaling.4", "mask_embed.layer_norm2"),
        ("mask_downscaling.6", "mask_embed.conv3"),
        ("point_embeddings", "point_embed"),
        (
            "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
            "shared_image_embedding.positional_embedding",
        ),
        ("image_encoder", "vision_encoder"),
        ("neck.0", "neck.conv1"),
        ("neck.1", "neck.layer_norm1"),
        ("neck.2", "neck.conv2"),
        ("neck.3", "neck.layer_norm2"),
        ("patch_embed.proj", "patch_embed.projection"),
        (".norm", ".layer_norm"),
        ("blocks", "layers"),
    ] {
        name = name.replace(public, theirs);
    }
    if name.contains("iou_prediction_head") || name.contains("output_hypernetworks_mlps") {
        for (public, theirs) in [("layers.0", "proj_in"), ("layers.2", "proj_out"), ("layers.1", "layers.0")]
        {
            name = name.replace(public, theirs);
        }
    }
    name
}

#[test]
fn a_sam_in_the_layout_of_transformers_is_the_same_sam() {
    let place = tempfile::tempdir().unwrap();
    let dir = common::golden_dir("lmm/_sam").unwrap();
    let original = load_checkpoint(dir.join("sam_vit_tiny.pth"), None, CPU).unwrap();
    let renamed: HashMap<String, Tensor> =
        original.iter().map(|(name, tensor)| (in_transformers(name), tensor.clone())).collect();
    assert_eq!(renamed.len(), original.len());
    assert!(!renamed.keys().any(|name| name.starts_with("image_encoder.")));
    std::fs::copy(dir.join(CONFIG_FILE), place.path().join(CONFIG_FILE)).unwrap();
    let file = place.path().join("model.pth");
    write(&file, &renamed, "FloatStorage", &[]);
    let (config, found) = flmm::sam::read_checkpoint(&file, CPU).unwrap();
    assert_eq!(config, SamConfig::from_file(&dir.join(CONFIG_FILE)).unwrap());
    same(&found, &original);
    Sam::open(&file, CPU).unwrap();
    // Converted, it has the public names.
    convert_sam(&file, &place.path().join("public"), false).unwrap();
    same(&load_checkpoint(place.path().join("public"), None, CPU).unwrap(), &original);
}
