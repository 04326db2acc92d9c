//! Published sizes of the models that are made with random weights.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::tokenizer;

/// Files of one folder: name and JSON content. Tensors follow from what the loader asks for.
pub(crate) type Folder = BTreeMap<&'static str, Value>;

/// A model to be made.
pub(crate) struct Recipe {
    /// What the user calls it.
    pub(crate) name: &'static str,
    /// The LMM's own folder.
    pub(crate) lmm: fn() -> Folder,
    /// Whether the CLIP and ConvNeXt towers lie in folders of their own.
    pub(crate) towers: bool,
}

/// Every model that can be made.
pub(crate) const RECIPES: [Recipe; 4] = [
    Recipe { name: "deepseek-vl-1.3b", lmm: deepseek_vl_1_3b, towers: false },
    Recipe { name: "llava-1.5-7b", lmm: llava_1_5_7b, towers: false },
    Recipe { name: "llava-1.6-vicuna-7b", lmm: llava_1_6_vicuna_7b, towers: false },
    Recipe { name: "mgm-hd-7b", lmm: mgm_hd_7b, towers: true },
];

/// The names, for the command line.
pub(crate) fn names() -> Vec<&'static str> {
    RECIPES.iter().map(|recipe| recipe.name).collect()
}

const CLIP_MEAN: [f64; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const CLIP_STD: [f64; 3] = [0.268_629_54, 0.261_302_58, 0.275_777_11];

fn clip_large() -> Value {
    json!({ "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
            "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
            "projection_dim": 768 })
}

fn clip_processor(pinpoints: bool) -> Value {
    let mut processor = json!({
        "image_processor_type": "CLIPImageProcessor", "crop_size": { "height": 336, "width": 336 },
        "size": { "shortest_edge": 336 }, "do_normalize": true, "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD, "rescale_factor": 1.0 / 255.0, "resample": 3,
    });
    if pinpoints {
        processor["image_grid_pinpoints"] = pinpoints_336();
        processor["image_processor_type"] = "LlavaNextImageProcessor".into();
    }
    processor
}

fn pinpoints_336() -> Value {
    json!([[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]])
}

fn vicuna(vocab: usize) -> Value {
    json!({ "model_type": "llama", "vocab_size": vocab, "hidden_size": 4096, "intermediate_size": 11008,
            "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5 })
}

fn llava(model_type: &str, pinpoints: bool) -> Folder {
    let mut config = json!({
        "model_type": model_type, "image_token_index": 32000, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu",
        "text_config": vicuna(32_064), "vision_config": clip_large(),
    });
    if pinpoints {
        config["image_grid_pinpoints"] = pinpoints_336();
        config["use_image_newline_parameter"] = true.into();
    }
    let special = [(1, "<s>"), (2, "</s>"), (32_000, "<image>"), (32_001, "<pad>")];
    Folder::from([
        ("config.json", config),
        ("preprocessor_config.json", clip_processor(pinpoints)),
        ("tokenizer.json", tokenizer::json(32_064, &special)),
        ("tokenizer_config.json", tokenizer::config("<s>", "</s>")),
    ])
}

fn llava_1_5_7b() -> Folder {
    llava("llava", false)
}

fn llava_1_6_vicuna_7b() -> Folder {
    llava("llava_next", true)
}

fn deepseek_vl_1_3b() -> Folder {
    let config = json!({
        "model_type": "multi_modality",
        "aligner_config": { "cls": "MlpProjector", "model_type": "aligner", "params": {
            "depth": 2, "input_dim": 1024, "n_embed": 2048, "projector_type": "mlp_gelu" } },
        "language_config": { "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632,
            "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 102_400,
            "max_position_embeddings": 16_384 },
        "vision_config": { "cls": "CLIPVisionTower", "model_type": "vision", "params": {
            "image_size": 384, "model_name": "siglip_large_patch16_384", "select_feature": "same",
            "select_layer": -1 } },
    });
    let processor = json!({
        "image_processor_type": "VLMImageProcessor", "image_size": 384, "min_size": 14, "do_normalize": true,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "rescale_factor": 1.0 / 255.0,
    });
    let (bos, eos) = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>");
    let special = [(100_000, bos), (100_001, eos), (100_015, "<image_placeholder>")];
    Folder::from([
        ("config.json", config),
        ("preprocessor_config.json", processor),
        ("tokenizer.json", tokenizer::json(102_400, &special)),
        ("tokenizer_config.json", tokenizer::config(bos, eos)),
    ])
}

fn mgm_hd_7b() -> Folder {
    let mut config = vicuna(32_000);
    let more = json!({
        "architectures": ["MGMLlamaForCausalLM"], "model_type": "mgm", "image_aspect_ratio": "pad",
        "image_grid": 2, "image_global": true, "image_size_aux": 1536, "mm_hidden_size": 1024,
        "mm_hidden_size_aux": 2880, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2, "mm_vision_tower": "openai-clip-vit-large-patch14-336",
        "mm_vision_tower_aux": "openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup",
        "optimize_vision_tower": false, "optimize_vision_tower_aux": false,
        "tokenizer_model_max_length": 4096,
    });
    if let (Value::Object(config), Value::Object(more)) = (&mut config, more) {
        config.extend(more);
    }
    Folder::from([
        ("config.json", config),
        ("tokenizer.json", tokenizer::json(32_000, &[(1, "<s>"), (2, "</s>")])),
        ("tokenizer_config.json", tokenizer::config("<s>", "</s>")),
    ])
}

/// The CLIP folder that Mini-Gemini needs beside its own.
pub(crate) fn clip_tower() -> Folder {
    Folder::from([
        (
            "config.json",
            json!({ "model_type": "clip", "vision_config": clip_large(),
            "vision_config_dict": clip_large() }),
        ),
        ("preprocessor_config.json", clip_processor(false)),
    ])
}

/// Names and shapes of OpenCLIP's ConvNeXt-L trunk (`spec/models.md` §8).
pub(crate) fn convnext_large() -> Vec<(String, Vec<usize>)> {
    let (depths, widths) = ([3, 3, 27, 3], [192, 384, 768, 1536]);
    let mut tensors = Vec::new();
    let mut add = |name: &str, shape: &[usize]| {
        tensors.push((format!("visual.trunk.{name}.weight"), shape.to_vec()));
        tensors.push((format!("visual.trunk.{name}.bias"), vec![shape[0]]));
    };
    add("stem.0", &[192, 3, 4, 4]);
    add("stem.1", &[192]);
    for (stage, (depth, width)) in depths.into_iter().zip(widths).enumerate() {
        if stage > 0 {
            add(&format!("stages.{stage}.downsample.0"), &[width / 2]);
            add(&format!("stages.{stage}.downsample.1"), &[width, width / 2, 2, 2]);
        }
        for block in 0..depth {
            let block = format!("stages.{stage}.blocks.{block}");
            add(&format!("{block}.conv_dw"), &[width, 1, 7, 7]);
            add(&format!("{block}.norm"), &[width]);
            add(&format!("{block}.mlp.fc1"), &[4 * width, width]);
            add(&format!("{block}.mlp.fc2"), &[width, 4 * width]);
        }
    }
    for (stage, (depth, width)) in depths.into_iter().zip(widths).enumerate() {
        for block in 0..depth {
            tensors.push((format!("visual.trunk.stages.{stage}.blocks.{block}.gamma"), vec![width]));
        }
    }
    tensors
}
