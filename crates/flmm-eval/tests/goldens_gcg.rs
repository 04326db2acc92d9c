//! Grounded captions against recorded numbers: `goldens/metrics/gcg.json` (1e-9), COCO statistics of random predictions
//! (`tests/data/coco.json`, 1e-9), a tiny BERT (`tests/data/bert`, 1e-5).

#[path = "../../flmm-data/tests/common/mod.rs"]
mod common;
mod files;

use std::path::{Path, PathBuf};

use files::TestResult;
use flmm_data::coco::RunLengths;
use flmm_eval::gcg::ap::{Detections, coco_stats};
use flmm_eval::gcg::bert::Bert;
use flmm_eval::gcg::matching::{Variant, ious, matched_iou, recalled, transposed};
use flmm_eval::gcg::similarity::Similarity;
use flmm_eval::runs::Runs;
use serde_json::Value;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn masks(value: &Value) -> TestResult<Vec<Runs>> {
    let runs: Vec<RunLengths> = serde_json::from_value(value.clone())?;
    Ok(runs.iter().map(Runs::from_coco).collect::<flmm::Result<_>>()?)
}

fn near(what: &str, got: f64, expected: &Value, tolerance: f64) -> TestResult {
    let expected = expected.as_f64().ok_or_else(|| format!("{what}: no number"))?;
    match (got - expected).abs() <= tolerance {
        true => Ok(()),
        false => Err(format!("{what} is {got}, expected {expected}").into()),
    }
}

fn detections(truth: &[Runs], predicted: &[Runs], scores: Vec<f64>) -> TestResult<Detections> {
    let areas = |masks: &[Runs]| masks.iter().map(|mask| mask.area() as f64).collect();
    let ious = ious(predicted, truth)?;
    Ok(Detections { ious, predicted_areas: areas(predicted), true_areas: areas(truth), scores })
}

#[test]
fn goldens_gcg() -> TestResult {
    let Some(file) = common::golden_dir("metrics").map(|dir| dir.join("gcg.json")).filter(|f| f.is_file())
    else {
        println!("skipped: no gcg.json among the goldens");
        return Ok(());
    };
    let case = files::json(&file)?;
    let expected = &case["expected"];
    let mut pictures = Vec::new();
    for (variant, name) in [(Variant::Glamm, "glamm"), (Variant::Flmm, "flmm")] {
        let expected = &expected[name];
        let (mut found, mut phrases, mut scores) = (0, 0, Vec::new());
        pictures.clear();
        for (at, image) in case["images"].as_array().ok_or("no images")?.iter().enumerate() {
            let (truth, predicted) = (masks(&image["gt_masks"])?, masks(&image["pred_masks"])?);
            let similarity: Vec<Vec<f64>> = serde_json::from_value(image["similarity"].clone())?;
            let ious = ious(&predicted, &truth)?;
            let matches = recalled(&transposed(&ious, truth.len()), &similarity, variant);
            let wanted: Option<Vec<(usize, usize)>> =
                serde_json::from_value(expected["per_image"][at]["matches"].clone())?;
            assert_eq!(matches, wanted, "{name}: matches of picture {}", image["image_id"]);
            found += matches.map_or(0, |matches| matches.len());
            phrases += image["gt_labels"].as_array().ok_or("no labels")?.len();
            let score = matched_iou(&ious);
            near(
                &format!("mIoU of picture {}", image["image_id"]),
                score,
                &expected["miou_per_image"][at],
                1e-9,
            )?;
            scores.push(score);
            pictures.push(detections(&truth, &predicted, Vec::new())?);
        }
        near("matches", found as f64, &expected["matches"], 0.0)?;
        near("phrases", phrases as f64, &expected["phrases"], 0.0)?;
        near("recall", found as f64 / phrases as f64, &expected["recall"], 1e-9)?;
        near("mIoU", scores.iter().sum::<f64>() / scores.len() as f64, &expected["miou"], 1e-9)?;
    }
    let stats = coco_stats(&pictures);
    for (at, value) in stats.0.iter().enumerate() {
        near(&format!("COCO statistic {at}"), *value, &expected["coco_stats"][at], 1e-9)?;
    }
    near("AP50", stats.ap50(), &expected["AP50"], 1e-9)
}

#[test]
fn coco_statistics_equal_those_of_pycocotools() -> TestResult {
    let cases = files::json(&data("coco.json"))?;
    for (number, case) in cases.as_array().ok_or("no cases")?.iter().enumerate() {
        let picture = |image: &Value| {
            let scores = serde_json::from_value(image["scores"].clone())?;
            detections(&masks(&image["true"])?, &masks(&image["predicted"])?, scores)
        };
        let pictures: Vec<Detections> =
            case["images"].as_array().ok_or("no images")?.iter().map(picture).collect::<TestResult<_>>()?;
        for (at, value) in coco_stats(&pictures).0.iter().enumerate() {
            near(&format!("case {number}, statistic {at}"), *value, &case["stats"][at], 1e-9)?;
        }
    }
    Ok(())
}

#[test]
fn a_tiny_bert_says_what_transformers_says() -> TestResult {
    let bert = Bert::open(&data("bert"))?;
    let cases = files::json(&data("bert/expected.json"))?;
    let mut worst = 0f64;
    for case in cases.as_array().ok_or("no cases")? {
        let text = case["text"].as_str().ok_or("no text")?;
        let mean: Vec<f64> = serde_json::from_value(case["mean"].clone())?;
        let got = bert.embed(text)?;
        assert_eq!(got.len(), mean.len());
        let difference = got.iter().zip(&mean).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
        assert!(difference < 1e-5, "{text:?}: differs by {difference}");
        worst = worst.max(difference);
    }
    println!("largest difference {worst:.1e}");
    let alike = Similarity::model(&data("bert"))?;
    let texts = ["the dog".to_owned(), "a red cat".to_owned()];
    let matrix = alike.between("1", &texts, &texts)?;
    assert!(
        (matrix[0][0] - 1.0).abs() < 1e-9
            && (matrix[0][1] - matrix[1][0]).abs() < 1e-9
            && matrix[0][1] < 0.99
    );
    Ok(())
}
