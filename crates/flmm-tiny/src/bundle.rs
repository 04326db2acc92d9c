//! Stage `bundle`: the trained parts as the folders that `flmm` opens: `lmm/` (a Hugging Face LLaVA folder),
//! `sam/` and `head/`.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use candle_core::{DType, Tensor};
use serde_json::json;

use crate::config::{LAYER_NORM_EPS, LmmSizes, RMS_NORM_EPS, ROPE_THETA};
use crate::stage_sam;
use crate::text::SPECIAL;

/// Longest sequence the decoder is used with.
const CONTEXT: usize = 512;

/// Writes `lmm/` with f16 weights.
pub(crate) fn lmm(
    folder: &Path,
    sizes: &LmmSizes,
    tensors: &BTreeMap<String, Tensor>,
    tokenizer: &str,
) -> Result<()> {
    let config = json!({
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": 3,
        "projector_hidden_act": "gelu",
        "torch_dtype": "float16",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "vocab_size": sizes.vocab,
        "text_config": {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": sizes.vocab,
            "hidden_size": sizes.width,
            "intermediate_size": sizes.ffn,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": RMS_NORM_EPS,
            "rope_theta": ROPE_THETA,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": sizes.tower_width,
            "intermediate_size": sizes.tower_ffn,
            "num_hidden_layers": sizes.tower_layers,
            "num_attention_heads": sizes.tower_heads,
            "image_size": sizes.image_size,
            "patch_size": sizes.patch_size,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": LAYER_NORM_EPS,
            "projection_dim": sizes.tower_width,
        },
    });
    let side = json!({ "height": sizes.image_size, "width": sizes.image_size });
    let preprocessor = json!({
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": side,
        "size": { "shortest_edge": sizes.image_size },
        "do_normalize": true,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "rescale_factor": 1.0 / 255.0,
        "resample": 3,
    });
    let tokenizer_config = json!({
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": true,
        "add_eos_token": false,
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "unk_token": SPECIAL[0],
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": false,
    });
    std::fs::create_dir_all(folder)?;
    text(&folder.join("config.json"), &serde_json::to_string_pretty(&config)?)?;
    text(&folder.join("preprocessor_config.json"), &serde_json::to_string_pretty(&preprocessor)?)?;
    text(&folder.join("tokenizer_config.json"), &serde_json::to_string_pretty(&tokenizer_config)?)?;
    text(&folder.join("tokenizer.json"), tokenizer)?;
    weights(&folder.join("model.safetensors"), tensors)
}

/// Writes `sam/`: the whole small SAM.
pub(crate) fn sam(folder: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    std::fs::create_dir_all(folder)?;
    text(&folder.join("sam_config.json"), &serde_json::to_string_pretty(&stage_sam::config())?)?;
    weights(&folder.join("sam.safetensors"), tensors)
}

/// Writes `head/`: the trained part, named as released heads are.
pub(crate) fn head(folder: &Path, sizes: &LmmSizes, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let about = json!({
        "format": 1,
        "lmm": "flmm-tiny",
        "channels": sizes.layers * sizes.heads,
        "refiner": "sam",
        "merge": "mean",
        "licence": "MIT OR Apache-2.0",
    });
    std::fs::create_dir_all(folder)?;
    text(&folder.join("head.json"), &serde_json::to_string_pretty(&about)?)?;
    weights(&folder.join("head.safetensors"), tensors)
}

fn text(file: &Path, content: &str) -> Result<()> {
    Ok(flmm::atomic::write(file, |to| to.write_all(content.as_bytes()))?)
}

fn weights(file: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    Ok(flmm::weights::save_safetensors_as(file, tensors, Some(DType::F16), &metadata)?)
}
