//! A whole training on a small world with the embedded model's frozen parts: from annotations to a head that works.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use flmm::grounder::{AnswerOptions, HeadSettings, ModelPaths, RefinerKind};
use flmm::lmm::{OpenOptions, Turn};
use flmm::{Grounder, Result};
use flmm_data::world::{self, Level, Split};
use flmm_train::distributed::local;
use flmm_train::{After, Config, Extras, Models, Outcome, SKIPPED, Step, Watch};
use serde_json::{Map, Value};

fn bundle() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/flmm-tiny")
}

fn models(head: Option<PathBuf>) -> Models {
    Models {
        name: "flmm-tiny".into(),
        lmm: bundle().join("lmm"),
        sam: Some(bundle().join("sam")),
        head,
        options: OpenOptions::new(DType::F32, &Device::Cpu),
    }
}

/// A folder with a training and a validation world.
fn place(scenes: u64) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    world::write(&dir.path().join("w"), Split::Train, scenes, 3, Level::One, &|_| {}).unwrap();
    world::write(&dir.path().join("v"), Split::Val, 2, 3, Level::One, &|_| {}).unwrap();
    dir
}

fn config(dir: &Path, settings: &[&str]) -> Config {
    let text = format!(
        "[model]\ndtype = 'f32'\n[head]\nbase_channels = 2\nselector = {{}}\nphrases_at_once = 2\n\
         [data]\ndatasets = ['png', 'refcoco']\n[train]\nepochs = 1\nbatch_size = 2\nlearning_rate = 1e-3\n\
         [validation]\nevery = 4\nsamples = 2\noverlays = 1\ndata = '{}'\n[run]\nlog_every = 2\nloaders = 2\nworkers = 2\n",
        dir.join("v").display()
    );
    let settings: Vec<String> = settings.iter().map(|setting| (*setting).to_owned()).collect();
    Config::parse(&text, Path::new("test.toml"), &settings).unwrap()
}

/// Stops after a step, or does something then; keeps what it is told.
struct At<F>(u64, F, Vec<String>);

impl<F: FnMut() -> bool> Watch for At<F> {
    fn after_step(&mut self, step: &Step) -> Result<After> {
        Ok(After { stop: step.step == self.0 && (self.1)(), values: Vec::new() })
    }

    fn note(&mut self, text: &str) {
        self.2.push(text.to_owned());
    }
}

struct Silent;
impl Watch for Silent {}

fn run(config: &Config, models: &Models, data: &Path, out: &Path, watch: &mut dyn Watch) -> Result<Outcome> {
    flmm_train::run(config, models, data, out, &Extras::default(), watch)
}

fn train(dir: &Path, out: &str, settings: &[&str], watch: &mut dyn Watch) -> Result<Outcome> {
    run(&config(dir, settings), &models(None), &dir.join("w"), &dir.join(out), watch)
}

fn log(dir: &Path, out: &str) -> Vec<Map<String, Value>> {
    let text = std::fs::read_to_string(dir.join(out).join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_head_is_trained_resumed_and_used() {
    let dir = place(4);
    let dir = dir.path();
    let whole = train(dir, "a", &[], &mut Silent).unwrap();
    let head = whole.head.clone().unwrap();
    assert_eq!((whole.steps, whole.skipped), (whole.total, 0));

    // Stopped and resumed, the same bytes come out.
    let stopped = train(dir, "b", &[], &mut At(3, || true, Vec::new())).unwrap();
    assert_eq!((stopped.steps, &stopped.head), (3, &None));
    // Whoever changes the configuration is told the key.
    let error = train(dir, "b", &["train.learning_rate=1e-2"], &mut Silent).unwrap_err().to_string();
    assert!(error.contains("train.learning_rate: 0.001 in the checkpoint, 0.01 now"), "{error}");
    let resumed = train(dir, "b", &["run.loaders=1", "run.workers=1"], &mut Silent).unwrap().head.unwrap();
    let bytes = |head: &Path| std::fs::read(head.join("head.safetensors")).unwrap();
    assert!(bytes(&head) == bytes(&resumed));

    // Once more: it is finished, and stays as it is.
    let about = || std::fs::read(dir.join("a/head/head.json")).unwrap();
    let before = about();
    assert_eq!(train(dir, "a", &[], &mut Silent).unwrap(), whole);
    assert_eq!(about(), before);

    // What the folder holds.
    for file in ["config.toml", "metrics.jsonl", "tensorboard", "head/head.json", "validation/step-0000004"] {
        assert!(dir.join("a").join(file).exists(), "{file}");
    }
    let kept = std::fs::read_to_string(dir.join("a/config.toml")).unwrap();
    let mut expected = config(dir, &[]);
    // What was left to the program is written down too.
    expected.head.refiner = Some(RefinerKind::Sam);
    assert_eq!(Config::parse(&kept, Path::new("kept"), &[]).unwrap(), expected);
    let lines = log(dir, "a");
    let validated = lines.iter().find(|line| line["step"] == 4).unwrap();
    for name in [
        "loss",
        "aiou",
        "sam_aiou",
        "selector_loss",
        "val_aiou",
        "val_sam_ciou",
        "val_token_f1",
        "val_phrase_f1",
    ] {
        assert!(validated[name].as_f64().is_some_and(f64::is_finite), "{name}: {validated:?}");
    }

    // The head works where released heads do.
    let paths = ModelPaths { head: Some(head), ..ModelPaths::bundle(&bundle()) };
    let grounder = Grounder::open(&paths, &Device::Cpu, DType::F32).unwrap();
    let picture = image::RgbImage::from_pixel(240, 180, image::Rgb([200, 220, 240]));
    let options = AnswerOptions { max_new_tokens: 4, ..AnswerOptions::default() };
    grounder.answer(&picture, &[Turn::user("what is in the picture?")], &options).unwrap();
}

#[test]
fn the_selector_alone_changes_nothing_but_itself() {
    let dir = place(3);
    let dir = dir.path();
    let start = bundle().join("head");
    let settings = [
        "mode=selector",
        "data.datasets=['png']",
        "data.empty_narratives=keep",
        "head.selector.positive_rate=0.3",
    ];
    let config = config(dir, &settings);
    let error = run(&config, &models(None), &dir.join("w"), &dir.join("s"), &mut Silent).unwrap_err();
    assert!(error.hint().unwrap().contains("--head"), "{error}");
    let models = models(Some(start.clone()));
    let outcome = run(&config, &models, &dir.join("w"), &dir.join("s"), &mut Silent).unwrap();
    let read = |path: &Path| flmm::weights::load_checkpoint(path, Some(DType::F32), &Device::Cpu).unwrap();
    let (before, after) = (read(&start), read(&outcome.head.unwrap()));
    for (name, tensor) in &after {
        let Some(old) = before.get(name) else { continue };
        let values = |t: &candle_core::Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(tensor) == values(old), !name.starts_with("keyword_selector."), "{name}");
    }
    assert!(log(dir, "s").last().unwrap()["val_token_ap"].as_f64().unwrap() > 0.0);
}

#[test]
fn training_beside_the_selector_leaves_the_rest_as_it_is_without() {
    let dir = place(2);
    let dir = dir.path();
    let settings = ["validation.every=0", "data.limit=3"];
    let with = train(dir, "a", &settings, &mut Silent).unwrap().head.unwrap();
    let mut config = config(dir, &settings);
    (config.head.selector, config.train.groups) = (None, Vec::new());
    let without = run(&config, &models(None), &dir.join("w"), &dir.join("b"), &mut Silent);
    let without = without.unwrap().head.unwrap();
    let read = |path: &Path| flmm::weights::load_checkpoint(path, None, &Device::Cpu).unwrap();
    let (with, without) = (read(&with), read(&without));
    assert_eq!(with.len(), without.len() + 2);
    for (name, tensor) in &without {
        let values = |t: &candle_core::Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(values(tensor) == values(&with[name]), "{name}");
    }
}

#[test]
fn pictures_that_disappear_are_skipped_until_they_are_too_many() {
    let dir = place(6);
    let dir = dir.path();
    let remove = || {
        for folder in ["train2017", "train2014"] {
            let folder = dir.join("w/coco").join(folder);
            let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect();
            files.sort();
            std::fs::remove_file(&files[2]).unwrap();
        }
        false
    };
    // Tolerated: others take their place, and the list says which and why.
    let settings = ["data.max_broken=0.5", "validation.every=0", "train.epochs=2"];
    let mut at = At(2, remove, Vec::new());
    let outcome = train(dir, "a", &settings, &mut at).unwrap();
    assert!(at.2.iter().any(|note| note.starts_with("skipped png/train/")), "{:?}", at.2);
    assert!(outcome.head.is_some() && outcome.skipped >= 2, "{outcome:?}");
    let list = std::fs::read_to_string(dir.join("a").join(SKIPPED)).unwrap();
    assert_eq!(list.lines().count(), outcome.skipped);
    assert!(list.contains("train2017/") && list.contains("no such picture"), "{list}");
    // As it is by default, more than one in a hundred is too many.
    let error = train(dir, "b", &["validation.every=0", "train.epochs=2"], &mut Silent).unwrap_err();
    assert!(error.to_string().contains("samples cannot be used, more than 1 %"), "{error}");
    assert!(error.hint().unwrap().contains("flmm data check"), "{error}");
}

#[test]
fn a_run_that_goes_on_skips_what_one_that_was_not_stopped_skips() {
    let dir = place(6);
    let dir = dir.path();
    for folder in ["train2017", "train2014"] {
        let folder = dir.join("w/coco").join(folder);
        let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect();
        files.sort();
        std::fs::remove_file(&files[2]).unwrap();
    }
    // One loader, so that the order of the list is settled; it reads two batches ahead of the steps.
    let settings = [
        "data.max_broken=0.5",
        "validation.every=0",
        "train.epochs=2",
        "run.loaders=1",
        "run.prefetch=2",
        "run.checkpoint_minutes=1e-9",
    ];
    let whole = train(dir, "a", &settings, &mut Silent).unwrap();
    let list = |out: &str| std::fs::read_to_string(dir.join(out).join(SKIPPED)).unwrap();
    for step in [1, 3] {
        let out = format!("b{step}");
        train(dir, &out, &settings, &mut At(step, || true, Vec::new())).unwrap();
        let resumed = train(dir, &out, &settings, &mut Silent).unwrap();
        assert_eq!((resumed.skipped, list(&out)), (whole.skipped, list("a")), "stopped after step {step}");
        let bytes =
            |head: &Outcome| std::fs::read(head.head.as_ref().unwrap().join("head.safetensors")).unwrap();
        assert!(bytes(&resumed) == bytes(&whole));
    }
}

#[test]
fn validation_and_curves_never_end_a_run() {
    let dir = place(3);
    let dir = dir.path();
    let blind = || {
        std::fs::remove_dir_all(dir.join("v/coco/val2017")).unwrap();
        std::fs::remove_dir_all(dir.join("v/coco/train2014")).unwrap();
        false
    };
    let settings = ["data.limit=2", "validation.every=2", "train.epochs=4"];
    let mut at = At(1, blind, Vec::new());
    let outcome = train(dir, "a", &settings, &mut at).unwrap();
    assert!(outcome.head.is_some() && outcome.steps >= 6, "{outcome:?}");
    let told: Vec<&String> = at.2.iter().filter(|note| note.starts_with("no validation: ")).collect();
    assert_eq!(told.len(), 1, "{:?}", at.2);
}

#[test]
fn edited_annotations_are_other_data() {
    let dir = place(2);
    let dir = dir.path();
    let settings = ["validation.every=0", "data.limit=2"];
    train(dir, "a", &settings, &mut At(1, || true, Vec::new())).unwrap();
    let file = dir.join("w/coco/annotations/png_coco_train2017.json");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replacen(" a ", " the ", 1)).unwrap();
    let error = train(dir, "a", &settings, &mut Silent).unwrap_err().to_string();
    assert!(error.contains("task.data.revision.annotations.png: "), "{error}");
    assert!(!error.contains("refcoco") && !error.contains("members"), "{error}");
}

/// Two ranks in threads of this process, each with its own data folder.
fn together(dir: &Path, settings: &[&str], data: [&str; 2]) -> Vec<(Result<Outcome>, Vec<String>)> {
    let config = config(dir, settings);
    std::thread::scope(|scope| {
        let ranks = local(2).into_iter().zip(data).map(|(rank, data)| {
            let config = &config;
            let thread = std::thread::Builder::new().stack_size(64 << 20);
            let work = move || {
                let mut notes = At(0, || false, Vec::new());
                let extras = Extras { communicator: &rank, ..Extras::default() };
                let (data, out) = (dir.join(data), dir.join("ranks"));
                (flmm_train::run(config, &models(None), &data, &out, &extras, &mut notes), notes.2)
            };
            thread.spawn_scoped(scope, work).unwrap()
        });
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn ranks_begin_together_or_not_at_all() {
    let dir = place(2);
    let dir = dir.path();
    // One cannot see the data: the other does not wait for it.
    let ended = together(dir, &["validation.every=0"], ["w", "none"]);
    let messages: Vec<String> = ended.into_iter().map(|(ended, _)| ended.unwrap_err().to_string()).collect();
    assert!(messages[0].starts_with("rank 1: ") && messages[0].ends_with(&messages[1]), "{messages:?}");
    assert!(!dir.join("ranks").exists());
    // Rank 0 chooses the maps, writes and draws; both make the same head.
    let settings = ["validation.every=0", "head.maps=3", "head.refiner=none", "data.limit=2"];
    let ended = together(dir, &settings, ["w", "w"]);
    let outcomes: Vec<&Outcome> = ended.iter().map(|(ended, _)| ended.as_ref().unwrap()).collect();
    assert_eq!(outcomes[0], outcomes[1]);
    assert!(dir.join("ranks/maps.json").is_file() && dir.join("ranks/tensorboard").is_dir());
    assert!(!dir.join("ranks/rank-1/maps.json").exists() && !dir.join("ranks/rank-1/tensorboard").exists());
    let kept = HeadSettings::read(outcomes[0].head.as_ref().unwrap()).unwrap();
    assert_eq!(kept.channels_used.unwrap().len(), 3);
}

#[test]
fn wrong_models_and_data_are_explained() {
    let dir = place(1);
    let dir = dir.path();
    let error = train(dir, "a", &["model.lmm=MGM-2B"], &mut Silent).unwrap_err().to_string();
    assert!(error.contains("the configuration is for MGM-2B"), "{error}");
    let data = dir.join("none");
    let missing = run(&config(dir, &[]), &models(None), &data, &dir.join("a"), &mut Silent);
    assert!(missing.unwrap_err().to_string().contains("none"));
    let more = train(dir, "a", &["head.maps=31"], &mut Silent).unwrap_err().to_string();
    assert!(more.contains("`head.maps` is 31, but the LMM has 30 attention maps"), "{more}");
    let none = Models { sam: None, ..models(None) };
    let error = run(&config(dir, &[]), &none, &dir.join("w"), &dir.join("a"), &mut Silent).unwrap_err();
    assert!(error.hint().unwrap().contains("head.refiner"), "{error}");
    let other = models(Some(bundle().join("sam")));
    let error = run(&config(dir, &[]), &other, &dir.join("w"), &dir.join("a"), &mut Silent).unwrap_err();
    assert!(error.to_string().contains("unexpected tensor"), "{error}");
    assert!(!dir.join("a").exists(), "nothing is written before the run begins");
}
