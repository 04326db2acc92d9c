//! `flmm eval ranks`, `panels`, `atlas` and `report`.

use insta::assert_snapshot;
use serde_json::Value;

use crate::support::Place;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn help_of_analyses() {
    let place = Place::new();
    for what in ["ranks", "panels", "atlas", "report"] {
        assert_snapshot!(format!("help_eval_{what}"), place.run(&["eval", what, "--help"]).ok());
    }
}

#[test]
fn ranks_are_right_or_as_published() {
    let place = Place::new();
    assert_snapshot!("ranks", place.run(&["eval", "ranks"]).ok());
    assert_snapshot!("ranks_as_published", place.run(&["eval", "ranks", "--as-published"]).ok());
    let own = r#"{"models": ["a", "b"], "chat": [{"name": "x", "scores": [1, 2]}],
        "grounding": [{"name": "y", "scores": [3, 4]}]}"#;
    place.write("own.json", own.as_bytes());
    let ranks = json(place.run(&["eval", "ranks", "--scores", "own.json", "--json"]).ok());
    assert_eq!((ranks["chat"][0].as_f64(), ranks["pearson"].as_f64()), (Some(2.0), Some(1.0)));
    place.write("bad.json", own.replace("[3, 4]", "[3]").as_bytes());
    let bad = place.run(&["eval", "ranks", "--scores", "bad.json"]);
    assert_eq!(bad.status, 1);
    assert_snapshot!("ranks_bad", bad.err);
}

/// A small world, its pictures and a run on it: everything that looks at a model or a run.
#[test]
fn a_world_is_looked_at() {
    let place = Place::new();
    place.run(&["world", "--out", "w", "--split", "val", "--count", "2", "--seed", "3"]).ok();

    let panels =
        place.run(&["eval", "panels", "--data", "w", "--out", "p", "--limit", "1", "--strips", "--raw"]);
    assert!(panels.ok().contains("mean IoU with the ground truth"), "{}", panels.err);
    let names: Vec<String> = std::fs::read_dir(place.path("p"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    assert!(names.iter().any(|name| name.ends_with(".safetensors")), "{names:?}");
    assert!(names.iter().filter(|name| name.ends_with(".png")).count() >= 2, "{names:?}");
    let again = place.run(&["eval", "panels", "--data", "w", "--out", "p", "--limit", "1"]);
    assert!(again.ok().is_empty() && again.err.contains("1 were there"), "{}", again.err);

    let atlas = place.run(&["eval", "atlas", "--data", "w", "--out", "a.png", "--limit", "2", "--json"]);
    let table = &json(atlas.ok())["table"];
    let chance = table["chance"].as_f64().unwrap();
    let best = table["peak"].as_array().unwrap().iter().flat_map(|row| row.as_array().unwrap());
    let best = best.filter_map(Value::as_f64).fold(0.0, f64::max);
    assert!(table["phrases"].as_u64() > Some(0) && best > chance, "best head {best}, chance {chance}");
    assert!(place.path("a.png").is_file() && place.path("a.json").is_file());

    place.run(&["eval", "--task", "png,gcg_val", "--data", "w", "--out", "r"]).ok();
    let report = place.run(&["eval", "report", "r", "--data", "w", "--threshold", "0.99"]);
    assert!(report.ok().contains("phrases failed"), "{}", report.err);
    let page = std::fs::read_to_string(place.path("r/report.html")).unwrap();
    assert!(page.contains("data:image/jpeg;base64,") && page.contains("data-task=\"gcg_val\""));
    for outside in ["http://", "https://", "src=\"/", "@import", "url("] {
        assert!(!page.contains(outside), "the page asks for {outside}");
    }
    // Under another protocol the samples would be other ones.
    let other = place.run(&["eval", "report", "r", "--data", "w", "--task", "png", "--replace-empty", "3"]);
    assert_eq!(other.status, 1, "{}", other.all());
    assert!(other.err.contains("replace_empty null there, 3 now"), "{}", other.err);
    let absent = place.run(&["eval", "report", "r", "--data", "w", "--task", "reasonseg_val"]);
    assert_eq!(absent.status, 2);
    assert!(absent.err.contains("the run has no samples of `reasonseg_val`"), "{}", absent.err);
}

#[test]
fn missing_tables_and_models_are_named() {
    let place = Place::new();
    place.run(&["world", "--out", "w", "--split", "val", "--count", "1", "--seed", "3"]).ok();
    place.write("preds.jsonl", b"");
    let score = |extra: &[&str]| {
        let base = ["eval", "score", "--task", "gcg_val", "--data", "w", "--predictions", "preds.jsonl"];
        place.run(&[&base[..], extra].concat())
    };
    for (extra, wrong) in [
        (["--meteor-data", "w"], "no METEOR tables here"),
        (["--similarity-model", "w"], "config.json"),
        (["--similarity", "a.png"], "a.png"),
    ] {
        let ran = score(&extra);
        assert!(ran.status == 1 && ran.err.contains(wrong), "{extra:?}: {}", ran.err);
    }
}
