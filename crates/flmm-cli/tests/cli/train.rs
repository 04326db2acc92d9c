//! `flmm train` and `flmm data` on a small world with the embedded model.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use insta::assert_snapshot;

use crate::support::Place;

fn world(place: &Place, split: &str, count: &str, out: &str) {
    place.run(&["world", "--split", split, "--count", count, "--seed", "7", "--out", out]).ok();
}

/// A run of a few steps of a very small head.
const TRAIN: [&str; 14] = [
    "train",
    "--config",
    "flmm-tiny",
    "--data",
    "w",
    "--set",
    "head.base_channels=2",
    "--set",
    "data.limit=1",
    "--set",
    "validation.every=0",
    "--set",
    "run.checkpoint_minutes=1e-9",
    "--out",
];

#[test]
fn a_download_is_checked() {
    let place = Place::new();
    world(&place, "train", "3", "w");
    let check = ["data", "check", "--data", "w", "--for", "train"];
    let ran = place.run(&check);
    assert_snapshot!("data_complete", ran.ok());
    assert_eq!(ran.out, place.run(&[&check[..], &["--decode"]].concat()).out);

    let pictures: Vec<_> =
        std::fs::read_dir(place.path("w/coco/train2017")).unwrap().map(|e| e.unwrap().path()).collect();
    let (damaged, missing) = (pictures.iter().min().unwrap(), pictures.iter().max().unwrap());
    // Not the picture of train2014, which is the same file under another name.
    std::fs::remove_file(damaged).unwrap();
    std::fs::write(damaged, b"\xff\xd8\xff").unwrap();
    std::fs::remove_file(missing).unwrap();
    std::fs::remove_file(place.path("w/coco/refcoco/instances.json")).unwrap();
    std::fs::write(place.path("w/coco/refcocog/refs(umd).p"), b"no pickle").unwrap();
    let ran = place.run(&check);
    assert_eq!(ran.status, 1);
    assert_snapshot!("data_broken", ran.all());
    let json: serde_json::Value =
        serde_json::from_str(&place.run(&[&check[..], &["--json"]].concat()).out).unwrap();
    let parts = json["parts"].as_array().unwrap();
    let of = |status: &str| parts.iter().filter(|part| part["status"] == status).count();
    assert_eq!((of("incomplete"), of("missing")), (2, 1), "{json:#}");

    // Nothing at all: what to fetch, and from where.
    std::fs::create_dir(place.path("none")).unwrap();
    let ran = place.run(&["data", "check", "--data", "none"]);
    assert_eq!(ran.status, 1);
    assert_snapshot!("data_missing", ran.all());
    assert_eq!(place.run(&["data", "check", "--data", "nowhere"]).status, 1);
}

#[test]
fn a_head_is_trained_stopped_and_used() {
    let place = Place::new();
    world(&place, "train", "2", "w");
    let run = |out: &str, more: &[&str]| [&TRAIN[..], &[out], more].concat().join("\n");
    let args = |text: &str| text.split('\n').map(str::to_owned).collect::<Vec<_>>();

    // Interrupted after some steps.
    let long = run("r", &["--set", "train.epochs=2000"]);
    let long = args(&long);
    let mut command = place.command(&long.iter().map(String::as_str).collect::<Vec<_>>());
    let mut child = command.arg("-v").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(|line| line.unwrap());
    assert!(lines.by_ref().any(|line| line.starts_with("checkpoint after step 2")));
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let rest: Vec<String> = lines.collect();
    assert_eq!(child.wait().unwrap().code(), Some(1), "{rest:?}");
    assert!(rest.iter().any(|line| line.starts_with("error: stopped after step")), "{rest:?}");
    assert!(rest.iter().any(|line| line == "hint: give the same command again to go on"), "{rest:?}");
    // Another configuration is told what differs; nothing changes.
    let other = run("r", &["--set", "train.epochs=1", "--set", "train.seed=9"]);
    let ran = place.run(&args(&other).iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(ran.status, 1);
    assert!(
        ran.err.contains("train.epochs: 2000 in the checkpoint, 1 now") && ran.err.contains("train.seed: 0"),
        "{}",
        ran.err
    );
    let kept = std::fs::read_to_string(place.path("r/config.toml")).unwrap();
    assert!(kept.contains("epochs = 2000"), "{kept}");

    // To the end, and the head is used.
    let short = run("s", &["--set", "train.epochs=1"]);
    let ran = place.run(&args(&short).iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(ran.ok(), "s/head\n", "{}", ran.err);
    assert!(ran.err.contains("step 1/1 · epoch 1/1 · loss "), "{}", ran.err);
    place
        .run(&["chat", "a.png", "what is in the picture?", "--head", "s/head", "--max-new-tokens", "3"])
        .ok();
}

#[test]
fn wrong_training_is_explained() {
    let place = Place::new();
    world(&place, "train", "1", "w");
    place.write("bad.toml", b"[train]\nlerning_rate = 1e-4\n");
    let cases: [(&str, &[&str], i32); 8] = [
        ("unknown_key", &["--config", "bad.toml"], 1),
        ("no_config", &["--config", "llava-1.7"], 2),
        ("unknown_set", &["--config", "flmm-tiny", "--set", "data.dataset=[]"], 1),
        ("no_sam", &["--config", "llava-1.5-7b", "--model", "w"], 2),
        ("other_lmm", &["--config", "flmm-tiny", "--set", "model.lmm=MGM-2B"], 1),
        ("selector_without_head", &["--config", "flmm-tiny", "--selector-only"], 2),
        ("type_without_cache", &["--config", "flmm-tiny", "--feature-type", "f32"], 2),
        ("bad_value", &["--config", "flmm-tiny", "--set", "train.optimizer.beta1=1"], 1),
    ];
    for (name, args, status) in cases {
        let ran = place.run(&[&["train", "--data", "w", "--out", "r"], args].concat());
        assert_eq!((ran.status, ran.out.as_str()), (status, ""), "{name}: {}", ran.err);
        assert_snapshot!(format!("train_{name}"), ran.err);
    }
    // `flmm features` looks at the LMM just as well.
    let features = ["features", "--data", "w", "--out", "r", "--config", "flmm-tiny"];
    let ran = place.run(&[&features[..], &["--set", "model.lmm=MGM-2B"]].concat());
    assert_eq!(ran.status, 1);
    assert!(ran.err.contains("the configuration is for MGM-2B"), "{}", ran.err);
    assert_eq!(place.files(), ["a.png", "bad.toml", "w"]);
}
