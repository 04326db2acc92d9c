//! BERT as a text encoder: the mean of the last hidden states is what texts are compared by.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, IndexOp, Tensor};
use flmm::config::Config;
use flmm::nn::{LayerNorm, Linear, gelu, softmax_last_dim};
use flmm::weights::{Params, load_checkpoint};
use flmm::{Error, Result};
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::processors::bert::BertProcessing;
use tokenizers::{Tokenizer, TruncationParams};

const HINT: &str =
    "a folder with a BERT encoder in the Hugging Face layout, for example of google-bert/bert-base-uncased";

/// A frozen BERT encoder with its tokenizer.
pub struct Bert {
    tokenizer: Tokenizer,
    embeddings: Embeddings,
    layers: Vec<Layer>,
}

struct Embeddings {
    /// `[vocabulary, hidden]`
    words: Tensor,
    /// `[positions, hidden]`
    positions: Tensor,
    /// `[types, hidden]`; every token is of type 0.
    types: Tensor,
    norm: LayerNorm,
}

struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    attention_norm: LayerNorm,
    intermediate: Linear,
    contraction: Linear,
    norm: LayerNorm,
    heads: usize,
}

impl Bert {
    /// Opens a folder with `config.json`, weights, and `tokenizer.json` or `vocab.txt`.
    ///
    /// # Errors
    /// [`Error::Config`] and [`Error::Weights`] that name the file or every tensor that does not fit.
    pub fn open(folder: &Path) -> Result<Self> {
        let config = Config::read(&folder.join("config.json"))?;
        let act = config.text_or("hidden_act", "gelu")?;
        if act != "gelu" {
            return Err(config.error(
                "hidden_act",
                format!("activation `{act}` is not supported; known: gelu"),
                HINT,
            ));
        }
        let hidden = config.size_or("hidden_size", 768)?;
        let heads = config.size_or("num_attention_heads", 12)?;
        if !hidden.is_multiple_of(heads) {
            let what = format!("{heads} heads do not divide a hidden size of {hidden}");
            return Err(config.error("num_attention_heads", what, HINT));
        }
        let positions = config.size_or("max_position_embeddings", 512)?;
        let eps = config.number_or("layer_norm_eps", 1e-12)?;
        let weights = load_checkpoint(folder, Some(DType::F32), &Device::Cpu)?;
        // Older files have a prefix and other names for the layer norms.
        let renamed = weights.into_iter().map(|(name, tensor)| {
            let name = name.strip_prefix("bert.").unwrap_or(&name);
            (
                name.replace("LayerNorm.gamma", "LayerNorm.weight")
                    .replace("LayerNorm.beta", "LayerNorm.bias"),
                tensor,
            )
        });
        let params = Params::new(folder, renamed.collect());
        let embeddings = params.pp("embeddings");
        let bert = Self {
            tokenizer: tokenizer(folder, positions)?,
            embeddings: Embeddings {
                words: embeddings
                    .pp("word_embeddings")
                    .get(&[config.size_or("vocab_size", 30522)?, hidden], "weight")?,
                positions: embeddings.pp("position_embeddings").get(&[positions, hidden], "weight")?,
                types: embeddings
                    .pp("token_type_embeddings")
                    .get(&[config.size_or("type_vocab_size", 2)?, hidden], "weight")?,
                norm: LayerNorm::load(hidden, eps, &embeddings.pp("LayerNorm"))?,
            },
            layers: (0..config.layers_or("num_hidden_layers", 12)?)
                .map(|i| {
                    let inner = config.size_or("intermediate_size", 3072)?;
                    Layer::load(hidden, inner, heads, eps, &params.pp("encoder.layer").pp(i))
                })
                .collect::<Result<_>>()?,
        };
        params.finish(HINT)?;
        Ok(bert)
    }

    /// The mean over all tokens, the special ones included, of the last hidden states: `[hidden]`.
    pub fn embed(&self, text: &str) -> Result<Vec<f32>> {
        let encoding = self.tokenizer.encode(text, true).map_err(|e| {
            Error::request(format!("`{text}` cannot be tokenised: {e}"), "check the text of the phrase")
        })?;
        let ids = encoding.get_ids();
        Ok(self.states(ids)?.mean(0)?.to_vec1()?)
    }

    /// Last hidden states `[tokens, hidden]`.
    fn states(&self, ids: &[u32]) -> Result<Tensor> {
        let Embeddings { words, positions, types, norm } = &self.embeddings;
        let ids = Tensor::new(ids, words.device())?;
        let words = words.index_select(&ids, 0)?;
        let sum = (words.broadcast_add(&types.i(0)?)? + positions.narrow(0, 0, ids.dim(0)?)?)?;
        let mut states = norm.forward(&sum)?;
        for layer in &self.layers {
            states = layer.forward(&states)?;
        }
        Ok(states)
    }
}

impl Layer {
    fn load(hidden: usize, inner: usize, heads: usize, eps: f64, params: &Params) -> Result<Self> {
        let attention = params.pp("attention");
        let projection = |name: &str| Linear::load(hidden, hidden, true, &attention.pp("self").pp(name));
        let after = attention.pp("output");
        let output = params.pp("output");
        Ok(Self {
            query: projection("query")?,
            key: projection("key")?,
            value: projection("value")?,
            output: Linear::load(hidden, hidden, true, &after.pp("dense"))?,
            attention_norm: LayerNorm::load(hidden, eps, &after.pp("LayerNorm"))?,
            intermediate: Linear::load(hidden, inner, true, &params.pp("intermediate.dense"))?,
            contraction: Linear::load(inner, hidden, true, &output.pp("dense"))?,
            norm: LayerNorm::load(hidden, eps, &output.pp("LayerNorm"))?,
            heads,
        })
    }

    /// `[tokens, hidden]` → the same shape.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (tokens, hidden) = x.dims2()?;
        let per_head = |linear: &Linear| -> Result<Tensor> {
            let split = linear.forward(x)?.reshape((tokens, self.heads, hidden / self.heads))?;
            Ok(split.transpose(0, 1)?.contiguous()?)
        };
        let (query, key, value) = (per_head(&self.query)?, per_head(&self.key)?, per_head(&self.value)?);
        let scale = ((hidden / self.heads) as f64).sqrt();
        let scores = (query.matmul(&key.transpose(1, 2)?.contiguous()?)? / scale)?;
        let mixed = softmax_last_dim(&scores)?.matmul(&value)?;
        let mixed = mixed.transpose(0, 1)?.contiguous()?.reshape((tokens, hidden))?;
        let x = self.attention_norm.forward(&(self.output.forward(&mixed)? + x)?)?;
        let inner = gelu(&self.intermediate.forward(&x)?)?;
        self.norm.forward(&(self.contraction.forward(&inner)? + &x)?)
    }
}

/// The tokenizer of a folder, cutting texts at `longest` tokens.
fn tokenizer(folder: &Path, longest: usize) -> Result<Tokenizer> {
    let whole: PathBuf = folder.join("tokenizer.json");
    let damaged =
        |file: &Path, error: tokenizers::Error| Error::config(file, format!("not usable: {error}"), HINT);
    let mut tokenizer = match whole.is_file() {
        true => Tokenizer::from_file(&whole).map_err(|e| damaged(&whole, e))?,
        false => {
            let settings = folder.join("tokenizer_config.json");
            let lower_case = match settings.is_file() {
                true => Config::read(&settings)?.flag_or("do_lower_case", true)?,
                false => true,
            };
            word_pieces(&folder.join("vocab.txt"), lower_case)?
        }
    };
    let cut = TruncationParams { max_length: longest.min(512), ..TruncationParams::default() };
    tokenizer.with_truncation(Some(cut)).map_err(|e| damaged(&whole, e))?;
    tokenizer.with_padding(None);
    Ok(tokenizer)
}

/// BERT's tokenizer from its vocabulary, one piece a line.
fn word_pieces(vocabulary: &Path, lower_case: bool) -> Result<Tokenizer> {
    if !vocabulary.is_file() {
        let reason = std::io::Error::new(
            std::io::ErrorKind::NotFound,
            "no tokenizer: neither this nor tokenizer.json",
        );
        return Err(Error::io(vocabulary, reason));
    }
    let damaged = |what: String| Error::config(vocabulary, what, HINT);
    let model = WordPiece::from_file(&vocabulary.to_string_lossy()).unk_token("[UNK]".into()).build();
    let mut tokenizer = Tokenizer::new(model.map_err(|e| damaged(e.to_string()))?);
    let id = |token: &str| {
        tokenizer.token_to_id(token).ok_or_else(|| damaged(format!("the vocabulary has no `{token}`")))
    };
    let (sep, cls) = (("[SEP]".to_owned(), id("[SEP]")?), ("[CLS]".to_owned(), id("[CLS]")?));
    let normalizer = BertNormalizer::new(true, true, None, lower_case);
    tokenizer.with_normalizer(Some(normalizer)).map_err(|e| damaged(e.to_string()))?;
    tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
    tokenizer.with_post_processor(Some(BertProcessing::new(sep, cls)));
    Ok(tokenizer)
}
