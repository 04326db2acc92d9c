//! Caption metrics against recorded ones: `goldens/metrics/captions.json` and `tests/data/captions.json` (random captions
//! scored by the public tools). Tokens exact, CIDEr, BLEU and ROUGE-L 1e-6, METEOR 1e-3.
//!
//! METEOR's tables belong to others and are not in this repository. `tests/data/fetch_meteor.sh DIR` fetches them from
//! the package registry; `FLMM_METEOR=DIR` points these tests at them. Without, METEOR's exact parts are skipped.

#[path = "../../flmm-data/tests/common/mod.rs"]
mod common;
mod files;

use std::path::{Path, PathBuf};

use files::TestResult;
use flmm_eval::captions::meteor::MeteorData;
use flmm_eval::captions::{CaptionPair, CaptionScores, Scored, score, tokens::tokenise};
use serde_json::Value;

/// Recorded cases: the goldens' own and those of the folder beside this file.
fn cases() -> TestResult<Vec<(PathBuf, Value)>> {
    let mut files = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/captions.json")];
    files.extend(common::golden_dir("metrics").map(|dir| dir.join("captions.json")).filter(|f| f.is_file()));
    files.extend(std::env::var_os("FLMM_CAPTIONS").map(PathBuf::from));
    files.into_iter().map(|file| Ok((file.clone(), files::json(&file)?))).collect()
}

fn text(value: &Value) -> TestResult<String> {
    Ok(value.as_str().ok_or("not a text")?.to_owned())
}

/// Pictures in the recorded order, as texts and as the tools' tokens.
fn pairs(case: &Value) -> TestResult<Vec<(String, CaptionPair, Value)>> {
    let ids = case["order"].as_array().ok_or("no `order`")?;
    let pair = |id: &Value| {
        let id = id.to_string();
        let references = case["references"][&id].as_array().ok_or("no references")?;
        let references = references.iter().map(text).collect::<TestResult<_>>()?;
        let pair = CaptionPair { candidate: text(&case["candidates"][&id])?, references };
        let expected = &case["expected"];
        let mut tokens = expected["tokenised_candidates"][&id].as_array().cloned().unwrap_or_default();
        tokens.extend(expected["tokenised_references"][&id].as_array().cloned().unwrap_or_default());
        Ok((id, pair, Value::Array(tokens)))
    };
    ids.iter().map(pair).collect()
}

/// Largest difference of a metric, over all pictures and the split.
fn difference(got: &Scored, expected: &Value) -> TestResult<f64> {
    let per_image: Vec<f64> = serde_json::from_value(expected["per_image"].clone())?;
    if per_image.len() != got.per_image.len() {
        return Err(format!("{} scores, expected {}", got.per_image.len(), per_image.len()).into());
    }
    let all = expected["mean"].as_f64().ok_or("no mean")?;
    let pairs = got.per_image.iter().zip(&per_image).chain(std::iter::once((&got.all, &all)));
    Ok(pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max))
}

fn scores(pairs: &[(String, CaptionPair, Value)], data: &MeteorData) -> TestResult<CaptionScores> {
    Ok(score(&pairs.iter().map(|(_, pair, _)| pair.clone()).collect::<Vec<_>>(), data)?)
}

#[test]
fn goldens_captions_tokens() -> TestResult {
    let (mut checked, mut wrong) = (0, Vec::new());
    for (_, case) in cases()? {
        for (id, pair, expected) in pairs(&case)? {
            let texts = std::iter::once(&pair.candidate).chain(&pair.references);
            for (caption, expected) in texts.zip(expected.as_array().ok_or("no tokens")?) {
                let got = tokenise(caption).join(" ");
                if Some(got.as_str()) != expected.as_str() {
                    wrong.push(format!("{id}: {caption:?}: got {got:?}, expected {expected}"));
                }
                checked += 1;
            }
        }
    }
    assert!(checked > 0, "nothing was compared");
    assert!(
        wrong.is_empty(),
        "{} of {checked} differ:\n{}",
        wrong.len(),
        wrong[..wrong.len().min(20)].join("\n")
    );
    Ok(())
}

#[test]
fn goldens_captions_words() -> TestResult {
    for (file, case) in cases()? {
        let got = scores(&pairs(&case)?, &MeteorData::lite())?;
        let expected = &case["expected"];
        let bleu: [f64; 4] = serde_json::from_value(expected["bleu"].clone())?;
        let differences = [
            ("CIDEr", difference(&got.words.cider, &expected["cider"])?),
            ("ROUGE-L", difference(&got.words.rouge_l, &expected["rouge_l"])?),
            ("BLEU", bleu.iter().zip(got.words.bleu).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)),
        ];
        for (name, found) in differences {
            println!("{}: {name} differs by {found:.1e}", file.display());
            assert!(found < 1e-6, "{}: {name} differs by {found}", file.display());
        }
        assert!(got.meteor_label.contains("lite"));
    }
    Ok(())
}

#[test]
fn goldens_captions_meteor() -> TestResult {
    let Some(folder) = std::env::var_os("FLMM_METEOR") else {
        println!(
            "skipped: FLMM_METEOR names no folder with METEOR's tables (tests/data/fetch_meteor.sh fetches them)"
        );
        return Ok(());
    };
    let data = MeteorData::open(Path::new(&folder))?;
    assert_eq!(data.label(), "METEOR", "the paraphrase table is missing");
    for (file, case) in cases()? {
        let pairs = pairs(&case)?;
        let got = scores(&pairs, &data)?.meteor;
        let expected = &case["expected"]["meteor"];
        for (i, (id, pair, _)) in pairs.iter().enumerate() {
            let wanted = expected["per_image"][i].as_f64().ok_or("no score")?;
            if (got.per_image[i] - wanted).abs() > 1e-6 {
                println!("{id}: {pair:?}: got {}, expected {wanted}", got.per_image[i]);
            }
        }
        let found = difference(&got, expected)?;
        println!("{}: METEOR differs by {found:.1e}", file.display());
        assert!(found < 1e-3, "{}: METEOR differs by {found}", file.display());
    }
    Ok(())
}

/// Without the tables scores are lower but in the same order of magnitude, and a caption equal to its reference has 1.
#[test]
fn meteor_lite_is_a_lower_bound_of_sorts() -> TestResult {
    let pair =
        |candidate: &str| CaptionPair { candidate: candidate.into(), references: vec!["A dog runs.".into()] };
    let got = score(&[pair("a dog runs"), pair("the dog ran"), pair("nothing")], &MeteorData::lite())?;
    assert_eq!(got.meteor.per_image[0], 1.0);
    assert!(got.meteor.per_image[1] > 0.1 && got.meteor.per_image[1] < 0.9);
    assert_eq!(got.meteor.per_image[2], 0.0);
    assert!(score(&[], &MeteorData::lite()).is_err());
    Ok(())
}
