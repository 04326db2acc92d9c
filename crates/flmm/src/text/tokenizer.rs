//! A model's own tokenizer, with the rules of the library that the models were published with.

use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, PostProcessorWrapper};

use crate::error::{Error, Result};
use crate::weights::files;

const DOWNLOAD: &str = "download the model's tokenizer files again";

/// Keys of `tokenizer_config.json` that name a special token.
const SPECIAL: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Text to token ids and back (`spec/models.md` §3).
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bos: Option<u32>,
    eos: Option<u32>,
    clean_up: bool,
}

impl Tokenizer {
    /// Opens `tokenizer.json` of the folder `dir`, with `tokenizer_config.json` and `special_tokens_map.json`
    /// where they exist.
    ///
    /// For the classes `LlamaTokenizer` and `GemmaTokenizer` (with or without `Fast`) the file's post-processor is
    /// replaced by one that follows `add_bos_token` (default yes) and `add_eos_token` (default no).
    ///
    /// # Errors
    /// [`Error::Config`] if a file is missing or damaged, or if a BOS token is required but not in the vocabulary.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let file = dir.join("tokenizer.json");
        if !files::is_file(&file) {
            let hint = "flmm reads fast tokenizers; in Python: \
                        `AutoTokenizer.from_pretrained(dir, use_fast=True).save_pretrained(dir)` writes tokenizer.json";
            return Err(Error::config(file, "no such file", hint));
        }
        let bytes = files::read(&file)?;
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|e| Error::config(&file, format!("not a tokenizer file: {e}"), DOWNLOAD))?;
        // What the file says about batches does not apply to single texts.
        inner
            .with_truncation(None)
            .map_err(|e| Error::config(&file, format!("not a tokenizer file: {e}"), DOWNLOAD))?
            .with_padding(None);

        let config = Settings::read(dir)?;
        config.add_tokens(&mut inner)?;
        let bos = config.special("bos_token").and_then(|token| inner.token_to_id(&token));
        let eos = config.special("eos_token").and_then(|token| inner.token_to_id(&token));
        if config.builds_own_post_processor() {
            config.replace_post_processor(&mut inner)?;
        }
        // The pinned library's default is yes, unless the file says otherwise.
        let clean_up = config.flag("clean_up_tokenization_spaces", true);
        Ok(Self { inner, bos, eos, clean_up })
    }

    /// Token ids of `text`. With `add_special_tokens` BOS and the like are added where the model wants them.
    ///
    /// # Errors
    /// [`Error::Request`] if the tokenizer refuses the text (a character without a token and no unknown token).
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, add_special_tokens).map_err(|e| {
            Error::request(format!("the tokenizer cannot encode the text: {e}"), "remove unusual characters")
        })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Ids of text segments, each encoded on its own without special tokens, as training does
    /// (`spec/models.md` §3 rule 2). Concatenated they differ from the ids of the whole text.
    pub fn encode_segments<'a>(&self, segments: impl IntoIterator<Item = &'a str>) -> Result<Vec<Vec<u32>>> {
        segments.into_iter().map(|segment| self.encode(segment, false)).collect()
    }

    /// The text of `ids`; ids outside the vocabulary are left out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        // The decoders in use rewrite strings and cannot fail.
        let text = self.inner.decode(ids, skip_special).unwrap_or_default();
        if self.clean_up { clean_up(text) } else { text }
    }

    /// The id of the token written exactly `token`.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of `id` as the vocabulary writes it (`▁the`, `<0x0A>`).
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Adds `token` as a special token (matched exactly, never normalised) unless it exists, and gives its id.
    /// The id of a new token lies behind the vocabulary.
    pub fn add_special_token(&mut self, token: &str) -> Result<u32> {
        let refused = |why: &dyn std::fmt::Display| {
            let what = format!("the special token `{token}` cannot be added{why}");
            Error::request(what, "give a token that is not empty")
        };
        let added = AddedToken::from(token, true).normalized(false);
        self.inner.add_special_tokens([added]).map_err(|e| refused(&format_args!(": {e}")))?;
        self.id(token).ok_or_else(|| refused(&""))
    }

    /// Number of tokens, added ones included.
    pub fn vocabulary_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The beginning-of-sequence token.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The end-of-sequence token.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether spaces before punctuation are removed from decoded text.
    pub(super) fn cleans_up(&self) -> bool {
        self.clean_up
    }
}

/// Removes the spaces that word-wise tokenizers leave before English punctuation and contractions.
fn clean_up(mut text: String) -> String {
    for (spaced, tight) in [
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ] {
        if text.contains(spaced) {
            text = text.replace(spaced, tight);
        }
    }
    text
}

/// `tokenizer_config.json`, completed by `special_tokens_map.json`.
struct Settings {
    file: std::path::PathBuf,
    map: Map<String, Value>,
}

impl Settings {
    fn read(dir: &Path) -> Result<Self> {
        let file = dir.join("tokenizer_config.json");
        let mut map = read_object(&file)?.unwrap_or_default();
        // The list of added tokens came later and is complete; files without it get the older map.
        if !map.contains_key("added_tokens_decoder")
            && let Some(older) = read_object(&dir.join("special_tokens_map.json"))?
        {
            map.extend(older);
        }
        Ok(Self { file, map })
    }

    fn flag(&self, key: &str, default: bool) -> bool {
        self.map.get(key).and_then(Value::as_bool).unwrap_or(default)
    }

    /// The text of a special token, written as a string or as an object with its properties.
    fn special(&self, key: &str) -> Option<String> {
        content(self.map.get(key)?).map(str::to_owned)
    }

    fn builds_own_post_processor(&self) -> bool {
        let class = self.map.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default();
        matches!(class.strip_suffix("Fast").unwrap_or(class), "LlamaTokenizer" | "GemmaTokenizer")
    }

    /// Adds the tokens listed here that `tokenizer.json` lacks: first those with an id, in its order, then the
    /// special ones.
    fn add_tokens(&self, tokenizer: &mut tokenizers::Tokenizer) -> Result<()> {
        let mut listed = Vec::new();
        if let Some(Value::Object(tokens)) = self.map.get("added_tokens_decoder") {
            for (id, token) in tokens {
                let (Ok(id), Some(token)) = (id.parse::<u32>(), added_token(token, false)) else {
                    let what = format!("`added_tokens_decoder` has an entry `{id}` that is not a token");
                    return Err(Error::config(&self.file, what, DOWNLOAD));
                };
                listed.push((id, token));
            }
        }
        listed.sort_by_key(|(id, _)| *id);
        let named = SPECIAL.iter().filter_map(|key| self.map.get(*key));
        let more = self.map.get("additional_special_tokens").and_then(Value::as_array).into_iter().flatten();
        let special = named.chain(more).filter_map(|token| added_token(token, true));
        for token in listed.into_iter().map(|(_, token)| token).chain(special) {
            let known = tokenizer.get_added_vocabulary().get_vocab().contains_key(&token.content);
            if known || token.content.is_empty() {
                continue;
            }
            let name = token.content.clone();
            let added = match token.special {
                true => tokenizer.add_special_tokens([token]),
                false => tokenizer.add_tokens([token]),
            };
            added.map_err(|e| Error::config(&self.file, format!("token `{name}`: {e}"), DOWNLOAD))?;
        }
        Ok(())
    }

    fn replace_post_processor(&self, tokenizer: &mut tokenizers::Tokenizer) -> Result<()> {
        let mut template = String::from("$A");
        let mut special = Vec::new();
        for (flag, default, key) in
            [("add_bos_token", true, "bos_token"), ("add_eos_token", false, "eos_token")]
        {
            if !self.flag(flag, default) {
                continue;
            }
            let found =
                self.special(key).and_then(|token| tokenizer.token_to_id(&token).map(|id| (token, id)));
            let Some((token, id)) = found else {
                let what = format!("`{flag}` is set, but `{key}` is missing or not in the vocabulary");
                return Err(Error::config(&self.file, what, DOWNLOAD));
            };
            // Any name will do in the template; the token's own text could contain characters it cannot hold.
            let name = if key == "bos_token" { "BOS" } else { "EOS" };
            template =
                if key == "bos_token" { format!("{name} {template}") } else { format!("{template} {name}") };
            let piece =
                tokenizers::processors::template::SpecialToken::new(name.to_owned(), vec![id], vec![token]);
            special.push(piece.map_err(|e| Error::config(&self.file, e.to_string(), DOWNLOAD))?);
        }
        let processor = TemplateProcessing::builder()
            .try_single(template)
            .and_then(|builder| {
                builder.special_tokens(special);
                builder.build().map_err(|e| e.to_string())
            })
            .map_err(|e| Error::config(&self.file, e, DOWNLOAD))?;
        tokenizer.with_post_processor(Some(PostProcessorWrapper::Template(processor)));
        Ok(())
    }
}

/// A JSON object, or `None` if there is no such file.
fn read_object(file: &Path) -> Result<Option<Map<String, Value>>> {
    if !files::is_file(file) {
        return Ok(None);
    }
    let text = files::read_text(file)?;
    match serde_json::from_str(&text) {
        Ok(Value::Object(map)) => Ok(Some(map)),
        Ok(_) => Err(Error::config(file, "expected a JSON object", DOWNLOAD)),
        Err(e) => Err(Error::config(file, format!("not a JSON file: {e}"), DOWNLOAD)),
    }
}

fn content(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content")?.as_str())
}

/// A token written as a string or as an object; `special` where the object does not say.
fn added_token(token: &Value, special: bool) -> Option<AddedToken> {
    let flag = |key: &str, default: bool| token.get(key).and_then(Value::as_bool).unwrap_or(default);
    let special = flag("special", special);
    let plain = AddedToken::from(content(token)?, special);
    Some(
        plain
            .lstrip(flag("lstrip", false))
            .rstrip(flag("rstrip", false))
            .single_word(flag("single_word", false))
            .normalized(flag("normalized", !special)),
    )
}
