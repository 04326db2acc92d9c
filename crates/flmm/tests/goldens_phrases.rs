//! Phrase choice and character → token ranges against recorded ones (`goldens/metrics/phrases.json`): exact.

mod common;

use std::ops::Range;

use common::TestResult;
use flmm::phrases::{char_range_to_tokens, char_range_to_tokens_reference, pick_chunks};
use serde_json::Value;

fn file() -> TestResult<Option<Value>> {
    let file =
        common::golden_dir("metrics").map(|dir| dir.join("phrases.json")).filter(|file| file.is_file());
    file.map(|file| common::json(&file)).transpose()
}

fn pair(value: &Value) -> TestResult<Range<usize>> {
    let [start, end]: [usize; 2] = serde_json::from_value(value.clone())?;
    Ok(start..end)
}

#[test]
fn goldens_phrases_chunks() -> TestResult {
    let Some(file) = file()? else { return Ok(()) };
    let mut checked = 0;
    for case in file["noun_chunk_rules"].as_array().ok_or("no noun_chunk_rules")? {
        let answer = case["answer"].as_str().ok_or("no answer")?;
        let mut chunks: Vec<String> = serde_json::from_value(case["chunks"].clone())?;
        let allowed: Vec<Vec<Range<usize>>> = case["results"]
            .as_array()
            .ok_or("no results")?
            .iter()
            .map(|result| result["ranges"].as_array().ok_or("no ranges")?.iter().map(pair).collect())
            .collect::<TestResult<_>>()?;
        for _ in 0..chunks.len() {
            chunks.rotate_left(1);
            let got = pick_chunks(answer, &chunks);
            if !allowed.contains(&got) {
                return Err(format!("{answer:?} with {chunks:?}: got {got:?}, expected {allowed:?}").into());
            }
            checked += 1;
        }
    }
    if checked == 0 { Err("no case".into()) } else { Ok(()) }
}

#[test]
fn goldens_phrases_tokens() -> TestResult {
    let Some(file) = file()? else { return Ok(()) };
    for case in file["char_to_token"].as_array().ok_or("no char_to_token")? {
        let offsets: Vec<(usize, usize)> = serde_json::from_value(case["offsets"].clone())?;
        for span in case["spans"].as_array().ok_or("no spans")? {
            let chars = pair(&span["chars"])?;
            let fixed = char_range_to_tokens(&chars, &offsets);
            let reference = char_range_to_tokens_reference(&chars, &offsets);
            for (what, got, key) in [("fixed", fixed, "fixed"), ("reference", reference, "reference")] {
                let expected = pair(&span[key])?;
                if got.as_ref() != Some(&expected) {
                    return Err(format!(
                        "{what} {chars:?} in {offsets:?}: got {got:?}, expected {expected:?}"
                    )
                    .into());
                }
            }
        }
    }
    Ok(())
}
