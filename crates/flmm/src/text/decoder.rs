//! The one Llama-shaped decoder: Llama, Vicuna, Mistral, Yi, Llama-3 and Gemma differ only by configuration.

use candle_core::{D, DType, Device, Tensor};

use crate::capture::Capture;
use crate::error::{Error, Result};
use crate::nn::{Linear, gelu_tanh, residual, rms_norm, silu_mul};
use crate::text::rope::Rotation;
use crate::text::{Activation, DecoderConfig, KvCache, Norm, Rope, attend};
use crate::weights::Params;

/// A frozen decoder: embeddings in, hidden states and logits out.
#[derive(Debug)]
pub struct Decoder {
    config: DecoderConfig,
    rope: Rope,
    /// `[vocabulary, hidden]`
    embed_tokens: Tensor,
    layers: Vec<Layer>,
    norm: RmsNorm,
    lm_head: Linear,
}

impl Decoder {
    /// Reads `model.embed_tokens`, `model.layers.N.…`, `model.norm` and, unless tied, `lm_head`.
    pub fn load(config: DecoderConfig, params: &Params) -> Result<Self> {
        let model = params.pp("model");
        let embed_tokens =
            model.pp("embed_tokens").get(&[config.vocab_size, config.hidden_size], "weight")?;
        let below = model.pp("layers").in_layers();
        let layers = (0..config.num_layers).map(|index| Layer::load(&config, &below.pp(index)));
        let layers = layers.collect::<Result<_>>()?;
        below.claim(&["rotary_emb."]);
        let norm = RmsNorm::load(&config, &model.pp("norm"))?;
        let lm_head = if config.tie_word_embeddings {
            Linear::new(embed_tokens.clone(), None)
        } else {
            Linear::load(config.hidden_size, config.vocab_size, false, &params.pp("lm_head"))?
        };
        let rope = Rope::new(config.rope_theta, config.head_dim);
        Ok(Self { config, rope, embed_tokens, layers, norm, lm_head })
    }

    /// Sizes and flavours.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Type of the weights and of everything computed.
    pub fn dtype(&self) -> DType {
        self.embed_tokens.dtype()
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        self.embed_tokens.device()
    }

    /// Embeddings `[T, hidden]` of `ids`; an id beyond the table is an error.
    pub fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.config.vocab_size) {
            return Err(Error::request(
                format!("token id {id} is beyond the embedding table of {} rows", self.config.vocab_size),
                "use the tokenizer that belongs to the model",
            ));
        }
        let ids = Tensor::from_slice(ids, ids.len(), self.device())?;
        Ok(self.embed_tokens.index_select(&ids, 0)?)
    }

    /// Reads `embeds [T, hidden]` behind the tokens in `cache` and returns their final-normed hidden states
    /// `[T, hidden]`.
    ///
    /// `capture` keeps what grounding needs of the rows it was made for; it never changes what is computed.
    /// Fails when the sequence would outgrow the context.
    pub fn forward(
        &self,
        embeds: &Tensor,
        cache: &mut KvCache,
        capture: Option<&mut Capture>,
    ) -> Result<Tensor> {
        self.run(embeds, cache, capture, 0)
    }

    /// As [`Decoder::forward`], but returns the state of the last token alone, `[1, hidden]`.
    ///
    /// Of all other rows that `capture` does not want the last layer computes only keys and values.
    pub fn read(
        &self,
        embeds: &Tensor,
        cache: &mut KvCache,
        capture: Option<&mut Capture>,
    ) -> Result<Tensor> {
        let last = embeds.dim(0)?.saturating_sub(1);
        let wanted = capture.as_ref().map_or(last, |capture| capture.first_from(cache.len()));
        let states = self.run(embeds, cache, capture, wanted.min(last))?;
        Ok(states.narrow(0, states.dim(0)? - 1, 1)?)
    }

    /// The states of the rows from `wanted` on: the last layer leaves out what only the others need.
    fn run(
        &self,
        embeds: &Tensor,
        cache: &mut KvCache,
        mut capture: Option<&mut Capture>,
        wanted: usize,
    ) -> Result<Tensor> {
        let (tokens, _) = embeds.dims2()?;
        let start = cache.len();
        if start + tokens > self.config.max_positions {
            return Err(too_long(start + tokens, self.config.max_positions));
        }
        let rotation = self.rope.rotation(start, tokens, self.dtype(), self.device())?;
        let mut hidden = embeds.to_dtype(self.dtype())?;
        if let Some(scale) = self.config.embedding_scale {
            // The factor itself is rounded to the model's type (spec/models.md §8).
            let scale = Tensor::new(scale as f32, self.device())?.to_dtype(self.dtype())?;
            hidden = hidden.broadcast_mul(&scale)?;
        }
        if let Some(capture) = capture.as_deref_mut() {
            capture.keep_hidden(0, start, &hidden)?;
        }
        for (index, layer) in self.layers.iter().enumerate() {
            let is_last = index + 1 == self.layers.len();
            let from = if is_last { wanted } else { 0 };
            let attended = layer.attention.forward(
                &layer.input_layernorm.forward(&hidden)?,
                &rotation,
                (index, &mut *cache),
                from,
                capture.as_deref_mut(),
            )?;
            hidden = residual(&hidden.narrow(0, from, tokens - from)?, &attended)?;
            let fed = layer.mlp.forward(&layer.post_attention_layernorm.forward(&hidden)?)?;
            hidden = residual(&hidden, &fed)?;
            // The last state is kept after the final norm instead (spec/pipeline.md §2.4).
            if let Some(capture) = capture.as_deref_mut()
                && !is_last
            {
                capture.keep_hidden(index + 1, start, &hidden)?;
            }
        }
        cache.advance(tokens);
        let hidden = self.norm.forward(&hidden)?;
        if let Some(capture) = capture {
            capture.keep_hidden(self.layers.len(), start + wanted, &hidden)?;
        }
        Ok(hidden)
    }

    /// Logits `[R, vocabulary]` in f32 of final-normed states `[R, hidden]`.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(self.lm_head.forward(hidden)?.to_dtype(DType::F32)?)
    }
}

/// The error for a sequence of `tokens` that does not fit.
pub(crate) fn too_long(tokens: usize, limit: usize) -> Error {
    Error::request(
        format!("the conversation has {tokens} tokens, the model's context holds {limit}"),
        "shorten the conversation or start a new one",
    )
}

#[derive(Debug)]
struct Layer {
    input_layernorm: RmsNorm,
    attention: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
}

impl Layer {
    fn load(config: &DecoderConfig, params: &Params) -> Result<Self> {
        Ok(Self {
            input_layernorm: RmsNorm::load(config, &params.pp("input_layernorm"))?,
            attention: Attention::load(config, &params.pp("self_attn"))?,
            post_attention_layernorm: RmsNorm::load(config, &params.pp("post_attention_layernorm"))?,
            mlp: Mlp::load(config, &params.pp("mlp"))?,
        })
    }
}

#[derive(Debug)]
struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Attention {
    fn load(config: &DecoderConfig, params: &Params) -> Result<Self> {
        let (heads, kv_heads, head_dim) = (config.num_heads, config.num_kv_heads, config.head_dim);
        let (hidden, bias) = (config.hidden_size, config.attention_bias);
        Ok(Self {
            q_proj: Linear::load(hidden, heads * head_dim, bias, &params.pp("q_proj"))?,
            k_proj: Linear::load(hidden, kv_heads * head_dim, bias, &params.pp("k_proj"))?,
            v_proj: Linear::load(hidden, kv_heads * head_dim, bias, &params.pp("v_proj"))?,
            o_proj: Linear::load(heads * head_dim, hidden, bias, &params.pp("o_proj"))?,
            heads,
            kv_heads,
            head_dim,
        })
    }

    /// `x [T, hidden]` → `[T − from, hidden]`: the rows `from..`; `layer` is this layer's index and the cache it
    /// appends to.
    fn forward(
        &self,
        x: &Tensor,
        rotation: &Rotation,
        (index, cache): (usize, &mut KvCache),
        from: usize,
        capture: Option<&mut Capture>,
    ) -> Result<Tensor> {
        let start = cache.len() + from;
        let asking = x.narrow(0, from, x.dim(0)? - from)?;
        let q = self.split(&self.q_proj.forward(&asking)?, self.heads)?;
        let q = rotation.from(from)?.apply(&q)?;
        let k = rotation.apply(&self.split(&self.k_proj.forward(x)?, self.kv_heads)?)?;
        let v = self.split(&self.v_proj.forward(x)?, self.kv_heads)?;
        let (keys, values) = cache.append(index, &k, &v)?;
        let (mixed, lse) = attend(&q, &keys, &values, capture.is_some())?;
        if let (Some(capture), Some(lse)) = (capture, lse) {
            capture.keep_attention(index, start, &q, &lse, &keys)?;
        }
        self.o_proj.forward(&mixed)
    }

    /// `[T, heads · head_dim]` → `[heads, T, head_dim]`
    fn split(&self, x: &Tensor, heads: usize) -> Result<Tensor> {
        let tokens = x.dim(0)?;
        Ok(x.reshape((tokens, heads, self.head_dim))?.transpose(0, 1)?.contiguous()?)
    }
}

#[derive(Debug)]
struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    activation: Activation,
}

impl Mlp {
    fn load(config: &DecoderConfig, params: &Params) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        Ok(Self {
            gate_proj: Linear::load(hidden, inner, false, &params.pp("gate_proj"))?,
            up_proj: Linear::load(hidden, inner, false, &params.pp("up_proj"))?,
            down_proj: Linear::load(inner, hidden, false, &params.pp("down_proj"))?,
            activation: config.activation,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        // Activations are evaluated in f32 and rounded once: a bf16 evaluation would round at every step.
        let (gate, up) = (self.gate_proj.forward(x)?, self.up_proj.forward(x)?);
        let inner = match self.activation {
            Activation::Silu => silu_mul(&gate, &up)?,
            Activation::GeluTanh => (gelu_tanh(&gate)? * up)?,
        };
        self.down_proj.forward(&inner)
    }
}

#[derive(Debug)]
struct RmsNorm {
    /// `[hidden]`
    weight: Tensor,
    eps: f64,
    norm: Norm,
}

impl RmsNorm {
    fn load(config: &DecoderConfig, params: &Params) -> Result<Self> {
        let weight = params.get(&[config.hidden_size], "weight")?;
        Ok(Self { weight, eps: config.rms_norm_eps, norm: config.norm })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self.norm {
            Norm::Llama => rms_norm(x, &self.weight, self.eps),
            Norm::Gemma => {
                let wide = x.to_dtype(DType::F32)?;
                let variance = wide.sqr()?.mean_keepdim(D::Minus1)?;
                let normed = wide.broadcast_div(&(variance + self.eps)?.sqrt()?)?;
                let weight = (self.weight.to_dtype(DType::F32)? + 1.0)?;
                Ok(normed.broadcast_mul(&weight)?.to_dtype(x.dtype())?)
            }
        }
    }
}
