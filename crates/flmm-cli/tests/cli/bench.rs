//! What is measured of a grounding pass.

use serde_json::Value;

use crate::support::Place;

const TEXT: &str = "A red ball near the old tree.";
const ASKED: [&str; 7] = ["a.png", "--text", TEXT, "--phrase", "the old tree", "--phrase", "A red ball"];

fn run(place: &Place, command: &[&str], more: &[&str]) -> Value {
    let ran = place.run_with_model(&[command, &ASKED, more, &["--json"]].concat());
    serde_json::from_str(ran.ok()).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

#[test]
fn stages_of_grounding_are_measured_and_make_the_same_masks() {
    let place = Place::new();
    let more = ["--rounds", "3", "--warmup", "1", "--decode", "4"];
    let measured = run(&place, &["bench", "ground"], &more);
    let grounded = run(&place, &["ground"], &["--no-overlay"]);

    // The pass that is taken apart is the one that users get.
    let phrases = grounded["phrases"].as_array().unwrap();
    assert_eq!(phrases.len(), 2);
    for (phrase, mask) in phrases.iter().zip(measured["masks"].as_array().unwrap()) {
        assert_eq!((&mask["refined"], &mask["coarse"]), (&phrase["segmentation"], &phrase["coarse"]));
    }

    let stages = measured["stages"].as_array().unwrap();
    let names: Vec<&str> = stages.iter().map(|stage| stage["name"].as_str().unwrap()).collect();
    let pass = ["preprocess", "vision tower", "prefill", "maps", "SAM encoder", "U-Net", "SAM decoder"];
    assert_eq!(names, [&pass[..], &["whole", "one more token"]].concat());
    for stage in stages {
        let time = |name: &str| stage["seconds"][name].as_f64().unwrap();
        assert!(time("best") > 0.0, "{stage}");
        assert!(time("best") <= time("median") && time("median") <= time("worst"), "{stage}");
        let counted = stage["gflop"].as_f64().is_some_and(|gflop| gflop > 0.0);
        assert_eq!(counted, !["preprocess", "whole"].contains(&stage["name"].as_str().unwrap()), "{stage}");
        assert_eq!(stage["floor"].is_null(), stage["name"] == "preprocess", "{stage}");
    }
    let rounds = &measured["rounds"];
    for kind in ["stages", "whole", "captured", "decode"] {
        assert_eq!(rounds[kind].as_array().unwrap().len(), 3, "{kind}");
    }
    assert!(measured["capture_cost"]["wall"].is_f64());
    assert_eq!(measured["generated"].as_array().unwrap().len(), 4);

    // Where in the sequence the picture and the phrases are.
    let read = &measured["read"];
    let ids = numbers(&read["token_ids"]);
    let place_of = |name: &str| read[name].as_u64().unwrap() as usize;
    let (start, image) = (place_of("image_start"), place_of("image_tokens"));
    assert!(ids[start..start + image].iter().all(|&id| id == ids[start]));
    assert!(start + image <= place_of("caption_start") && place_of("caption_start") < ids.len());
    assert_eq!(read["phrases"].as_array().unwrap().len(), 2);
    if cfg!(target_os = "linux") {
        assert!(measured["peak_memory"]["opening"].as_u64().unwrap() > 1 << 20);
    }
}

#[test]
fn the_table_tells_what_was_asked_for() {
    let place = Place::new();
    let command = |more: &[&str]| {
        place.run_with_model(&[&["bench", "ground"], &ASKED[..3], &["--rounds", "1"], more].concat())
    };
    // Without phrases: the noun phrases of the text.
    let all = command(&[]);
    for words in ["SAM encoder", "tokens/s", "keeping attention rows", "peak memory", "of floor"] {
        assert!(all.ok().contains(words), "{words}: {}", all.out);
    }
    let less = command(&["--pass-only", "--decode", "0"]);
    assert!(
        !less.ok().contains("keeping attention rows") && !less.out.contains("one more token"),
        "{}",
        less.out
    );
    assert_eq!(place.files(), ["a.png"]);
}

#[test]
fn nothing_to_measure_is_explained() {
    let place = Place::new();
    for (text, phrase, words) in
        [("and", None, "--phrase"), (" ", None, "blank"), (TEXT, Some("a cat"), "does not occur")]
    {
        let phrase: Vec<&str> = phrase.iter().flat_map(|phrase| ["--phrase", phrase]).collect();
        let ran =
            place.run_with_model(&[&["bench", "ground", "a.png", "--text", text], &phrase[..]].concat());
        assert_eq!((ran.status, ran.out.as_str()), (2, ""), "{}", ran.err);
        assert!(ran.err.contains(words) && ran.err.contains("hint:"), "{}", ran.err);
    }
}
