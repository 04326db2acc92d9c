//! Rank analysis against `goldens/metrics/ranks.json`: 1e-9 (what was recorded in f32: one unit of it).

#[path = "../../flmm-data/tests/common/mod.rs"]
mod common;
mod files;

use files::TestResult;
use flmm_eval::ranks::{Benchmark, RankInput, Ranks, as_published, average_ranks};
use serde_json::Value;

fn input(case: &Value, scores: &str) -> TestResult<RankInput> {
    let columns: Vec<String> = serde_json::from_value(case["columns"].clone())?;
    let rows: Vec<Vec<f64>> = serde_json::from_value(case[scores].clone())?;
    let mut benchmarks: Vec<Benchmark> = columns
        .into_iter()
        .enumerate()
        .map(|(c, name)| Benchmark { name, scores: rows.iter().map(|row| row[c]).collect() })
        .collect();
    let grounding = benchmarks.split_off(4);
    Ok(RankInput { models: serde_json::from_value(case["models"].clone())?, chat: benchmarks, grounding })
}

fn check(got: &Ranks, expected: &Value, tolerance: f64) -> TestResult {
    let list = |key: &str| -> TestResult<Vec<f64>> { Ok(serde_json::from_value(expected[key].clone())?) };
    let number = |key: &str| expected[key].as_f64().ok_or_else(|| format!("no {key}"));
    let mut pairs: Vec<(f64, f64)> = got.chat.iter().copied().zip(list("chat")?).collect();
    pairs.extend(got.grounding.iter().copied().zip(list("ground")?));
    assert_eq!(pairs.len(), 2 * got.models.len());
    pairs.extend([(got.pearson, number("pearson")?), (got.spearman, number("spearman")?)]);
    for (got, expected) in pairs {
        assert!((got - expected).abs() <= tolerance, "{got}, expected {expected}");
    }
    Ok(())
}

#[test]
fn goldens_ranks() -> TestResult {
    let Some(file) = common::golden_dir("metrics").map(|dir| dir.join("ranks.json")).filter(|f| f.is_file())
    else {
        println!("skipped: no ranks.json among the goldens");
        return Ok(());
    };
    let case = files::json(&file)?;
    check(&average_ranks(&input(&case, "scores")?)?, &case["correct"], 1e-9)?;
    check(&as_published(&input(&case, "scores_as_published")?)?, &case["as_published"], 1.2e-7)
}

/// The printed digits of the published table, which are cut off, not rounded.
#[test]
fn the_published_table_is_reproduced() -> TestResult {
    let printed = [
        (7.75, 8.33),
        (6.00, 8.33),
        (6.75, 7.83),
        (9.00, 7.16),
        (6.50, 7.00),
        (5.75, 4.83),
        (3.75, 4.00),
        (2.75, 3.00),
        (3.25, 1.66),
        (3.50, 2.83),
    ];
    let got = as_published(&RankInput::published(true)?)?;
    let cut = |v: f64| (v * 100.0 + 1e-6).floor() / 100.0;
    let rows: Vec<(f64, f64)> =
        got.chat.iter().zip(&got.grounding).map(|(c, g)| (cut(*c), cut(*g))).collect();
    assert_eq!(rows, printed);
    let right = average_ranks(&RankInput::published(false)?)?;
    assert!((right.pearson - 0.904).abs() < 5e-4 && (right.spearman - 0.837).abs() < 5e-4);
    Ok(())
}
