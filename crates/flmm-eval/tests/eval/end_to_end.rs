//! Whole runs: the world with the repository's model, and the miniature real-format trees with random weights.

use std::path::Path;

use candle_core::{DType, Device};
use flmm::Grounder;
use flmm::grounder::{ModelPaths, Revision};
use flmm_data::world::Level;
use flmm_eval::run::{Model, Ran, RunOptions, run};
use flmm_eval::score::score;
use flmm_eval::{Rows, Settings, find, registry, results};

use crate::support::{Count, options, repository, revision, tiny, world_of};

const TASKS: [&str; 8] = [
    "refcoco_val",
    "refcoco+_val",
    "refcocog_val",
    "grefcoco_val",
    "png",
    "png_keywords",
    "reasonseg_val",
    "gcg_val",
];
const BOTH: Rows = Rows { coarse: true, kmeans: true };

fn run_task(name: &str, settings: &Settings, grounder: &Grounder, options: &RunOptions) -> (Ran, usize) {
    let samples = find(name).unwrap().open(settings).unwrap();
    let mut watch = Count::default();
    let model = Model { name: "tiny", revision: &revision(), grounder };
    let ran = run(name, samples.as_ref(), model, options, &mut watch).unwrap();
    (ran, watch.done)
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn the_world_runs_end_to_end() {
    let (_folder, settings) = world_of(Level::One, 3);
    let grounder = tiny();
    let out = tempfile::tempdir().unwrap();
    let out = out.path();
    for name in TASKS {
        let (ran, done) = run_task(name, &settings, &grounder, &options(out, 2, BOTH));
        assert!(ran.done == done && done > 0 && ran.found == 0, "{name}: {ran:?}");
    }
    let whole = results::build(out).unwrap();
    let table = text(&out.join("results.md"));
    assert!(table.contains("| **tiny** |") && table.contains("| tiny (K-means) |"), "{table}");
    for name in TASKS {
        let task = &whole.tasks[name];
        let rows: Vec<&String> = task.rows.keys().collect();
        assert_eq!(rows, ["coarse", "kmeans"], "{name}");
        assert!(task.metrics.0.iter().all(|(_, value)| value.is_finite()), "{name}: {:?}", task.metrics);
        // Our own samples, read as anybody's predictions, score the same.
        let file = out.join(format!("samples_{name}.jsonl"));
        let found = find(name).unwrap();
        let samples = found.open(&settings).unwrap();
        let scored = score(found.as_ref(), samples.as_ref(), ("again", &file), None, &mut |_, _| {}).unwrap();
        assert_eq!((scored.faults, scored.result.metrics), (Vec::new(), task.metrics.clone()), "{name}");
    }
    // A model that was trained on the world is far from chance on it.
    assert!(whole.tasks["refcoco_val"].metrics.get("cIoU").unwrap() > 30.0, "{table}");

    resumes_after_a_kill(&settings, &grounder, out);
}

/// A run whose last line was torn off goes on, and two shards give the same results as one process.
fn resumes_after_a_kill(settings: &Settings, grounder: &Grounder, whole: &Path) {
    let name = "refcoco_val";
    let file = |out: &Path| out.join(format!("samples_{name}.jsonl"));
    let samples = text(&file(whole));
    let out = tempfile::tempdir().unwrap();
    let out = out.path();
    for entry in [file(whole), results::header_file(whole, name)] {
        std::fs::copy(&entry, out.join(entry.file_name().unwrap())).unwrap();
    }
    let first = samples.find('\n').unwrap() + 1;
    std::fs::write(file(out), &samples[..first + 20]).unwrap();
    let (ran, _) = run_task(name, settings, grounder, &options(out, 2, BOTH));
    assert_eq!(ran, Ran { done: 1, found: 1, failed: 0 });
    assert_eq!(text(&file(out)), samples);

    let shards = tempfile::tempdir().unwrap();
    let shards = shards.path();
    for shard in ["2/2", "1/2"] {
        let options = RunOptions { shard: shard.parse().unwrap(), ..options(shards, 2, BOTH) };
        assert_eq!(run_task(name, settings, grounder, &options).0.done, 1);
    }
    let (one, two) = (results::build(out).unwrap(), results::build(shards).unwrap());
    assert_eq!(one, two);
    assert_eq!(text(&out.join("results.json")), text(&shards.join("results.json")));

    nothing_else_is_mixed_in(settings, grounder, out);
}

/// Another model, another state of the same one, other settings: the folder is refused, and its samples stay.
fn nothing_else_is_mixed_in(settings: &Settings, grounder: &Grounder, out: &Path) {
    let name = "refcoco_val";
    let file = out.join(format!("samples_{name}.jsonl"));
    let before = text(&file);
    let samples = find(name).unwrap().open(settings).unwrap();
    let refused = |name: &str, model: &str, revision: &Revision, rows: Rows, wanted: &str| {
        let model = Model { name: model, revision, grounder };
        let error = run(name, samples.as_ref(), model, &options(out, 2, rows), &mut Count::default());
        let error = error.unwrap_err().to_string();
        assert!(error.contains(wanted), "{wanted}: {error}");
    };
    let known = revision();
    let other = |change: fn(&mut Revision)| {
        let mut other = known.clone();
        change(&mut other);
        other
    };
    refused(name, "other", &known, BOTH, r#"model "tiny" there, "other" now"#);
    refused(name, "tiny", &other(|r| r.lmm = "x".into()), BOTH, r#"model's lmm "1" there, "x" now"#);
    refused(name, "tiny", &other(|r| r.head = None), BOTH, r#"model's head "3" there, null now"#);
    refused(name, "tiny", &other(|r| r.sam = None), BOTH, "model's sam");
    refused(name, "tiny", &other(|r| r.dtype = "bf16".into()), BOTH, "model's dtype");
    refused(name, "tiny", &other(|r| r.image_size = Some(448)), BOTH, "model's image_size");
    refused(name, "tiny", &other(|r| r.vision_towers = vec!["t".into()]), BOTH, "model's vision_towers");
    refused(name, "tiny", &known, Rows::default(), "settings {");
    assert_eq!(text(&file), before);

    // Samples of such a run, copied beside the others, are told apart by their lines.
    let stranger = before.replacen(r#""run":""#, r#""run":"0"#, 1);
    assert_ne!(stranger, before);
    std::fs::write(&file, stranger).unwrap();
    let error = results::build(out).unwrap_err().to_string();
    assert!(error.contains("line 1 was made with another model"), "{error}");
    std::fs::write(&file, &before).unwrap();
    // Nor do two states of a model stand in one table.
    let header = results::header_file(out, "png");
    let mut second = text(&results::header_file(out, name)).replace(name, "png");
    second = second.replace(r#""lmm": "1""#, r#""lmm": "2""#);
    std::fs::write(&header, second).unwrap();
    let line = r#"{"id": "0", "scores": {"iou": [], "accuracy": [], "thing": [], "plural": []}}"#;
    std::fs::write(out.join("samples_png.jsonl"), format!("{line}\n")).unwrap();
    let error = results::build(out).unwrap_err().to_string();
    assert!(error.contains("two models called tiny: png and refcoco_val"), "{error}");
    std::fs::remove_file(header).unwrap();
    results::build(out).unwrap();
}

#[test]
fn the_real_formats_run_end_to_end() {
    let fixtures = repository().join("fixtures");
    let case = fixtures.join("lmm/llava15");
    let paths = ModelPaths {
        model: case.join("model"),
        sam: fixtures.join("lmm/_sam/sam_vit_tiny.pth"),
        head: Some(case.join("heads.pth")),
    };
    let grounder = Grounder::open(&paths, &Device::Cpu, DType::F32).unwrap();
    let settings = Settings { data: fixtures.join("datasets/tree"), ..Settings::default() };
    let store = settings.pictures().unwrap();
    let revision = revision();
    let model = Model { name: "random", revision: &revision, grounder: &grounder };
    let out = tempfile::tempdir().unwrap();
    let mut ran = Vec::new();
    for task in registry() {
        let name = task.name();
        let ours = ["refcoco", "png", "reasonseg", "gcg"].iter().any(|start| name.starts_with(start));
        // The random head has no keyword selector; not every split is in the trees.
        if !ours || name == "png_keywords" || task.needs().iter().any(|need| !need.is_present(&store)) {
            continue;
        }
        let Ok(samples) = task.open(&settings) else { continue };
        let all = samples.ids().len();
        let mut watch = Count::default();
        let options = options(out.path(), 2, BOTH);
        let done = run(name, samples.as_ref(), model, &options, &mut watch).unwrap().done;
        assert_eq!(done, all.min(2), "{name}");
        ran.push(name.to_owned());
    }
    for name in ["refcoco_val", "png", "reasonseg_val", "reasonseg_test", "gcg_val"] {
        assert!(ran.iter().any(|ran| ran == name), "{name} did not run: {ran:?}");
    }
    assert_eq!(results::build(out.path()).unwrap().tasks.len(), ran.len());
}
