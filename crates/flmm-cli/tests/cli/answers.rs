//! What users get: marked text, JSON, overlays, attention.

use std::io::Write;
use std::process::Stdio;

use flmm::masks::{Mask, Segmentation};
use insta::assert_snapshot;
use serde_json::Value;

use crate::support::{Place, fixture, listing, model, shape};

const TEXT: &str = "A red ball near the old tree.";

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

#[test]
fn a_given_text_is_marked_and_drawn() {
    let place = Place::new();
    let ran = place.run_with_model(&[
        "ground",
        "a.png",
        "--text",
        TEXT,
        "--phrase",
        "the old tree",
        "--phrase",
        "A red ball",
    ]);
    let lines: Vec<&str> = ran.ok().lines().collect();
    assert_eq!(lines[0], "[A red ball]² near [the old tree]¹.");
    assert_eq!(lines[1], "");
    assert!(
        lines[2].starts_with("¹ the old tree: ") && lines[3].starts_with("² A red ball: "),
        "{}",
        ran.out
    );
    assert_eq!(ran.err, "overlay: a.overlay.png\n");
    assert_eq!(place.files(), ["a.overlay.png", "a.png"]);
    // 80×60 is enlarged to 560×420, the text goes below.
    let overlay = image::open(place.path("a.overlay.png")).unwrap();
    assert_eq!(overlay.width(), 560);
    assert!(overlay.height() > 420);
}

#[test]
fn json_has_the_documented_form() {
    let place = Place::new();
    let ran = place.run_with_model(&[
        "ground",
        "a.png",
        "--text",
        TEXT,
        "--phrase",
        "the old tree",
        "--json",
        "--no-overlay",
    ]);
    let found = json(ran.ok());
    assert_eq!((ran.out.lines().count(), ran.err.as_str()), (1, ""));
    assert_snapshot!("json", serde_json::to_string_pretty(&shape(&found)).unwrap());
    assert_eq!(found["model"], "model");
    assert_eq!((&found["image"]["width"], &found["image"]["height"]), (&80.into(), &60.into()));
    assert_eq!(found["answer"], TEXT);
    let phrase = &found["phrases"][0];
    assert_eq!(
        (&phrase["text"], &phrase["start"], &phrase["end"]),
        (&"the old tree".into(), &16.into(), &28.into())
    );
    // Box and area are those of the mask.
    let coco: Segmentation = serde_json::from_value(phrase["segmentation"].clone()).unwrap();
    let mask = Mask::from_coco(&coco).unwrap();
    assert_eq!((mask.width(), mask.height()), (80, 60));
    assert_eq!(phrase["area"], mask.area());
    assert_eq!(phrase["bbox"], serde_json::json!(mask.bbox()));
    let coarse: Segmentation = serde_json::from_value(phrase["coarse"].clone()).unwrap();
    assert_eq!(coarse.size, [60, 80]);
    assert_eq!(place.files(), ["a.png"]);
}

#[test]
fn an_answer_is_the_same_with_and_without_masks() {
    let place = Place::new();
    for more in
        [&["--max-new-tokens", "12"][..], &["--max-new-tokens", "12", "--temperature", "0.8", "--seed", "3"]]
    {
        let args = [&["chat", "a.png", "What is this?", "--json"], more].concat();
        let grounded = json(place.run_with_model(&args).ok());
        let plain = json(place.run_with_model(&[&args[..], &["--no-ground"]].concat()).ok());
        assert_eq!(grounded["answer"], plain["answer"]);
        assert!(!grounded["answer"].as_str().unwrap().is_empty());
        assert_eq!(plain["phrases"], serde_json::json!([]));
        // The same seed on one thread: the same answer.
        let again = json(place.run_with_model(&[&args[..], &["--threads", "1"]].concat()).ok());
        assert_eq!(grounded["answer"], again["answer"]);
    }
}

#[test]
fn a_conversation_is_read_line_by_line() {
    let place = Place::new();
    let mut command = place.command(&["chat", "a.png", "--json", "--max-new-tokens", "5", "--no-overlay"]);
    let mut child = command
        .args(model())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"What is this?\nAnd that?\n\nnever asked\n").unwrap();
    let ran = place.ran(child.wait_with_output().unwrap());
    let answers: Vec<Value> = ran.ok().lines().map(json).collect();
    assert_eq!(answers.len(), 2);
    assert_eq!(ran.err, "");
}

#[test]
fn quiet_says_nothing_and_verbose_more() {
    let place = Place::new();
    let args = ["ground", "a.png", "--text", TEXT, "--phrase", "A red ball", "--overlay", "b.png"];
    let quiet = place.run_with_model(&[&args[..], &["-q"]].concat());
    assert!(!quiet.ok().is_empty() && quiet.err.is_empty());
    assert_eq!(place.files(), ["a.png", "b.png"]);
    // An overlay that exists is replaced.
    let verbose = place.run_with_model(&[&args[..], &["-v"]].concat());
    assert_eq!(verbose.ok(), quiet.out);
    assert!(
        verbose.err.contains("loaded model in ") && verbose.err.contains(" tokens; read "),
        "{}",
        verbose.err
    );
}

#[test]
fn nobody_reading_is_no_failure() {
    let place = Place::new();
    let mut child =
        place.command(&["inspect", "lmms"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let ran = place.ran(child.wait_with_output().unwrap());
    assert_eq!((ran.status, ran.err.as_str()), (0, ""));
}

#[test]
fn attention_is_drawn_and_saved() {
    let place = Place::new();
    let args = [
        "inspect",
        "attention",
        "a.png",
        "--text",
        TEXT,
        "--phrase",
        "A red ball",
        "--phrase",
        "the old tree",
    ];
    let ran = place.run_with_model(&[&args[..], &["--raw", "maps.safetensors"]].concat());
    assert!(ran.ok().starts_with(TEXT), "{}", ran.out);
    assert_eq!(ran.err, "attention: a.attention.png\nmaps: maps.safetensors\n");
    assert_eq!(place.files(), ["a.attention.png", "a.png", "maps.safetensors"]);
    let maps =
        candle_core::safetensors::load(place.path("maps.safetensors"), &candle_core::Device::Cpu).unwrap();
    assert_eq!(maps.len(), 2);
    // 2 layers × 4 heads on a 4×4 grid, raw probabilities.
    assert_eq!(maps["phrase.0"].dims(), [8, 4, 4]);
    let values: Vec<f32> = maps["phrase.1"].flatten_all().unwrap().to_vec1().unwrap();
    assert!(values.iter().all(|v| (0.0..=1.0).contains(v)) && values.iter().any(|&v| v > 0.0));
    let sheet = image::open(place.path("a.attention.png")).unwrap();
    assert!(sheet.width() > 5 * 256 && sheet.height() > 2 * 192);
}

#[test]
fn a_model_and_the_registry_are_listed() {
    let place = Place::new();
    let ran = place.run_with_model(&["inspect", "model"]);
    let facts = listing(ran.ok());
    assert_eq!(
        (facts["lmm.layers"].as_str(), facts["maps.channels"].as_str(), facts["maps.grid"].as_str()),
        ("2", "8", "4×4")
    );
    let as_json = json(place.run_with_model(&["inspect", "model", "--json"]).ok());
    assert_eq!(as_json["lmm"]["hidden_size"], 48);
    let known = json(place.run(&["inspect", "lmms", "--json"]).ok());
    assert_eq!(known.as_array().unwrap().len(), flmm::lmm::REGISTRY.len());
    for entry in flmm::lmm::REGISTRY {
        assert!(place.run(&["inspect", "lmms"]).ok().contains(entry.spec.repo));
    }
}

#[test]
fn a_bundle_needs_no_other_option() {
    let place = Place::new();
    let bundle = place.path("bundle");
    crate::support::copy_folder(&fixture("lmm/llava15/model"), &bundle.join("lmm"));
    std::fs::create_dir_all(bundle.join("sam")).unwrap();
    std::fs::create_dir_all(bundle.join("head")).unwrap();
    for name in ["sam_vit_tiny.pth", "sam_config.json"] {
        std::fs::copy(fixture("lmm/_sam").join(name), bundle.join("sam").join(name)).unwrap();
    }
    std::fs::copy(fixture("lmm/llava15/heads.pth"), bundle.join("head/heads.pth")).unwrap();
    let ran = place.run(&["inspect", "model", "--model", "bundle"]);
    assert_eq!(listing(ran.ok())["model"], "bundle");
}

#[test]
fn a_conversation_may_be_about_several_pictures() {
    let place = Place::new();
    std::fs::copy(fixture("lmm/llava15/images/b.png"), place.path("b.png")).unwrap();
    let ask = |more: &[&str]| {
        let base = ["chat", "a.png", "--max-new-tokens", "6", "--json"];
        let ran = place.run_with_model(&[&base[..], more].concat());
        json(ran.ok())
    };
    let (a, b) = (["--image", "b.png", "What?"], ["--image", "b.png", "What?", "--ground-image", "2"]);
    let (first, second) = (ask(&a), ask(&b));
    assert_eq!(first["answer"], second["answer"]);
    for (found, name, number) in [(&first, "a.png", 1), (&second, "b.png", 2)] {
        let (width, height) = image::image_dimensions(place.path(name)).unwrap();
        assert_eq!(found["image"], serde_json::json!({ "width": width, "height": height }));
        assert_eq!(found["ground_image"], number);
    }
    // Pictures among the words make another prompt; one picture has no number.
    let among = ask(&["--image", "b.png", "<image>the whole, <image>a part: what?"]);
    assert_eq!(among["ground_image"], 1);
    assert!(ask(&["What?"]).get("ground_image").is_none());

    let wrong = place.run_with_model(&["chat", "a.png", "What?", "--ground-image", "2"]);
    assert_eq!((wrong.status, wrong.out.as_str()), (2, ""));
    assert!(wrong.err.contains("--ground-image 2") && wrong.err.contains("hint: "), "{}", wrong.err);
    let marks = place.run_with_model(&["chat", "a.png", "--image", "b.png", "<image> <image> <image> what?"]);
    assert_eq!((marks.status, marks.out.as_str()), (1, ""));
    assert!(marks.err.contains("picture 2 of 2"), "{}", marks.err);
}

#[test]
fn the_registry_tells_how_many_pictures_a_model_takes() {
    let place = Place::new();
    let known = json(place.run(&["inspect", "lmms", "--json"]).ok());
    for (found, entry) in known.as_array().unwrap().iter().zip(flmm::lmm::REGISTRY) {
        assert_eq!(found["several_images"], entry.spec.several_images);
    }
    let table = place.run(&["inspect", "lmms"]);
    let line = |name: &str| table.ok().lines().find(|line| line.contains(name)).unwrap().to_owned();
    assert!(line("DeepSeekVL-7B").contains("  several  ") && line("MGM-HD-7B").contains("  one  "));
}
