//! Checkpoints that are damaged, incomplete or another model's, and uploads of one model under several names.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use common::{TestResult, golden_dir, json, max_abs_diff, tiny_sam};
use flmm::Grounder;
use flmm::grounder::ModelPaths;
use flmm::lmm::{self, Lmm, Turn};
use flmm::text::KvCache;
use flmm::weights::{load_checkpoint, save_safetensors};
use image::RgbImage;
use serde_json::{Value, json};

const CPU: &Device = &Device::Cpu;
const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

type Tensors = BTreeMap<String, Tensor>;

/// A copy of a recorded LLaVA-1.5 without weights, and its weights.
struct Copy {
    folder: tempfile::TempDir,
    tensors: Tensors,
}

impl Copy {
    fn new() -> TestResult<Option<Self>> {
        let Some(source) = golden_dir("lmm/llava15/model") else { return Ok(None) };
        let folder = tempfile::tempdir()?;
        for entry in std::fs::read_dir(&source)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                // Read and written, because recorded files may be write-protected.
                std::fs::write(
                    folder.path().join(path.file_name().unwrap_or_default()),
                    std::fs::read(&path)?,
                )?;
            }
        }
        let tensors = load_checkpoint(&source, None, CPU)?.into_iter().collect();
        Ok(Some(Self { folder, tensors }))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, tensors: &Tensors) -> TestResult {
        Ok(save_safetensors(self.file(name), tensors, &BTreeMap::new())?)
    }

    /// Writes the weights as two shards, each with every other tensor, and their index.
    fn write_shards(&self) -> TestResult<[Tensors; 2]> {
        let mut shards = [Tensors::new(), Tensors::new()];
        let mut map = serde_json::Map::new();
        for (i, (name, tensor)) in self.tensors.iter().enumerate() {
            shards[i % 2].insert(name.clone(), tensor.clone());
            map.insert(name.clone(), SHARDS[i % 2].into());
        }
        for (name, tensors) in SHARDS.iter().zip(&shards) {
            self.write(name, tensors)?;
        }
        let index = json!({ "metadata": {}, "weight_map": map });
        std::fs::write(self.file("model.safetensors.index.json"), index.to_string())?;
        Ok(shards)
    }

    fn open(&self) -> flmm::Result<Box<dyn Lmm>> {
        lmm::open(self.folder.path(), DType::F32, CPU)
    }

    /// Opening fails with one error that has a hint and says all of `words`.
    #[track_caller]
    fn refused(&self, words: &[&str]) -> String {
        refused(self.open(), words)
    }

    /// Sets a size of the decoder in `config.json`.
    fn set(&self, key: &str, value: Value) -> TestResult {
        let mut config = json(&self.file("config.json"))?;
        config["text_config"][key] = value;
        Ok(std::fs::write(self.file("config.json"), config.to_string())?)
    }
}

#[track_caller]
fn refused<T>(result: flmm::Result<T>, words: &[&str]) -> String {
    let Err(error) = result else { panic!("not refused: {words:?}") };
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "`{word}` is not in: {message}");
    }
    assert!(error.hint().is_some_and(|hint| !hint.is_empty()), "no hint: {message}");
    message
}

/// Logits behind a question about a grey picture.
fn logits(lmm: &dyn Lmm) -> TestResult<Tensor> {
    let picture = RgbImage::from_pixel(40, 30, image::Rgb([90, 120, 150]));
    let prepared = lmm.prepare(&picture, &[Turn::user("What is it?")])?;
    let mut cache = KvCache::new(lmm.decoder().config(), 8);
    let hidden = lmm.decoder().forward(&lmm.embed(&prepared)?, &mut cache, None)?;
    Ok(lmm.decoder().logits(&hidden)?)
}

#[test]
fn shards_that_are_truncated_missing_or_of_another_download_are_named() -> TestResult {
    let Some(copy) = Copy::new()? else { return Ok(()) };
    let shards = copy.write_shards()?;
    copy.open()?;

    // Truncated, in the middle of the tensors and in the middle of the header.
    let whole = std::fs::read(copy.file(SHARDS[1]))?;
    for length in [whole.len() - 100, 20] {
        std::fs::write(copy.file(SHARDS[1]), &whole[..length])?;
        copy.refused(&[SHARDS[1], "truncated"]);
    }
    std::fs::remove_file(copy.file(SHARDS[1]))?;
    copy.refused(&[SHARDS[1]]);

    // Two shards that disagree: one tensor in both, with other values and another shape.
    let name = shards[0].keys().next().ok_or("no tensor")?;
    let mut other = shards[1].clone();
    other.insert(name.clone(), Tensor::zeros(3, DType::F32, CPU)?);
    copy.write(SHARDS[1], &other)?;
    copy.refused(&[SHARDS[1], name, "also in another shard"]);

    // A shard without a tensor that the index says it has.
    let mut less = shards[1].clone();
    let (lost, _) = less.pop_last().ok_or("no tensor")?;
    copy.write(SHARDS[1], &less)?;
    copy.refused(&["index", &lost]);
    Ok(())
}

#[test]
fn missing_misshapen_and_unexpected_tensors_come_in_one_error() -> TestResult {
    let Some(copy) = Copy::new()? else { return Ok(()) };
    let mut tensors = copy.tensors.clone();
    let layer = "language_model.model.layers.0.";
    tensors.remove(&format!("{layer}mlp.up_proj.weight"));
    tensors.insert(format!("{layer}input_layernorm.weight"), Tensor::zeros(7, DType::F32, CPU)?);
    tensors.insert(format!("{layer}self_attn.q_proj.bias"), Tensor::zeros(48, DType::F32, CPU)?);
    // Constants that old uploads carry along, and parts that no model of the family has, do no harm.
    tensors.insert(format!("{layer}self_attn.rotary_emb.inv_freq"), Tensor::zeros(4, DType::F32, CPU)?);
    tensors.insert(
        "vision_tower.vision_model.embeddings.position_ids".into(),
        Tensor::zeros(4, DType::I64, CPU)?,
    );
    tensors.insert("score.weight".into(), Tensor::zeros(4, DType::F32, CPU)?);
    copy.write("model.safetensors", &tensors)?;
    let message = copy.refused(&[
        "tensor `language_model.model.layers.0.mlp.up_proj.weight` is missing",
        "tensor `language_model.model.layers.0.input_layernorm.weight`: expected shape [48], found [7]",
        "unexpected tensor `language_model.model.layers.0.self_attn.q_proj.bias`",
    ]);
    assert_eq!(message.lines().count(), 3, "{message}");
    Ok(())
}

#[test]
fn a_config_with_other_counts_is_refused() -> TestResult {
    let Some(copy) = Copy::new()? else { return Ok(()) };
    copy.write("model.safetensors", &copy.tensors)?;
    let config = json(&copy.file("config.json"))?["text_config"].clone();
    let (layers, heads) = (config["num_hidden_layers"].as_u64(), config["num_attention_heads"].as_u64());
    let (Some(layers), Some(heads)) = (layers, heads) else { return Err("sizes are not written".into()) };

    // A layer too few would go unnoticed otherwise; one too many is missing.
    copy.set("num_hidden_layers", json!(layers - 1))?;
    let last = format!("unexpected tensor `language_model.model.layers.{}.mlp.gate_proj.weight`", layers - 1);
    copy.refused(&[&last]);
    copy.set("num_hidden_layers", json!(layers + 1))?;
    copy.refused(&[&format!(
        "tensor `language_model.model.layers.{layers}.mlp.gate_proj.weight` is missing"
    )]);
    copy.set("num_hidden_layers", json!(layers))?;
    copy.set("num_attention_heads", json!(heads + 1))?;
    copy.refused(&["config.json", "heads"]);
    Ok(())
}

#[test]
fn older_and_newer_names_of_one_model_are_the_same_model() -> TestResult {
    let Some(copy) = Copy::new()? else { return Ok(()) };
    copy.write("model.safetensors", &copy.tensors)?;
    let expected = logits(copy.open()?.as_ref())?;
    let newer = |name: &str| match name {
        "language_model.lm_head.weight" => "lm_head.weight".to_owned(),
        name => match name.strip_prefix("language_model.model.") {
            Some(rest) => format!("model.language_model.{rest}"),
            None => format!("model.{name}"),
        },
    };
    // Newer still: the tower's inner name is left out.
    let newest = |name: &str| newer(name).replace("vision_tower.vision_model.", "vision_tower.");
    let names: [&dyn Fn(&str) -> String; 2] = [&newer, &newest];
    for rename in names {
        let renamed: Tensors =
            copy.tensors.iter().map(|(name, tensor)| (rename(name), tensor.clone())).collect();
        assert!(renamed.keys().all(|name| !copy.tensors.contains_key(name)));
        copy.write("model.safetensors", &renamed)?;
        assert_eq!(max_abs_diff(&logits(copy.open()?.as_ref())?, &expected)?, 0.0);
    }
    Ok(())
}

/// The released head with some tensors of the shapes that another LMM's head has.
fn open_with_head(change: impl FnOnce(&mut Tensors)) -> TestResult<Option<flmm::Result<Grounder>>> {
    let (Some(family), Some(sam)) = (golden_dir("lmm/llava15"), golden_dir("lmm/_sam")) else {
        return Ok(None);
    };
    let place = tempfile::tempdir()?;
    let mut tensors: Tensors = load_checkpoint(family.join("heads.pth"), None, CPU)?.into_iter().collect();
    change(&mut tensors);
    let head = place.path().join("head.safetensors");
    save_safetensors(&head, &tensors, &BTreeMap::new())?;
    let paths = ModelPaths { model: family.join("model"), sam: tiny_sam(&sam)?, head: Some(head) };
    Ok(Some(Grounder::open(&paths, CPU, DType::F32)))
}

#[test]
fn a_head_that_was_trained_for_another_lmm_is_refused() -> TestResult {
    let Some(opened) = open_with_head(|_| {})? else { return Ok(()) };
    opened?;
    let wider = |tensors: &mut Tensors, name: &str, axis: usize| {
        let tensor = &tensors[name];
        let twice = Tensor::cat(&[tensor, tensor], axis).unwrap();
        tensors.insert(name.to_owned(), twice);
    };
    let names = [
        ("mask_head.encoder.0.0.convs.0.conv.weight", 1),
        ("text_proj.weight", 1),
        ("text_layer_weights", 0),
    ];
    let result = open_with_head(|tensors| {
        for (name, axis) in names {
            wider(tensors, name, axis);
        }
    })?;
    let Some(Err(error)) = result else { return Err("a head of another model was taken".into()) };
    let message = error.to_string();
    for (name, _) in names {
        assert!(message.contains(&format!("tensor `{name}`: expected shape")), "{message}");
    }
    assert_eq!(message.lines().count(), names.len(), "{message}");
    assert_eq!(error.hint(), Some("use the grounding head that was trained for this model"));
    assert!(
        Path::new(&message[..message.find(": ").unwrap_or(0)]).ends_with("head.safetensors"),
        "{message}"
    );
    Ok(())
}
