//! Mini-Gemini: where the towers are found, what is said about folders that do not work, texts that are cut off.

mod common;

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use common::{TestResult, golden_dir};
use flmm::grounder::{AttentionChoice, Caption, ModelPaths};
use flmm::image_input::read_image;
use flmm::lmm::{self, GROUNDING_INSTRUCTION, Lmm, OpenOptions, Turn};
use flmm::weights::{load_safetensors, save_safetensors};
use flmm::{Error, Grounder};
use serde_json::{Value, json};

const CLIP: &str = "clip-vit-large-patch14-336";
const CONVNEXT: &str = "openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup";

/// A copy of a recorded family that may be damaged: `model`, and the towers beside it under the names that its
/// `config.json` gives.
struct Copy {
    _folder: tempfile::TempDir,
    model: PathBuf,
}

impl Copy {
    fn of(family: &str) -> TestResult<Option<Self>> {
        let Some(source) = golden_dir(&format!("lmm/{family}")) else { return Ok(None) };
        let folder = tempfile::tempdir()?;
        let towers = [("model", "model"), ("openai-clip-vit-large-patch14-336", CLIP), (CONVNEXT, CONVNEXT)];
        for (from, to) in towers {
            copy(&source.join(from), &folder.path().join(to))?;
        }
        let model = folder.path().join("model");
        Ok(Some(Self { _folder: folder, model }))
    }

    fn open(&self, options: &OpenOptions) -> flmm::Result<Box<dyn Lmm>> {
        lmm::open_with(&self.model, options)
    }

    /// Sets a value of `config.json`.
    fn set(&self, key: &str, value: Value) -> TestResult {
        let file = self.model.join("config.json");
        let mut config = common::json(&file)?;
        config[key] = value;
        std::fs::write(&file, config.to_string())?;
        Ok(())
    }

    /// The error of opening and its hint.
    fn failure(&self, options: &OpenOptions) -> TestResult<(String, String)> {
        match self.open(options) {
            Ok(_) => Err("opened".into()),
            Err(error) => Ok((error.to_string(), error.hint().unwrap_or_default().to_owned())),
        }
    }
}

fn copy(from: &Path, to: &Path) -> TestResult {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let file = entry?.path();
        // Read and written, because recorded files may be write-protected.
        std::fs::write(to.join(file.file_name().unwrap_or_default()), std::fs::read(&file)?)?;
    }
    Ok(())
}

fn options() -> OpenOptions {
    OpenOptions::new(DType::F32, &Device::Cpu)
}

#[test]
fn towers_are_found_beside_and_inside_the_model() -> TestResult {
    let Some(copy) = Copy::of("mgm_2b")? else { return Ok(()) };
    copy.open(&options())?;
    let beside = copy.model.with_file_name(CONVNEXT);
    std::fs::rename(&beside, copy.model.join(CONVNEXT))?;
    copy.open(&options())?;

    // Given folders win, and are not replaced by others when they are wrong.
    let elsewhere = copy.model.with_file_name("elsewhere");
    std::fs::rename(copy.model.join(CONVNEXT), &elsewhere)?;
    copy.open(&OpenOptions { vision_tower_aux: Some(elsewhere), ..options() })?;
    let wrong = OpenOptions { vision_tower: Some("no/such/folder".into()), ..options() };
    assert!(copy.failure(&wrong)?.0.contains("no/such/folder"));

    // One error for everything that is missing.
    std::fs::remove_dir_all(copy.model.with_file_name(CLIP))?;
    let (what, hint) = copy.failure(&options())?;
    for word in [CLIP, CONVNEXT, "openai/clip-vit-large-patch14-336", "laion/CLIP-convnext_large_d_320"] {
        assert!(what.contains(word), "{what}");
    }
    assert!(hint.contains("beside the model's folder"), "{hint}");
    Ok(())
}

#[test]
fn clip_inside_the_model_wins() -> TestResult {
    let Some(copy) = Copy::of("mgm_7b")? else { return Ok(()) };
    // The folder's own weights are not even opened; its configuration is needed.
    let clip = copy.model.with_file_name(CLIP);
    std::fs::write(clip.join("pytorch_model.bin"), b"not a checkpoint")?;
    copy.open(&options())?;
    std::fs::remove_file(clip.join("config.json"))?;
    assert!(copy.failure(&options())?.0.contains("config.json"));
    Ok(())
}

#[test]
fn values_that_do_not_work_are_named() -> TestResult {
    for (family, key, value, words) in [
        // A head count that does not fit the tensors.
        ("mgm_2b", "num_attention_heads", json!(3), ["self_attn.q_proj.weight", "expected shape [48, 48]"]),
        ("mgm_7b_hd", "num_attention_heads", json!(5), ["num_key_value_heads", "does not divide"]),
        ("mgm_7b_hd", "image_grid", json!(3), ["image_grid", "known: 1, 2"]),
        ("mgm_7b_hd", "image_global", json!(false), ["image_global", "not supported"]),
        ("mgm_2b", "image_size_aux", json!(100), ["image_size_aux", "multiple of 32"]),
        ("mgm_2b", "image_size_aux", json!(1 << 20), ["image_size_aux", "at most 4096"]),
        ("mgm_2b", "mm_hidden_size", json!(1024), ["mm_hidden_size", "width 1024"]),
        ("mgm_2b", "mm_hidden_size_aux", json!(2880), ["mm_hidden_size_aux", "has 60"]),
        ("mgm_2b", "mm_projector_type", json!("linear"), ["mm_projector_type", "mlp2x_gelu"]),
        ("mgm_2b", "optimize_vision_tower_aux", json!(true), ["optimize_vision_tower_aux", "not supported"]),
        (
            "mgm_2b",
            "tokenizer_model_max_length",
            json!("long"),
            ["tokenizer_model_max_length", "whole number"],
        ),
        ("mgm_2b", "mm_vision_select_layer", json!(-9), ["vision_feature_layer", "-9"]),
        ("mgm_2b", "hidden_size", json!(0), ["hidden_size", "whole number"]),
    ] {
        let Some(copy) = Copy::of(family)? else { continue };
        copy.set(key, value.clone())?;
        let (what, hint) = copy.failure(&options())?;
        assert!(
            words.iter().all(|word| what.contains(word)) && !hint.is_empty(),
            "{key} {value}: {what}\n{hint}"
        );
    }
    Ok(())
}

#[test]
fn missing_tensors_are_all_named() -> TestResult {
    let Some(copy) = Copy::of("mgm_2b")? else { return Ok(()) };
    // The model: two tensors less.
    let shard = copy.model.join("model-00002-of-00002.safetensors");
    let mut tensors = load_safetensors(std::slice::from_ref(&shard), None, &Device::Cpu)?;
    let gone = ["model.vlm_uni_val_projector.1.bias", "model.mm_projector.2.weight"];
    assert!(gone.iter().all(|name| tensors.remove(*name).is_some()));
    let all = load_safetensors(&[copy.model.join("model-00001-of-00002.safetensors")], None, &Device::Cpu)?;
    std::fs::remove_file(copy.model.join("model.safetensors.index.json"))?;
    tensors.extend(all);
    let file = copy.model.join("model.safetensors");
    save_safetensors(&file, &tensors.into_iter().collect(), &Default::default())?;
    let (what, hint) = copy.failure(&options())?;
    assert!(gone.iter().all(|name| what.contains(name)) && hint.contains("download"), "{what}");

    // Towers: each folder in the place of the other.
    let Some(copy) = Copy::of("mgm_2b")? else { return Ok(()) };
    let (clip, convnext) = (copy.model.with_file_name(CLIP), copy.model.with_file_name(CONVNEXT));
    let swapped = OpenOptions { vision_tower_aux: Some(clip.clone()), ..options() };
    let (what, hint) = copy.failure(&swapped)?;
    assert!(what.contains("visual.trunk.stem.0.weight` is missing"), "{what}");
    assert!(hint.contains("laion/CLIP-convnext_large_d_320"), "{hint}");
    std::fs::copy(convnext.join("open_clip_pytorch_model.bin"), clip.join("pytorch_model.bin"))?;
    let (what, hint) = copy.failure(&options())?;
    assert!(what.contains("vision_model.embeddings.class_embedding` is missing"), "{what}");
    assert!(hint.contains("openai/clip-vit-large-patch14-336"), "{hint}");

    // A tower whose width is nonsense.
    let Some(copy) = Copy::of("mgm_2b")? else { return Ok(()) };
    let convnext = copy.model.with_file_name(CONVNEXT);
    let empty = Tensor::zeros(0, DType::F32, &Device::Cpu)?;
    let nonsense = [("visual.trunk.stages.0.blocks.0.gamma".to_owned(), empty)].into();
    std::fs::remove_file(convnext.join("open_clip_pytorch_model.bin"))?;
    save_safetensors(convnext.join("open_clip_model.safetensors"), &nonsense, &Default::default())?;
    let (what, _) = copy.failure(&options())?;
    assert!(what.contains("visual.trunk.stages.0.blocks.0.gamma`: expected shape [192]"), "{what}");
    Ok(())
}

#[test]
fn tokenizers_that_do_not_work_are_refused() -> TestResult {
    let Some(copy) = Copy::of("mgm_2b")? else { return Ok(()) };
    let file = copy.model.join("tokenizer.json");
    let text = std::fs::read_to_string(&file)?;
    std::fs::write(&file, text.replace("<end_of_turn>", "<end_of_turf>"))?;
    let settings = copy.model.join("tokenizer_config.json");
    let told = std::fs::read_to_string(&settings)?;
    std::fs::write(&settings, told.replace("<end_of_turn>", "<end_of_turf>"))?;
    let (what, hint) = copy.failure(&options())?;
    assert!(what.contains("<end_of_turn>") && hint.contains("tokenizer"), "{what}\n{hint}");
    std::fs::write(&file, &text[..text.len() / 2])?;
    assert!(copy.failure(&options())?.0.contains("not a tokenizer file"));
    std::fs::remove_file(&file)?;
    assert!(copy.failure(&options())?.0.contains("no such file"));
    Ok(())
}

#[test]
fn a_picture_prepared_for_another_model_is_refused() -> TestResult {
    let Some(copy) = Copy::of("mgm_7b")? else { return Ok(()) };
    let model = copy.open(&options())?;
    let mut image = model.prepare_image(&image::RgbImage::new(20, 30))?;
    model.image_features(&image)?;
    image.pixel_values_aux = None;
    assert!(matches!(model.image_features(&image), Err(Error::Image { .. })));
    assert!(matches!(model.prepare_image(&image::RgbImage::new(0, 3)), Err(Error::Image { .. })));
    Ok(())
}

#[test]
fn long_captions_are_cut_where_the_model_stops_reading() -> TestResult {
    let Some(copy) = Copy::of("mgm_7b_hd")? else { return Ok(()) };
    let (Some(family), Some(sam)) = (golden_dir("lmm/mgm_7b_hd"), golden_dir("lmm/_sam")) else {
        return Ok(());
    };
    let paths = ModelPaths {
        model: copy.model.clone(),
        sam: sam.join("sam_vit_tiny.pth"),
        head: Some(family.join("heads.safetensors")),
    };
    let picture = read_image(family.join("images/a.png"))?;
    let open = |limit: usize| -> TestResult<Grounder> {
        copy.set("tokenizer_model_max_length", json!(limit))?;
        Ok(Grounder::open(&paths, &Device::Cpu, DType::F32)?)
    };
    let whole = open(4096)?;
    let tokenizer = whole.lmm().tokenizer();
    let caption = Caption::from_expressions(tokenizer, ["a red square", "the blue circle", "sky"])?;
    let phrases = caption.phrases()?;
    let expected = whole.observe(&picture, &caption)?;
    let prompt = whole.lmm().prepare(&picture, &[Turn::user(GROUNDING_INSTRUCTION)])?.token_ids.len();

    // One token of the last phrase is still read: all phrases have maps, the first two the same as before.
    let kept = phrases[2][0] + 1;
    let cut = open(prompt + kept)?;
    let found = cut.observe(&picture, &caption)?;
    assert_eq!(found.phrases, [phrases[0].clone(), phrases[1].clone(), vec![kept - 1]]);
    assert_eq!(found.hidden.dim(1)?, kept);
    let (a, b) = (found.maps.narrow(0, 0, 2)?, expected.maps.narrow(0, 0, 2)?);
    assert!(common::max_abs_diff(&a, &b)? < 1e-6);

    // Of a text whose end is not read, all tokens are those that are.
    let choice = AttentionChoice {
        tokens: Vec::new(),
        layers: vec![0],
        heads: vec![0],
        mean: false,
        most_values: usize::MAX,
    };
    let (turns, text) = ([Turn::user(GROUNDING_INSTRUCTION)], "a red square. ".repeat(20));
    let read = cut.token_attention(&mut cut.start(&picture)?, 0, &turns, &text, &choice)?;
    assert_eq!((read.tokens.len(), read.offsets.len(), read.maps.dim(0)?), (kept, kept, kept));

    // The last phrase is lost: an error that says so. The prompt itself is never cut.
    let message = |limit: usize| -> TestResult<String> {
        match open(limit)?.observe(&picture, &caption) {
            Ok(_) => Err("observed".into()),
            Err(error) => Ok(error.to_string()),
        }
    };
    assert!(message(prompt + kept - 1)?.contains("phrase 2 is skipped"), "{}", message(prompt + kept - 1)?);
    assert!(message(prompt)?.contains("context holds"), "{}", message(prompt)?);
    Ok(())
}
