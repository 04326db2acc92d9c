//! Folders that cannot be opened: one error that names the file and what is wrong, with a hint.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use common::{TestResult, golden_dir, json};
use flmm::Error;
use flmm::lmm::{Lmm, OpenOptions, open_with};
use flmm::weights::{load_safetensors, save_safetensors};
use image::RgbImage;
use serde_json::{Value, json};

/// A copy of a family's model folder that can be damaged.
struct Folder {
    place: tempfile::TempDir,
}

impl Folder {
    /// `None` if the family's fixture is not there.
    fn of(family: &str) -> TestResult<Option<Self>> {
        let Some(dir) = golden_dir(&format!("lmm/{family}/model")) else { return Ok(None) };
        let place = tempfile::tempdir()?;
        copy(&dir, place.path())?;
        Ok(Some(Self { place }))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    /// Changes a JSON file.
    fn edit(&self, name: &str, change: impl FnOnce(&mut Value)) -> TestResult {
        let mut value = json(&self.file(name))?;
        change(&mut value);
        Ok(std::fs::write(self.file(name), serde_json::to_string(&value)?)?)
    }

    /// Changes the tensors of a file.
    fn edit_tensors(&self, name: &str, change: impl FnOnce(&mut BTreeMap<String, Tensor>)) -> TestResult {
        let file = self.file(name);
        let tensors = load_safetensors(std::slice::from_ref(&file), None, &Device::Cpu)?;
        let mut tensors: BTreeMap<String, Tensor> = tensors.into_iter().collect();
        change(&mut tensors);
        Ok(save_safetensors(&file, &tensors, &BTreeMap::new())?)
    }

    fn open_at(&self, image_size: Option<usize>) -> flmm::Result<Box<dyn Lmm>> {
        let mut options = OpenOptions::new(DType::F32, &Device::Cpu);
        options.image_size = image_size;
        open_with(self.place.path(), &options)
    }

    fn open(&self) -> flmm::Result<Box<dyn Lmm>> {
        self.open_at(None)
    }

    /// Opening fails, says all of `words` and hints at what to do.
    #[track_caller]
    fn refused(&self, words: &[&str]) -> Error {
        refused(self.open(), words)
    }
}

#[track_caller]
fn refused<T>(result: flmm::Result<T>, words: &[&str]) -> Error {
    let Err(error) = result else { panic!("not refused: {words:?}") };
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "`{word}` is not in: {message}");
    }
    assert!(error.hint().is_some_and(|hint| !hint.is_empty()), "no hint: {message}");
    error
}

fn copy(from: &Path, to: &Path) -> TestResult {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let (path, target) = (entry?.path(), to.to_owned());
        let target = target.join(path.file_name().unwrap_or_default());
        if path.is_dir() {
            copy(&path, &target)?;
        } else {
            // Written, not copied: fixtures may be read-only.
            std::fs::write(target, std::fs::read(path)?)?;
        }
    }
    Ok(())
}

/// Takes a token out of a fast tokenizer's vocabulary.
fn remove_token(folder: &Folder, token: &str) -> TestResult {
    folder.edit("tokenizer.json", |tokenizer| {
        if let Some(added) = tokenizer["added_tokens"].as_array_mut() {
            added.retain(|entry| entry["content"] != token);
        }
        if let Some(vocabulary) = tokenizer["model"]["vocab"].as_object_mut() {
            vocabulary.remove(token);
        }
    })?;
    folder.edit("tokenizer_config.json", |config| {
        if let Some(added) = config["added_tokens_decoder"].as_object_mut() {
            added.retain(|_, entry| entry["content"] != token);
        }
    })
}

/// Sets `section.key` of `config.json`.
fn set(folder: &Folder, section: &str, key: &str, value: Value) -> TestResult {
    folder.edit("config.json", |config| config[section][key] = value)
}

const NEXT: &str = "llava_next_mistral";

#[test]
fn head_counts_that_do_not_fit_are_refused() -> TestResult {
    let Some(folder) = Folder::of(NEXT)? else { return Ok(()) };
    set(&folder, "text_config", "num_attention_heads", json!(5))?;
    folder.refused(&["config.json", "num_key_value_heads", "5 query heads"]);
    set(&folder, "text_config", "num_key_value_heads", json!(5))?;
    folder.refused(&["config.json", "text_config.num_attention_heads", "5 heads", "64"]);

    // Twice the heads of half the width: every projection of keys and values is named, with both shapes.
    set(&folder, "text_config", "num_attention_heads", json!(8))?;
    set(&folder, "text_config", "num_key_value_heads", json!(2))?;
    let error = folder.refused(&["layers.0.self_attn.k_proj.weight", "layers.2.self_attn.v_proj.weight"]);
    assert!(matches!(error, Error::Weights { .. }), "{error}");
    assert_eq!(error.to_string().matches("expected shape [16, 64], found [32, 64]").count(), 6, "{error}");

    set(&folder, "text_config", "num_attention_heads", json!(4))?;
    folder.open()?;
    set(&folder, "vision_config", "num_attention_heads", json!(5))?;
    folder.refused(&["vision_config.num_attention_heads", "5 heads", "48"]);
    Ok(())
}

#[test]
fn tokenizers_of_other_models_are_refused() -> TestResult {
    let Some(folder) = Folder::of(NEXT)? else { return Ok(()) };
    remove_token(&folder, "<image>")?;
    folder.refused(&["tokenizer.json", "`<image>`", "stands for the picture"]);

    let Some(folder) = Folder::of(NEXT)? else { return Ok(()) };
    folder.edit("config.json", |config| config["image_token_index"] = json!(7))?;
    folder.refused(&["image_token_index", "said to be 7", "409"]);

    // A decoder of a known type, but trained on another prompt.
    let Some(folder) = Folder::of(NEXT)? else { return Ok(()) };
    for name in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
        let text = std::fs::read_to_string(folder.file(name))?;
        std::fs::write(folder.file(name), text.replace("</s>", "<|end|>"))?;
    }
    folder.refused(&["tokenizer.json", "`</s>`", "between turns"]);
    Ok(())
}

#[test]
fn every_tensor_that_is_missing_or_misshapen_is_named_at_once() -> TestResult {
    let Some(folder) = Folder::of(NEXT)? else { return Ok(()) };
    folder.edit_tensors("model.safetensors", |tensors| {
        // What no layer in use reads may be absent.
        tensors.retain(|name, _| !name.contains("encoder.layers.1.") && !name.contains("post_layernorm"));
    })?;
    folder.open()?;
    folder.edit_tensors("model.safetensors", |tensors| {
        tensors.remove("image_newline");
    })?;
    folder.refused(&["tensor `image_newline` is missing: expected shape [64]"]);
    folder.edit_tensors("model.safetensors", |tensors| {
        tensors.remove("language_model.lm_head.weight");
        let bias = tensors["multi_modal_projector.linear_1.bias"].narrow(0, 0, 9).unwrap();
        tensors.insert("multi_modal_projector.linear_1.bias".into(), bias.contiguous().unwrap());
    })?;
    folder.refused(&[
        "tensor `image_newline` is missing",
        "tensor `language_model.lm_head.weight` is missing",
        "tensor `multi_modal_projector.linear_1.bias`: expected shape [64], found [9]",
    ]);
    Ok(())
}

#[test]
fn resolutions_are_checked() -> TestResult {
    let key = "image_grid_pinpoints";
    let Some(folder) = Folder::of(NEXT)? else { return Ok(()) };
    let set = |file: &str, value: Option<Value>| {
        folder.edit(file, |config| match (value, config.as_object_mut()) {
            (Some(value), _) => config[key] = value,
            (None, Some(map)) => drop(map.remove(key)),
            (None, None) => {}
        })
    };
    set("config.json", Some(json!([[70, 140]])))?;
    folder.refused(&["preprocessor_config.json", key, "[[70,140]] in config.json"]);
    // One of the two files is enough.
    set("preprocessor_config.json", None)?;
    folder.open()?;
    set("config.json", None)?;
    folder.refused(&[
        "preprocessor_config.json",
        "required key `image_grid_pinpoints` is missing",
        "70 pixels",
    ]);
    for (value, words) in [
        (json!([[70, 100]]), "multiples of 70"),
        (json!([[70, 70]]), "more than one crop"),
        (json!([[70, 70_000_000]]), "16384"),
        (json!([]), "multiples of 70"),
        (json!([70, 140]), "not a list of pairs"),
        (json!("any"), "not a list of pairs"),
    ] {
        set("preprocessor_config.json", Some(value))?;
        folder.refused(&["preprocessor_config.json", key, words]);
    }
    Ok(())
}

#[test]
fn settings_that_do_not_belong_together_are_refused() -> TestResult {
    let Some(folder) = Folder::of(NEXT)? else { return Ok(()) };
    folder.edit("preprocessor_config.json", |config| config["crop_size"] = json!(35))?;
    folder.refused(&["config.json", "70 × 70", "35 × 35"]);
    set(&folder, "text_config", "model_type", json!("qwen2"))?;
    folder.refused(&["text_config.model_type", "`qwen2`", "llama (Vicuna), mistral"]);
    Ok(())
}

#[test]
fn a_picture_without_tokens_is_refused() -> TestResult {
    let Some(folder) = Folder::of("llava_next_vicuna")? else { return Ok(()) };
    let lmm = folder.open()?;
    let error = refused(lmm.prepare_image(&RgbImage::new(1, 2000)), &["1 × 2000 pixels is too elongated"]);
    assert!(matches!(error, Error::Image { .. }), "{error}");
    refused(lmm.prepare_image(&RgbImage::new(0, 0)), &["no pixels"]);
    Ok(())
}

const DEEPSEEK: &str = "deepseek_vl_1_3b";
const DEEPSEEK_HYBRID: &str = "deepseek_vl_7b";

/// The sizes that a DeepSeek-VL folder gives for a tower's name.
fn tower<'a>(config: &'a mut Value, name: &str) -> &'a mut Value {
    &mut config["tiny_tower_overrides"][name]
}

#[test]
fn deepseek_head_counts_that_do_not_fit_are_refused() -> TestResult {
    let Some(folder) = Folder::of(DEEPSEEK)? else { return Ok(()) };
    set(&folder, "language_config", "num_attention_heads", json!(5))?;
    folder.refused(&["config.json", "language_config.num_key_value_heads", "5 query heads"]);
    set(&folder, "language_config", "num_key_value_heads", json!(5))?;
    folder.refused(&["config.json", "language_config.num_attention_heads", "5 heads", "48"]);

    let Some(folder) = Folder::of(DEEPSEEK)? else { return Ok(()) };
    folder.edit("config.json", |config| tower(config, "siglip_large_patch16_384")["heads"] = json!(5))?;
    folder.refused(&["tiny_tower_overrides.siglip_large_patch16_384.heads", "5 heads", "32"]);

    let Some(folder) = Folder::of(DEEPSEEK_HYBRID)? else { return Ok(()) };
    folder.edit("config.json", |config| tower(config, "sam_b_downsample")["heads"] = json!(5))?;
    folder.refused(&["config.json", "high tower", "num_heads"]);
    Ok(())
}

#[test]
fn deepseek_tokenizers_of_other_models_are_refused() -> TestResult {
    let Some(folder) = Folder::of(DEEPSEEK)? else { return Ok(()) };
    remove_token(&folder, "<image_placeholder>")?;
    folder.edit("special_tokens_map.json", |map| map["additional_special_tokens"] = json!([]))?;
    folder.refused(&["tokenizer.json", "`<image_placeholder>`", "stands for the picture"]);
    Ok(())
}

#[test]
fn deepseek_towers_that_are_not_known_are_refused() -> TestResult {
    let Some(folder) = Folder::of(DEEPSEEK)? else { return Ok(()) };
    let params =
        |change: fn(&mut Value)| folder.edit("config.json", |config| change(&mut config["vision_config"]));
    params(|vision| vision["params"]["model_name"] = json!("siglip_huge"))?;
    folder.refused(&["vision_config.params.model_name", "`siglip_huge`", "siglip_large_patch16_384"]);
    params(|vision| vision["params"]["model_name"] = json!("siglip_large_patch16_384"))?;
    folder.open()?;
    params(|vision| vision["params"]["select_layer"] = json!(-2))?;
    folder.refused(&["vision_config.params.select_layer", "-2"]);
    params(|vision| vision["cls"] = json!("ResNet"))?;
    folder.refused(&["vision_config.cls", "`ResNet`", "CLIPVisionTower, HybridVisionTower"]);

    let Some(folder) = Folder::of(DEEPSEEK_HYBRID)? else { return Ok(()) };
    folder.edit("config.json", |config| {
        config["vision_config"]["params"]["high_res_cfg"]["model_name"] = json!("sam_h");
    })?;
    folder.refused(&["high_res_cfg.model_name", "`sam_h`", "sam_b_downsample"]);
    Ok(())
}

#[test]
fn deepseek_sizes_out_of_range_are_refused() -> TestResult {
    for (key, value, words) in [
        ("downsample_channels", json!([32, 0]), "from 1 to 65536"),
        ("downsample_channels", json!(32), "a list of whole numbers"),
        ("downsample_channels", json!(vec![8; 9]), "more than 8"),
        ("global_attn_indexes", json!([99]), "global_attn_indexes"),
        ("mlp_ratio", json!(-1), "at most 64"),
        ("layers", json!(2000), "1024 layers"),
        ("window_size", json!(70_000), "window_size"),
    ] {
        let Some(folder) = Folder::of(DEEPSEEK_HYBRID)? else { return Ok(()) };
        folder.edit("config.json", |config| tower(config, "sam_b_downsample")[key] = value)?;
        folder.refused(&["config.json", words]);
    }
    let Some(folder) = Folder::of(DEEPSEEK_HYBRID)? else { return Ok(()) };
    folder.edit("config.json", |config| {
        config["vision_config"]["params"]["high_res_cfg"]["pixel_std"] = json!([1, 0, 1]);
    })?;
    folder.refused(&["high_res_cfg.pixel_std", "three usable numbers"]);
    Ok(())
}

#[test]
fn deepseek_settings_that_do_not_belong_together_are_refused() -> TestResult {
    let Some(folder) = Folder::of(DEEPSEEK)? else { return Ok(()) };
    let processor = "preprocessor_config.json";
    folder.edit(processor, |config| config["min_size"] = json!(0))?;
    folder.refused(&[processor, "min_size", "1 to 384"]);
    folder.edit(processor, |config| {
        (config["min_size"], config["image_size"]) = (json!(14), json!(1024));
    })?;
    folder.refused(&[processor, "1024 × 1024", "384 × 384"]);

    let Some(folder) = Folder::of(DEEPSEEK)? else { return Ok(()) };
    let aligner = |key: &'static str, value: Value| {
        folder.edit("config.json", |config| config["aligner_config"]["params"][key] = value)
    };
    aligner("depth", json!(3))?;
    folder.refused(&["aligner_config.params.depth", "3 layers"]);
    aligner("depth", json!(2))?;
    aligner("projector_type", json!("low_high_hybrid_split_mlp_gelu"))?;
    folder.refused(&["aligner_config.params.projector_type", "known: mlp_gelu"]);
    Ok(())
}

#[test]
fn deepseek_tensors_that_are_missing_are_named_at_once() -> TestResult {
    let Some(folder) = Folder::of(DEEPSEEK_HYBRID)? else { return Ok(()) };
    let unused = ["attn_pool", "high_layer_norm", "low_layer_norm"];
    folder.edit_tensors("model.safetensors", |tensors| {
        tensors.retain(|name, _| !unused.iter().any(|part| name.contains(part)));
    })?;
    folder.open()?;
    folder.edit_tensors("model.safetensors", |tensors| {
        tensors.retain(|name, _| !name.contains("neck_hd.1") && !name.contains("attn.qkv.bias"));
        tensors.remove("aligner.low_up_proj.bias");
    })?;
    folder.refused(&[
        "tensor `aligner.low_up_proj.bias` is missing: expected shape [32]",
        "tensor `vision_model.vision_tower_high.vision_tower.neck_hd.1.weight` is missing: expected shape [16]",
        "tensor `vision_model.vision_tower_high.vision_tower.blocks.3.attn.qkv.bias` is missing",
        "tensor `vision_model.vision_tower_low.vision_tower.blocks.1.attn.qkv.bias` is missing",
    ]);
    Ok(())
}

#[test]
fn hpt_folders_are_complete_and_known() -> TestResult {
    let Some(folder) = Folder::of("hpt_air")? else { return Ok(()) };
    let open = |side: usize| folder.open_at(Some(side));
    open(84)?;
    let projector = folder.file("projector/config.json");
    let text = std::fs::read(&projector)?;
    std::fs::remove_file(&projector)?;
    refused(open(84), &["incomplete", "no projector/config.json"]);
    std::fs::write(&projector, text)?;
    folder.edit("projector/config.json", |config| config["hidden_act"] = json!("relu"))?;
    refused(open(84), &["projector/config.json", "hidden_act", "`relu`"]);
    folder.edit("projector/config.json", |config| config["hidden_act"] = json!("gelu"))?;
    folder.edit("visual_encoder/config.json", |config| config["model_type"] = json!("dinov2"))?;
    refused(open(84), &["visual_encoder/config.json", "`dinov2`", "clip_vision_model, siglip_vision_model"]);
    Ok(())
}

#[test]
fn hpt_sizes_are_checked() -> TestResult {
    for family in ["hpt_air", "hpt_air_1_5"] {
        let Some(folder) = Folder::of(family)? else { return Ok(()) };
        for (side, words) in [
            (13, "patches of 14 × 14"),
            (90, "patches of 14 × 14"),
            (0, "patches of 14 × 14"),
            (14_000, "1000 × 1000 tokens"),
            (usize::MAX / 14 * 14, "tokens, more than"),
        ] {
            let error = refused(folder.open_at(Some(side)), &[words]);
            assert!(matches!(error, Error::Request { .. }), "{error}");
        }
        // The published size, where none is given.
        let lmm = folder.open()?;
        let side = if family == "hpt_air" { 392 } else { 448 };
        assert_eq!(lmm.spec().grid, (side / 14, side / 14));
        assert_eq!(lmm.prepare_image(&RgbImage::new(5, 3))?.pixel_values.dims(), [1, 3, side, side]);

        folder.edit("llm/config.json", |config| config["num_attention_heads"] = json!(7))?;
        refused(folder.open_at(Some(84)), &["llm/config.json", "7"]);
    }
    Ok(())
}

#[test]
fn tensors_of_all_hpt_folders_are_named_at_once() -> TestResult {
    for family in ["hpt_air", "hpt_air_1_5"] {
        let Some(folder) = Folder::of(family)? else { return Ok(()) };
        for (part, tensor) in [
            ("llm", "lm_head.weight"),
            ("visual_encoder", "vision_model.embeddings.position_embedding.weight"),
            ("projector", "model.2.bias"),
        ] {
            folder.edit_tensors(&format!("{part}/model.safetensors"), |tensors| {
                assert!(tensors.remove(tensor).is_some(), "{tensor}");
            })?;
        }
        refused(
            folder.open_at(Some(84)),
            &[
                "tensor `llm.lm_head.weight` is missing",
                "tensor `visual_encoder.vision_model.embeddings.position_embedding.weight` is missing",
                "tensor `projector.model.2.bias` is missing",
            ],
        );
    }
    Ok(())
}
