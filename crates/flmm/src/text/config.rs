//! What makes one Llama-shaped decoder differ from another.

use crate::config::Config;
use crate::error::Result;

/// Sizes and flavours of a decoder, from the `text_config` of a Hugging Face folder.
///
/// Published files leave out what equals the class default of the pinned library (`spec/models.md` §1), so the
/// defaults here are those of its `LlamaConfig`, `MistralConfig` and `GemmaConfig`.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Width inside the feed-forward blocks.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_layers: usize,
    /// Number of query heads.
    pub num_heads: usize,
    /// Number of key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Longest sequence.
    pub max_positions: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Epsilon of the RMS norms.
    pub rms_norm_eps: f64,
    /// Flavour of the RMS norms.
    pub norm: Norm,
    /// Activation of the feed-forward gate.
    pub activation: Activation,
    /// Whether the attention projections have biases.
    pub attention_bias: bool,
    /// Whether the output layer is the embedding table.
    pub tie_word_embeddings: bool,
    /// Factor on every input embedding, image features included (Gemma).
    pub embedding_scale: Option<f64>,
}

/// How an RMS norm applies its weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Norm {
    /// Normalise in f32, round, multiply by the weight in the model's type.
    Llama,
    /// Multiply by `1 + weight` in f32, then round (`spec/models.md` §8).
    Gemma,
}

/// Activation of the feed-forward gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x · σ(x)`
    Silu,
    /// The tanh approximation of GELU.
    GeluTanh,
}

const KNOWN: [&str; 3] = ["llama", "mistral", "gemma"];

impl DecoderConfig {
    /// Reads a decoder's configuration; `model_type` defaults to `llama`.
    ///
    /// Fails with the key's name when a value is out of range, when the decoder type is unknown, or when a
    /// feature is asked for that is not implemented (rotary scaling, other activations).
    pub fn from_config(config: &Config) -> Result<Self> {
        Self::of_type(config, config.text_or("model_type", "llama")?)
    }

    /// As [`DecoderConfig::from_config`], for a file whose `model_type` says what the decoder is part of.
    pub fn of_type(config: &Config, model_type: &str) -> Result<Self> {
        // (vocabulary, hidden, intermediate, layers, heads, kv heads if left out, positions)
        let (vocab, hidden, intermediate, layers, heads, kv, positions) = match model_type {
            "llama" => (32_000, 4096, 11_008, 32, 32, None, 2048),
            "mistral" => (32_000, 4096, 14_336, 32, 32, Some(8), 131_072),
            "gemma" => (256_000, 3072, 24_576, 28, 16, Some(16), 8192),
            other => {
                let known = KNOWN.join(", ");
                return Err(config.error(
                    "model_type",
                    format!("unknown decoder type `{other}`; known types: {known}"),
                    "use a model whose language model is of a known type",
                ));
            }
        };
        let gemma = model_type == "gemma";
        let hidden_size = config.size_or("hidden_size", hidden)?;
        let num_heads = config.size_or("num_attention_heads", heads)?;
        let kv_default = if config.mentions("num_key_value_heads") { None } else { kv };
        let num_kv_heads = config.size_or("num_key_value_heads", kv_default.unwrap_or(num_heads))?;
        if num_heads % num_kv_heads != 0 {
            return Err(config.error(
                "num_key_value_heads",
                format!("{num_kv_heads} does not divide the {num_heads} query heads"),
                "correct the value in the file",
            ));
        }
        if !gemma && !config.mentions("head_dim") && hidden_size % num_heads != 0 {
            return Err(config.error(
                "num_attention_heads",
                format!("{num_heads} heads do not divide the width {hidden_size}"),
                "correct the value in the file",
            ));
        }
        let head_dim = config.size_or("head_dim", if gemma { 256 } else { hidden_size / num_heads })?;
        if head_dim == 0 || head_dim % 2 != 0 {
            return Err(config.error(
                "head_dim",
                format!("rotary embedding needs an even head width, found {head_dim}"),
                "correct the value in the file",
            ));
        }
        let mut max_positions = config.size_or("max_position_embeddings", positions)?;
        // Within the window a sliding-window model is an ordinary one, so the window bounds the context.
        let window =
            if model_type == "mistral" && !config.mentions("sliding_window") { Some(4096) } else { None };
        if let Some(window) =
            config.get("sliding_window").map_or(Ok(window), |_| config.size("sliding_window").map(Some))?
        {
            max_positions = max_positions.min(window);
        }
        Ok(Self {
            vocab_size: config.size_or("vocab_size", vocab)?,
            hidden_size,
            intermediate_size: config.size_or("intermediate_size", intermediate)?,
            num_layers: config.layers_or("num_hidden_layers", layers)?,
            num_heads,
            num_kv_heads,
            head_dim,
            max_positions,
            rope_theta: rope_theta(config)?,
            rms_norm_eps: config.number_or("rms_norm_eps", 1e-6)?,
            norm: if gemma { Norm::Gemma } else { Norm::Llama },
            activation: activation(config, gemma)?,
            attention_bias: config.flag_or("attention_bias", false)?,
            tie_word_embeddings: config.flag_or("tie_word_embeddings", gemma)?,
            embedding_scale: gemma.then(|| (hidden_size as f64).sqrt()),
        })
    }

    /// Attention maps per plane of image tokens: one per layer and query head.
    pub fn maps(&self) -> usize {
        self.num_layers * self.num_heads
    }

    /// Values of the layers' matrices: what is read for every token generated, `lm_head` apart.
    pub fn layer_weights(&self) -> usize {
        let projections = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim;
        self.num_layers * self.hidden_size * (projections + 3 * self.intermediate_size)
    }

    /// Values of the embedding table, and of `lm_head` where it is another one.
    pub fn table_weights(&self) -> usize {
        (2 - usize::from(self.tie_word_embeddings)) * self.vocab_size * self.hidden_size
    }

    /// Floating-point operations of the products in reading `tokens` tokens at once, half of the attention masked;
    /// without logits.
    pub fn flops(&self, tokens: usize) -> f64 {
        let attention = self.num_layers * self.num_heads * self.head_dim * tokens;
        2.0 * (tokens * (self.layer_weights() + attention)) as f64
    }
}

/// `rope_theta`, which newer uploads keep in `rope_parameters`; any rotary scaling is refused.
fn rope_theta(config: &Config) -> Result<f64> {
    for key in ["rope_scaling", "rope_parameters"] {
        if config.get(key).is_none() {
            continue;
        }
        let rope = config.object(key)?;
        let kind = rope.text_or("rope_type", rope.text_or("type", "default")?)?;
        if kind != "default" {
            return Err(config.error(
                key,
                format!("rotary scaling `{kind}` is not supported"),
                "use a model without rotary scaling",
            ));
        }
        if rope.get("rope_theta").is_some() {
            return rope.number_or("rope_theta", 1e4);
        }
    }
    config.number_or("rope_theta", 1e4)
}

/// The pinned library ignores Gemma's `hidden_act` and reads `hidden_activation` (`spec/models.md` §8).
fn activation(config: &Config, gemma: bool) -> Result<Activation> {
    let (key, default) =
        if gemma { ("hidden_activation", "gelu_pytorch_tanh") } else { ("hidden_act", "silu") };
    match config.text_or(key, default)? {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        other => Err(config.error(
            key,
            format!("activation `{other}` is not supported; known: silu, gelu_pytorch_tanh"),
            "use a model with a known activation",
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Value, json};

    use super::*;

    fn read(value: Value) -> Result<DecoderConfig> {
        DecoderConfig::from_config(&Config::new(Path::new("config.json"), value)?)
    }

    #[test]
    fn sparse_files_get_the_published_sizes() -> Result<()> {
        // spec/models.md §1: LLaVA-1.5 and LLaVA-1.6-Mistral as their files are published.
        let vicuna = read(json!({ "model_type": "llama", "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5, "vocab_size": 32064 }))?;
        assert_eq!((vicuna.num_layers, vicuna.num_heads, vicuna.num_kv_heads), (32, 32, 32));
        assert_eq!((vicuna.hidden_size, vicuna.intermediate_size, vicuna.head_dim), (4096, 11_008, 128));
        assert_eq!((vicuna.rope_theta, vicuna.rms_norm_eps, vicuna.vocab_size), (1e4, 1e-5, 32_064));
        let mistral = read(json!({ "model_type": "mistral", "intermediate_size": 14336,
            "max_position_embeddings": 32768, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
            "rope_theta": 1e6, "sliding_window": null, "vocab_size": 32064 }))?;
        assert_eq!((mistral.num_kv_heads, mistral.rope_theta, mistral.max_positions), (8, 1e6, 32_768));
        assert_eq!(read(json!({ "model_type": "mistral" }))?.max_positions, 4096);
        let gemma = read(json!({ "model_type": "gemma", "hidden_size": 2048, "num_attention_heads": 8,
            "num_key_value_heads": 1, "num_hidden_layers": 18, "hidden_act": "gelu" }))?;
        assert_eq!((gemma.head_dim, gemma.norm, gemma.activation), (256, Norm::Gemma, Activation::GeluTanh));
        assert!(gemma.tie_word_embeddings);
        // With both tables and the norms, Vicuna-7B of 32,064 words: 6,738,939,904 values.
        let norms = 65 * vicuna.hidden_size;
        assert_eq!(vicuna.layer_weights() + vicuna.table_weights() + norms, 6_738_939_904);
        assert_eq!(vicuna.flops(1), 2.0 * (6_476_005_376.0 + 32.0 * 4096.0));
        Ok(())
    }

    #[test]
    fn what_is_not_implemented_is_refused_by_name() {
        for (value, words) in [
            (json!({ "model_type": "mamba" }), vec!["model_type", "mamba", "llama, mistral, gemma"]),
            (json!({ "rope_scaling": { "type": "linear", "factor": 2.0 } }), vec!["rope_scaling", "linear"]),
            (json!({ "hidden_act": "relu" }), vec!["hidden_act", "relu"]),
            (
                json!({ "num_attention_heads": 6, "num_key_value_heads": 4, "hidden_size": 12 }),
                vec!["num_key_value_heads"],
            ),
            (json!({ "num_attention_heads": 4, "hidden_size": 12 }), vec!["head_dim"]),
            (json!({ "num_attention_heads": 5, "hidden_size": 12 }), vec!["num_attention_heads", "5 heads"]),
        ] {
            let message = read(value.clone()).err().map(|error| error.to_string()).unwrap_or_default();
            for word in words {
                assert!(message.contains(word), "{value}: {message}");
            }
        }
    }
}
