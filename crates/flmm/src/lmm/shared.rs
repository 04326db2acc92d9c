//! What several model families have in common: projector, image features among text, special tokens, end of answers.

use std::path::Path;

use candle_core::{DType, Tensor};

use crate::config::Config;
use crate::error::{Error, Result};
use crate::nn::{Linear, gelu};
use crate::text::Decoder;
use crate::text::chat::ChatFormat;
use crate::text::tokenizer::Tokenizer;
use crate::weights::{Params, files};

/// How far a family with golden cases is proven ([`crate::lmm::LmmSpec::tested`]).
pub(super) const TESTED: &str =
    "parity with the reference on small random weights in the published layout, f32 and bf16";

/// What a user can do about tensors that are missing or misshapen.
pub(super) const WRONG_FOLDER: &str =
    "download the model again, or check that the folder belongs to its config.json";

const TOKENIZER_FILES: &str = "download the model's tokenizer files again";

/// Linear layers with an exact GELU between them, from the tower's width to the decoder's.
#[derive(Debug)]
pub(super) struct Projector {
    layers: Vec<Linear>,
}

impl Projector {
    /// `inputs → outputs → … → outputs`, one layer for each of `params`.
    pub(super) fn load(
        inputs: usize,
        outputs: usize,
        bias: bool,
        params: impl IntoIterator<Item = Params>,
    ) -> Result<Self> {
        let layers = params.into_iter().enumerate().map(|(index, params)| {
            let inputs = if index == 0 { inputs } else { outputs };
            Linear::load(inputs, outputs, bias, &params)
        });
        Ok(Self { layers: layers.collect::<Result<_>>()? })
    }

    /// `[.., inputs]` → `[.., outputs]`.
    pub(super) fn forward(&self, features: &Tensor) -> Result<Tensor> {
        let mut x = features.clone();
        for (index, layer) in self.layers.iter().enumerate() {
            if index > 0 {
                // Evaluated in f32 and rounded once.
                x = gelu(&x.to_dtype(DType::F32)?)?.to_dtype(x.dtype())?;
            }
            x = layer.forward(&x)?;
        }
        Ok(x)
    }
}

/// Embeddings `[ids, hidden]`, with the features of pictures in place of ids: `images` lists the number of the first
/// id and the features `[n, hidden]` that replace it and those behind it, in any order.
///
/// Those ids are never looked up: a token added for the image has no row in the table.
pub(crate) fn embed_with_images(
    decoder: &Decoder,
    ids: &[u32],
    mut images: Vec<(usize, Tensor)>,
) -> Result<Tensor> {
    images.sort_by_key(|(start, _)| *start);
    let (mut parts, mut from) = (Vec::new(), 0);
    for (start, features) in images {
        let end = start + features.dim(0)?;
        if start < from || end > ids.len() {
            let what = format!("image features for tokens {start}..{end} of {from}..{}", ids.len());
            return Err(candle_core::Error::Msg(what).into());
        }
        if start > from {
            parts.push(decoder.embed(&ids[from..start])?);
        }
        parts.push(features.to_dtype(decoder.dtype())?);
        from = end;
    }
    if from < ids.len() {
        parts.push(decoder.embed(&ids[from..])?);
    }
    Ok(Tensor::cat(&parts, 0)?)
}

/// Refuses a value of `key` other than `only`.
pub(super) fn supported(config: &Config, key: &str, only: &str) -> Result<()> {
    match config.text_or(key, only)? {
        value if value == only => Ok(()),
        other => Err(config.error(
            key,
            format!("`{other}` is not supported; known: {only}"),
            "use a model with the published setting",
        )),
    }
}

/// The id of `token`, which the model in `dir` cannot do without.
pub(super) fn required_token(dir: &Path, tokenizer: &Tokenizer, token: &str, why: &str) -> Result<u32> {
    tokenizer.id(token).ok_or_else(|| {
        let what = format!("the vocabulary has no token `{token}`, {why}");
        Error::config(dir.join("tokenizer.json"), what, TOKENIZER_FILES)
    })
}

/// Ids that end an answer: `eos_token_id` of `generation_config.json` in `dir` (one or several), else the
/// tokenizer's end-of-sequence token; and the stop word of `format` where it is one token.
pub(super) fn stop_ids(dir: &Path, tokenizer: &Tokenizer, format: &ChatFormat) -> Result<Vec<u32>> {
    let file = dir.join("generation_config.json");
    let mut ids = Vec::new();
    if files::is_file(&file) {
        let config = Config::read(&file)?;
        let listed = match config.get("eos_token_id") {
            Some(serde_json::Value::Array(list)) => list.clone(),
            Some(one) => vec![one.clone()],
            None => Vec::new(),
        };
        ids = listed.iter().filter_map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect();
    }
    if ids.is_empty() {
        ids.extend(tokenizer.eos());
    }
    let word = format.stop_word.and_then(|word| tokenizer.id(word));
    ids.extend(word.filter(|id| !ids.contains(id)));
    Ok(ids)
}
