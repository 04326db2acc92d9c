//! Whole runs: the world with the repository's model, and the miniature real-format trees with random weights.

use std::path::Path;

use candle_core::{DType, Device};
use flmm::Grounder;
use flmm::grounder::ModelPaths;
use flmm_data::world::Level;
use flmm_eval::run::{Ran, RunOptions, run};
use flmm_eval::score::score;
use flmm_eval::{Rows, Settings, find, registry, results};

use crate::support::{Count, options, repository, tiny, world_of};

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
    let ran = run(name, samples.as_ref(), ("tiny", grounder), options, &mut watch).unwrap();
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

    // Another model, or other settings, must not be mixed in.
    let samples = find(name).unwrap().open(settings).unwrap();
    let mut watch = Count::default();
    let error = run(name, samples.as_ref(), ("other", grounder), &options(out, 2, BOTH), &mut watch);
    assert!(error.unwrap_err().to_string().contains(r#"model "tiny" there, "other" now"#));
    let error =
        run(name, samples.as_ref(), ("tiny", grounder), &options(out, 2, Rows::default()), &mut watch);
    assert!(error.unwrap_err().to_string().contains("settings {"));
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
    let out = tempfile::tempdir().unwrap();
    let mut ran = Vec::new();
    for task in registry() {
        let name = task.name();
        let ours = ["refcoco", "png", "reasonseg", "gcg"].iter().any(|start| name.starts_with(start));
        // The random head has no keyword selector; not every split is in the trees.
        if !ours || name == "png_keywords" || task.needs().iter().any(|need| !need.is_present(&settings.data))
        {
            continue;
        }
        let Ok(samples) = task.open(&settings) else { continue };
        let all = samples.ids().len();
        let mut watch = Count::default();
        let options = options(out.path(), 2, BOTH);
        let done = run(name, samples.as_ref(), ("random", &grounder), &options, &mut watch).unwrap().done;
        assert_eq!(done, all.min(2), "{name}");
        ran.push(name.to_owned());
    }
    for name in ["refcoco_val", "png", "reasonseg_val", "reasonseg_test", "gcg_val"] {
        assert!(ran.iter().any(|ran| ran == name), "{name} did not run: {ran:?}");
    }
    assert_eq!(results::build(out.path()).unwrap().tasks.len(), ran.len());
}
