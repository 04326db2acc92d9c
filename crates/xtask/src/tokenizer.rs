//! A stand-in tokenizer of any size: letters, bytes and numbered fillers, with special tokens at given ids.

use serde_json::{Map, Value, json};

/// `tokenizer.json` with `size` entries; `special` are (id, token).
pub(crate) fn json(size: usize, special: &[(usize, &str)]) -> Value {
    let mut words = vec!["<unk>".to_owned()];
    words.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    words.push("▁".into());
    words.extend((33..127u8).map(|byte| char::from(byte).to_string()));
    let mut words = words.into_iter();
    let mut vocab = Map::new();
    for id in 0..size {
        let token = match special.iter().find(|(place, _)| *place == id) {
            Some((_, token)) => (*token).to_owned(),
            None => words.next().unwrap_or_else(|| format!("▁filler{id}")),
        };
        vocab.insert(token, id.into());
    }
    let added: Vec<Value> = special
        .iter()
        .map(|(id, content)| {
            json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": true })
        })
        .collect();
    json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "Prepend", "prepend": "▁" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "▁" },
        ] },
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
            { "type": "ByteFallback" }, { "type": "Fuse" },
        ] },
        "model": { "type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "fuse_unk": true,
                   "vocab": vocab, "merges": [] },
    })
}

/// `tokenizer_config.json` of a Llama tokenizer that puts `bos` first.
pub(crate) fn config(bos: &str, eos: &str) -> Value {
    json!({ "tokenizer_class": "LlamaTokenizerFast", "add_bos_token": true, "add_eos_token": false,
            "bos_token": bos, "eos_token": eos, "unk_token": "<unk>", "clean_up_tokenization_spaces": false })
}
