//! `flmm eval`.

use insta::assert_snapshot;

use crate::support::{Place, fixture, model};

/// The miniature trees in the published formats.
fn tree() -> String {
    fixture("datasets/tree").display().to_string()
}

#[test]
fn tasks_say_what_they_need_and_what_is_there() {
    let place = Place::new();
    let list = place.run(&["eval", "tasks"]);
    for name in ["refcoco_val", "refcocog_test", "grefcoco_val", "png", "png_keywords", "reasonseg_test"] {
        assert!(list.ok().contains(&format!("{name}  ")), "{name}");
    }
    assert!(!list.out.contains("MISSING"));
    let list = place.run(&["eval", "tasks", "--data", &tree()]);
    assert!(list.ok().contains("    MISSING coco/grefcoco/grefs(unc).json  (gRefCOCO"), "{}", list.out);
    assert!(list.out.contains("    there   coco/refcoco/instances.json"), "{}", list.out);
    let list = place.run(&["eval", "tasks", "--data", &tree(), "--json"]);
    let json: serde_json::Value = serde_json::from_str(list.ok()).unwrap();
    assert_eq!(json[0]["needs"][0]["present"], true);
}

#[test]
fn wrong_usage_says_what_to_do() {
    let place = Place::new();
    let tree = tree();
    let wrong: [(&str, &[&str]); 5] = [
        ("nothing", &["eval"]),
        ("unknown_task", &["eval", "--task", "refcoco_vla", "--data", &tree, "--out", "o"]),
        ("no_data", &["eval", "--task", "png", "--data", "nowhere", "--out", "o"]),
        ("missing_files", &["eval", "--task", "grefcoco_val", "--data", &tree, "--out", "o"]),
        ("shard", &["eval", "--task", "png", "--data", &tree, "--out", "o", "--shard", "3/2"]),
    ];
    for (name, args) in wrong {
        let ran = place.run(args);
        assert_eq!((ran.status, ran.out.as_str()), (2, ""), "{name}: {}", ran.err);
        assert_snapshot!(format!("eval_usage_{name}"), ran.err);
    }
    assert_eq!(place.files(), ["a.png"]);
}

#[test]
fn templates_filled_in_are_scored_and_faults_named() {
    let place = Place::new();
    let tree = tree();
    let lines = place.run(&["eval", "samples", "--task", "refcoco_val", "--data", &tree]);
    let mut samples: Vec<serde_json::Value> =
        lines.ok().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for sample in &mut samples {
        let (height, width) = (sample["size"][0].as_u64().unwrap(), sample["size"][1].as_u64().unwrap());
        let whole = serde_json::json!({ "size": [height, width], "counts": [0, height * width] });
        for phrase in sample["phrases"].as_array_mut().unwrap() {
            phrase["segmentation"] = whole.clone();
        }
    }
    let text: String = samples.iter().map(|sample| format!("{sample}\n")).collect();
    place.write("theirs.jsonl", text.as_bytes());
    let score = ["eval", "score", "--task", "refcoco_val", "--predictions", "theirs.jsonl", "--data", &tree];
    let ran = place.run(&score);
    assert!(ran.ok().contains("cIoU") && ran.err.is_empty(), "{}", ran.all());

    place.write(
        "theirs.jsonl",
        format!("{text}{{\"id\": \"no such\"}}\n{{\"id\": 7, \"score\": NaN}}\n").as_bytes(),
    );
    let again = place.run(&[&score[..], &["--out", "o", "--json"]].concat());
    assert_eq!(again.status, 1, "{}", again.all());
    assert_snapshot!("eval_score_faults", again.err);
    let json: serde_json::Value = serde_json::from_str(&again.out).unwrap();
    assert_eq!(json["samples"], samples.len());
    for file in ["results.json", "results.md", "samples_refcoco_val.jsonl", "failed_refcoco_val.jsonl"] {
        assert!(place.path("o").join(file).is_file(), "{file}");
    }
    assert!(place.run(&["eval", "merge", "o"]).ok().contains("cIoU"));
}

/// A task that the model cannot do is known before the others are computed.
#[test]
fn a_head_without_a_keyword_selector_is_told_at_once() {
    let place = Place::new();
    let tree = tree();
    let args = ["eval", "--task", "refcoco_val,png_keywords", "--data", &tree, "--out", "o", "--limit", "1"];
    let ran = place.run_with_model(&args);
    assert!(ran.status == 1 && ran.err.contains("has no keyword selector"), "{}", ran.all());
    assert!(!place.path("o").exists());
}

#[test]
fn a_model_runs_through_tasks_and_goes_on_where_it_was() {
    let place = Place::new();
    let tree = tree();
    let args = ["eval", "--task", "refcoco_val,reasonseg_val", "--data", &tree, "--out", "o", "--limit", "1"];
    let ran = place.run_with_model(&args);
    assert!(ran.ok().contains("refcoco_val: 1 of"), "{}", ran.all());
    assert!(ran.err.contains("refcoco_val: 1 samples computed, 0 from before, 0 failed"), "{}", ran.err);
    let again = place.run_with_model(&args);
    assert_eq!(again.ok(), ran.out);
    assert!(again.err.contains("refcoco_val: 0 samples computed, 1 from before, 0 failed"), "{}", again.err);
    // In another precision, or without its head, it is another model.
    for (change, wanted) in [(["--dtype", "bf16"], "model's dtype"), (["--head", "none"], "model's head")] {
        let mut model = model();
        if change[0] == "--head" {
            model.truncate(4);
        }
        let ran = place.ran(place.command(&args).args(model).args(change).output().unwrap());
        assert!(ran.status == 1 && ran.err.contains(wanted), "{}", ran.all());
    }
    assert_eq!(place.run_with_model(&args).ok(), ran.out);
}
