//! Tokenizers of every golden model folder: ids with and without special tokens, and decoded text.

mod common;

use std::path::{Path, PathBuf};

use common::{TestResult, golden_dir, json};
use flmm::text::chat::{MODELS, Turn};
use flmm::text::stream::TextStream;
use flmm::text::tokenizer::Tokenizer;
use serde_json::Value;

/// Families with recorded cases: `(name, tokenizer folder, cases)`.
fn families() -> TestResult<Vec<(String, PathBuf, Value)>> {
    let Some(lmm) = golden_dir("lmm") else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(lmm)? {
        let dir = entry?.path();
        let cases = dir.join("expected/tokenizer_cases.json");
        if cases.is_file() {
            let folder = [dir.join("model"), dir.join("model/llm")]
                .into_iter()
                .find(|d| d.join("tokenizer.json").is_file());
            let folder = folder.ok_or_else(|| format!("{}: no tokenizer.json", dir.display()))?;
            let name = dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            found.push((name, folder, json(&cases)?));
        }
    }
    Ok(found)
}

fn open(folder: &Path, cases: &Value) -> TestResult<Tokenizer> {
    let mut tokenizer = Tokenizer::load(folder)?;
    if cases["image_token_added_by_caller"] == true {
        tokenizer.add_special_token(cases["image_token"].as_str().ok_or("no image_token")?)?;
    }
    Ok(tokenizer)
}

fn ids(value: &Value) -> TestResult<Vec<u32>> {
    Ok(serde_json::from_value(value.clone())?)
}

#[test]
fn goldens_tokenizer_ids_and_text() -> TestResult {
    for (family, folder, cases) in families()? {
        let tokenizer = open(&folder, &cases)?;
        assert_eq!(tokenizer.bos().map(u64::from), cases["bos_id"].as_u64(), "{family}: BOS");
        assert_eq!(tokenizer.eos().map(u64::from), cases["eos_id"].as_u64(), "{family}: EOS");
        let image = cases["image_token"].as_str().ok_or("no image_token")?;
        assert_eq!(tokenizer.id(image).map(u64::from), cases["image_token_id"].as_u64(), "{family}: {image}");
        let list = cases["cases"].as_array().ok_or("no cases")?;
        assert!(!list.is_empty(), "{family}: no cases");
        for case in list {
            let text = case["text"].as_str().ok_or("no text")?;
            let plain = ids(&case["ids"])?;
            assert_eq!(tokenizer.encode(text, false)?, plain, "{family}: {text:?}");
            let special = ids(&case["ids_with_special_tokens"])?;
            assert_eq!(tokenizer.encode(text, true)?, special, "{family}: {text:?} with special tokens");
            for (key, skip) in [("decoded", false), ("decoded_skip_special", true)] {
                assert_eq!(tokenizer.decode(&plain, skip), case[key], "{family}: {text:?} {key}");
                // Token by token the same text appears.
                let mut stream = TextStream::new(&tokenizer, skip);
                let mut pieces: Vec<String> = plain.iter().map(|&id| stream.push(id)).collect();
                assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')), "{family}: {pieces:?}");
                pieces.push(stream.finish());
                assert_eq!(pieces.concat(), case[key], "{family}: {text:?} {key}, streamed");
            }
        }
        println!("{family}: {} cases", list.len());
    }
    Ok(())
}

/// The recorded prompts are what the chat formats write: the golden image is one token, or many in DeepSeek-VL.
#[test]
fn goldens_tokenizer_prompts() -> TestResult {
    let mut compared = 0;
    for (family, folder, cases) in families()? {
        let dir = folder.ancestors().find(|d| d.join("expected").is_dir()).ok_or("no expected folder")?;
        let tokenizer = open(&folder, &cases)?;
        let image =
            tokenizer.id(cases["image_token"].as_str().ok_or("no image_token")?).ok_or("no image id")?;
        for entry in std::fs::read_dir(dir.join("expected"))? {
            let file = entry?.path();
            if !file.to_string_lossy().ends_with(".f32.json") {
                continue;
            }
            let recorded = json(&file)?;
            let list: Vec<i64> = match &recorded["input_ids_rle"] {
                Value::Null => serde_json::from_value(recorded["input_ids"].clone())?,
                runs => {
                    let runs: Vec<(i64, usize)> = serde_json::from_value(runs.clone())?;
                    runs.into_iter().flat_map(|(id, count)| std::iter::repeat_n(id, count)).collect()
                }
            };
            // The sentinel -200 stands for the image where the reference expands it itself.
            let input: Vec<u32> = list.into_iter().map(|id| u32::try_from(id).unwrap_or(image)).collect();
            let copies = input.iter().filter(|&&id| id == image).count();
            let question = Turn::user("Please give me a description of the image.");
            let fits = MODELS.iter().any(|(_, format)| {
                let prompt = format.render(std::slice::from_ref(&question), copies).unwrap();
                input.starts_with(&tokenizer.encode(&prompt, true).unwrap())
            });
            assert!(fits, "{family}: no format gives the prompt of {}", file.display());
            compared += 1;
        }
    }
    println!("{compared} prompts");
    Ok(())
}

#[test]
fn goldens_tokenizer_segments_are_encoded_alone() -> TestResult {
    for (_, folder, cases) in families()? {
        let tokenizer = open(&folder, &cases)?;
        let segments = tokenizer.encode_segments(["we can see", "a man"])?;
        assert_eq!(segments, [tokenizer.encode("we can see", false)?, tokenizer.encode("a man", false)?]);
    }
    Ok(())
}

/// A BPE tokenizer of single letters with the given configuration.
fn tiny(config: &str) -> TestResult<Result<Tokenizer, flmm::Error>> {
    let folder = tempfile::tempdir()?;
    let tokenizer = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{"id":3,"content":"<s>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],"normalizer":null,"pre_tokenizer":null,"post_processor":{"type":"TemplateProcessing","single":[{"Sequence":{"id":"A","type_id":0}},{"SpecialToken":{"id":"<s>","type_id":0}}],"pair":[{"Sequence":{"id":"A","type_id":0}},{"Sequence":{"id":"B","type_id":1}}],"special_tokens":{"<s>":{"id":"<s>","ids":[3],"tokens":["<s>"]}}},"decoder":{"type":"Fuse"},"model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,"end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false,"vocab":{"a":0,"b":1,"</s>":2},"merges":[]}}"#;
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer)?;
    std::fs::write(folder.path().join("tokenizer_config.json"), config)?;
    Ok(Tokenizer::load(folder.path()))
}

#[test]
fn the_class_decides_who_adds_bos() -> TestResult {
    let encode = |config: &str| -> TestResult<Vec<u32>> { Ok(tiny(config)??.encode("ab", true)?) };
    // The file's own (odd) template counts for other classes.
    assert_eq!(encode(r#"{"tokenizer_class": "PreTrainedTokenizerFast"}"#)?, [0, 1, 3]);
    for class in ["LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer", "GemmaTokenizerFast"] {
        let with = |rest: &str| {
            encode(&format!(r#"{{"tokenizer_class": "{class}", "bos_token": {{"content": "<s>"}}{rest}}}"#))
        };
        assert_eq!(with("")?, [3, 0, 1]);
        assert_eq!(with(r#", "add_bos_token": false"#)?, [0, 1]);
        assert_eq!(with(r#", "add_eos_token": true, "eos_token": "</s>""#)?, [3, 0, 1, 2]);
    }
    Ok(())
}

#[test]
fn bad_folders_are_errors_with_hints() -> TestResult {
    for config in
        [r#"{"tokenizer_class": "LlamaTokenizer"}"#, "[]", "{", r#"{"added_tokens_decoder": {"x": "a"}}"#]
    {
        let error = tiny(config)?.expect_err(config);
        assert!(matches!(error, flmm::Error::Config { .. }) && error.hint().is_some(), "{config}: {error}");
    }
    let missing = Tokenizer::load("/nowhere").expect_err("no folder");
    assert!(missing.hint().is_some_and(|hint| hint.contains("use_fast")), "{missing}");
    Ok(())
}

#[test]
fn listed_tokens_are_added_and_clean_up_follows_the_file() -> TestResult {
    let config = r#"{"added_tokens_decoder": {"5": {"content": "<y>"}, "4": {"content": "<x>", "special": true}},
        "clean_up_tokenization_spaces": true, "additional_special_tokens": ["<z>"]}"#;
    let tokenizer = tiny(config)??;
    assert_eq!(["<x>", "<y>", "<z>"].map(|t| tokenizer.id(t)), [Some(4), Some(5), Some(6)]);
    assert_eq!(tokenizer.encode("a<x>b<z>", false)?, [0, 4, 1, 6]);
    assert_eq!(tokenizer.decode(&[0, 4, 5, 99], true), "a<y>");
    Ok(())
}
