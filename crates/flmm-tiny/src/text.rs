//! The tokenizer: byte-fallback BPE in which every word of the world is one token.

use anyhow::{Context, Result, anyhow};
use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::normalizers::{NormalizerWrapper, Replace};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::punctuation::Punctuation;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::{AddedToken, SplitDelimiterBehavior, TokenizerBuilder, TokenizerImpl};

/// Special tokens, in id order.
pub(crate) const SPECIAL: [&str; 4] = ["<unk>", "<s>", "</s>", "<image>"];
/// The instruction under which given text is grounded (models.md §2).
pub(crate) const DESCRIBE: &str = "Please give me a description of the image.";
/// Words and letters every tokenizer knows besides the world's own.
const ALPHABET: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.,!?'\"-:;()\n";

/// The concrete type, so that training has access to the model.
pub(crate) type WorldTokenizer =
    TokenizerImpl<BPE, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// Trains the tokenizer on `texts`.
pub(crate) fn train(texts: impl Iterator<Item = String> + Send) -> Result<WorldTokenizer> {
    let to_anyhow = |e: tokenizers::Error| anyhow!("cannot train the tokenizer: {e}");
    let newline = Split::new(SplitPattern::String("\n".into()), SplitDelimiterBehavior::Isolated, false);
    let pre_tokenizer = Sequence::new(vec![
        Metaspace::new('▁', PrependScheme::Always, true).into(),
        newline.map_err(to_anyhow)?.into(),
        Punctuation::new(SplitDelimiterBehavior::Isolated).into(),
    ]);
    let decoder = DecoderSequence::new(vec![
        Replace::new("▁", " ").map_err(to_anyhow)?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
        Strip::new(' ', 1, 0).into(),
    ]);
    let model = BPE::builder().unk_token("<unk>".into()).byte_fallback(true).fuse_unk(true);
    let mut tokenizer = TokenizerBuilder::new()
        .with_model(model.build().map_err(to_anyhow)?)
        .with_normalizer(None)
        .with_pre_tokenizer(Some(pre_tokenizer.into()))
        .with_post_processor(None)
        .with_decoder(Some(decoder.into()))
        .build()
        .map_err(to_anyhow)?;
    let bytes = (0..=255u8).map(|byte| AddedToken::from(format!("<0x{byte:02X}>"), false));
    let special = SPECIAL.map(|token| AddedToken::from(token, true).normalized(false));
    let mut trainer = BpeTrainer::builder()
        .vocab_size(4096)
        .min_frequency(1)
        .show_progress(false)
        .initial_alphabet(ALPHABET.chars().chain(['▁']).collect())
        .special_tokens(special.into_iter().chain(bytes).collect())
        .build();
    let frame = ["USER:".to_owned(), "ASSISTANT:".to_owned(), DESCRIBE.to_owned()];
    tokenizer.train(&mut trainer, frame.into_iter().chain(texts)).map_err(to_anyhow)?;
    Ok(tokenizer)
}

/// `tokenizer.json` of a trained tokenizer, with only the four control tokens marked special.
pub(crate) fn to_json(tokenizer: &WorldTokenizer) -> Result<String> {
    let text = tokenizer.to_string(false).map_err(|e| anyhow!("cannot write the tokenizer: {e}"))?;
    let mut json: serde_json::Value = serde_json::from_str(&text)?;
    let added = json["added_tokens"].as_array_mut().context("the tokenizer has no added tokens")?;
    // Byte tokens belong to the model only: text that spells "<0x41>" must not turn into a byte.
    added.retain(|token| SPECIAL.iter().any(|special| token["content"] == *special));
    json["model"]["byte_fallback"] = true.into();
    json["model"]["unk_token"] = "<unk>".into();
    json["model"]["fuse_unk"] = true.into();
    Ok(serde_json::to_string_pretty(&json)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_single_tokens_and_anything_round_trips() {
        let texts = ["Is there a dog?".to_owned(), "Yes, there is a red dog.".to_owned()];
        let json = to_json(&train(texts.into_iter()).unwrap()).unwrap();
        let tokenizer: tokenizers::Tokenizer = json.parse().unwrap();
        let ids = |text: &str| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
        assert_eq!(ids("a red dog").len(), 3);
        assert_eq!(ids("<image>"), [3]);
        for text in ["a red dog.", "Zebra ßé 漢 <0x41>", "a\nb"] {
            assert_eq!(tokenizer.decode(&ids(text), false).unwrap(), text);
        }
    }
}
