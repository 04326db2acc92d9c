//! Whole trainings on a small world with a feature cache, with few attention maps and without a refiner.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use flmm::Grounder;
use flmm::grounder::{AnswerOptions, HeadSettings, ModelPaths};
use flmm::lmm::{OpenOptions, Turn};
use flmm_data::Part;
use flmm_data::world::{self, Level, Split};
use flmm_train::cache::{MapValues, Values};
use flmm_train::features::{FeatureOptions, build_features};
use flmm_train::{Config, Extras, Models, Watch, run};
use serde_json::Value;

fn models() -> Models {
    let bundle = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/flmm-tiny");
    let options = OpenOptions::new(DType::F32, &Device::Cpu);
    Models {
        name: "flmm-tiny".into(),
        lmm: bundle.join("lmm"),
        sam: Some(bundle.join("sam")),
        head: None,
        options,
    }
}

fn config(settings: &[&str]) -> Config {
    let text = "[model]\ndtype = 'f32'\n[head]\nbase_channels = 2\n[data]\ndatasets = ['png', 'refcoco']\n\
                [train]\nepochs = 2\nbatch_size = 2\nlearning_rate = 1e-3\n[validation]\nevery = 0\n\
                [run]\nlog_every = 1\n";
    let settings: Vec<String> = settings.iter().map(|setting| (*setting).to_owned()).collect();
    Config::parse(text, Path::new("test.toml"), &settings).unwrap()
}

#[derive(Default)]
struct Notes(Vec<String>);

impl Watch for Notes {
    fn note(&mut self, text: &str) {
        self.0.push(text.to_owned());
    }
}

fn losses(run: &Path) -> Vec<f64> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64().unwrap()).collect()
}

#[test]
fn a_run_on_cached_features_is_the_same_run() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("w");
    world::write(&data, Split::Train, 2, 3, Level::One, &|_| {}).unwrap();
    let train = |name: &str, features: Option<FeatureOptions>, models: &Models, notes: &mut Notes| {
        let extras = Extras { features, ..Extras::default() };
        let out = dir.path().join(name);
        run(&config(&[]), models, &data, &out, &extras, notes).map(|_| losses(&out))
    };
    let features = FeatureOptions { dir: dir.path().join("c"), values: Values::F32, maps: MapValues::Same };
    let mut notes = Notes::default();
    let plain = train("plain", None, &models(), &mut notes).unwrap();
    assert_eq!(train("made", Some(features.clone()), &models(), &mut notes).unwrap(), plain);
    assert!(notes.0.iter().any(|note| note.contains("samples to add")), "{:?}", notes.0);
    // Everything is there: the weights of the LMM are not even looked at.
    assert_eq!(train("read", Some(features.clone()), &models(), &mut notes).unwrap(), plain);
    let built =
        build_features(&config(&[]), &models(), &data, &features, Part::default(), &mut notes, |_, _| {
            ControlFlow::Continue(())
        });
    assert_eq!(built.unwrap().added, 0);
    // Edited annotations are other samples, and so are other sentences.
    let file = data.join("coco/refcoco/instances.json");
    let before = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("{before} ")).unwrap();
    let error = train("edited", Some(features.clone()), &models(), &mut notes).unwrap_err().to_string();
    assert!(error.contains("annotations.refcoco: "), "{error}");
    std::fs::write(&file, before).unwrap();
    let other = config(&["train.seed=9"]);
    let out: PathBuf = dir.path().join("other");
    let extras = Extras { features: Some(features), ..Extras::default() };
    let error = run(&other, &models(), &data, &out, &extras, &mut notes).unwrap_err().to_string();
    assert!(error.contains("made for something else") && error.contains("\"seed\":9"), "{error}");
}

#[test]
fn features_of_models_in_other_formats_are_not_mixed() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("w");
    world::write(&data, Split::Train, 1, 3, Level::One, &|_| {}).unwrap();
    let build = |format: &str| {
        let config = config(&[&format!("model.dtype={format}"), "data.limit=1", "data.datasets=['png']"]);
        let (dtype, weights) = config.model.dtype.parts();
        let options = OpenOptions { weights, ..OpenOptions::new(dtype, &Device::Cpu) };
        let models = Models { options, ..models() };
        let cache = FeatureOptions { dir: dir.path().join("c"), values: Values::F32, maps: MapValues::Same };
        let on_sample = |_, _| ControlFlow::Continue(());
        build_features(&config, &models, &data, &cache, Part::default(), &mut Notes::default(), on_sample)
            .map(|built| built.added)
    };
    assert_eq!(build("int4").unwrap(), 1);
    assert_eq!(build("int4").unwrap(), 0);
    for other in ["int8", "bf16"] {
        let error = build(other).unwrap_err().to_string();
        assert!(error.contains(&format!(r#"lmm_dtype: "int4" in the cache, "{other}" wanted"#)), "{error}");
    }
}

#[test]
fn few_maps_and_no_refiner_make_a_head_that_answers() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("w");
    world::write(&data, Split::Train, 2, 3, Level::One, &|_| {}).unwrap();
    let out = dir.path().join("run");
    // There is no SAM at all.
    let models = Models { sam: None, ..models() };
    let config = config(&["head.maps=4", "head.refiner=none", "train.epochs=1"]);
    let outcome = run(&config, &models, &data, &out, &Extras::default(), &mut Notes::default()).unwrap();
    let head = outcome.head.unwrap();
    let settings = HeadSettings::read(&head).unwrap();
    assert_eq!(settings.channels_used.as_ref().unwrap().len(), 4);
    // So is every checkpoint a head that says what it is.
    let checkpoint = out.join(format!("checkpoints/step-{:07}", outcome.steps));
    assert_eq!(HeadSettings::read(&checkpoint).unwrap(), settings);
    // Another run begins from it and looks at the same maps, whatever it says or does not say.
    let models = Models { head: Some(head.clone()), ..models };
    let train = |name: &str, set: &[&str]| {
        let config = self::config(&[&["train.epochs=1", "data.limit=1"], set].concat());
        run(&config, &models, &data, &dir.path().join(name), &Extras::default(), &mut Notes::default())
    };
    for (name, set) in [("b", &[][..]), ("c", &["head.maps=4", "head.refiner=none"])] {
        let head = train(name, set).unwrap().head.unwrap();
        assert_eq!(HeadSettings::read(&head).unwrap(), settings);
    }
    for (set, conflict) in [
        ("head.maps=3", "`head.maps` is 3, but the head in"),
        ("head.refiner=sam", "`head.refiner` is sam, but the head in"),
    ] {
        let error = train("d", &[set]).unwrap_err();
        assert!(error.to_string().contains(conflict) && error.hint().is_some(), "{error}");
        assert!(!dir.path().join("d").exists());
    }

    let paths = ModelPaths { model: models.lmm, sam: dir.path().join("none"), head: Some(head) };
    let grounder = Grounder::open(&paths, &Device::Cpu, DType::F32).unwrap();
    assert!(grounder.sam().is_none());
    let config = world::WorldConfig::new(Level::One);
    let scene = world::generate(&config, Split::Val, 1, 0);
    let options = AnswerOptions { max_new_tokens: 12, ..AnswerOptions::default() };
    let turns = [Turn::user("Please give me a description of the image.")];
    let answer = grounder.answer(&scene.image, &turns, &options).unwrap();
    for phrase in &answer.phrases {
        assert_eq!(phrase.mask, phrase.coarse_mask);
        assert_eq!(phrase.mask.width(), scene.image.width() as usize);
    }
}
