//! Help texts and what the argument parser refuses.

use insta::assert_snapshot;

use crate::support::Place;

#[test]
fn help_texts() {
    let place = Place::new();
    assert_snapshot!("help", place.run(&["--help"]).ok());
    for command in
        ["chat", "ground", "serve", "train", "features", "bench", "data", "world", "convert", "inspect"]
    {
        assert_snapshot!(format!("help_{command}"), place.run(&[command, "--help"]).ok());
    }
    assert_snapshot!("help_bench_ground", place.run(&["bench", "ground", "--help"]).ok());
    for what in ["lmms", "model", "attention"] {
        assert_snapshot!(format!("help_inspect_{what}"), place.run(&["inspect", what, "--help"]).ok());
    }
    assert_snapshot!("help_data_check", place.run(&["data", "check", "--help"]).ok());
    assert_snapshot!("help_eval", place.run(&["eval", "--help"]).ok());
    for what in ["score", "samples", "merge", "tasks", "identity"] {
        assert_snapshot!(format!("help_eval_{what}"), place.run(&["eval", what, "--help"]).ok());
    }
    for what in ["head", "lmm", "sam"] {
        assert_snapshot!(format!("help_convert_{what}"), place.run(&["convert", what, "--help"]).ok());
    }
}

#[test]
fn wrong_usage_exits_with_2() {
    let place = Place::new();
    let wrong: [(&str, &[&str]); 12] = [
        ("no_command", &[]),
        ("no_picture", &["chat"]),
        ("empty_prompt", &["chat", "a.png", ""]),
        ("blank_prompt", &["chat", "a.png", " \t"]),
        ("blank_text", &["ground", "a.png", "--text", " "]),
        ("blank_phrase", &["ground", "a.png", "--text", "a dog", "--phrase", ""]),
        ("no_tokens", &["chat", "a.png", "hi", "--max-new-tokens", "0"]),
        ("negative_temperature", &["chat", "a.png", "hi", "--temperature=-1"]),
        ("no_threads", &["chat", "a.png", "hi", "--threads", "0"]),
        ("quiet_and_verbose", &["chat", "a.png", "hi", "-q", "-v"]),
        ("sam_without_model", &["chat", "a.png", "hi", "--sam", "b.pth"]),
        (
            "third_level",
            &["world", "--out", "w", "--split", "val", "--count", "1", "--seed", "0", "--level", "3"],
        ),
    ];
    for (name, args) in wrong {
        let ran = place.run(args);
        assert_eq!((ran.status, ran.out.as_str()), (2, ""), "{name}");
        if name != "no_command" {
            assert_snapshot!(format!("usage_{name}"), ran.err);
        }
    }
    assert_eq!(place.files(), ["a.png"]);
}

#[test]
fn credits_and_completions_are_results() {
    let place = Place::new();
    let credits = place.run(&["credits"]);
    assert!(credits.ok().contains("Twemoji") && credits.err.is_empty());
    assert!(place.run(&["completions", "bash"]).ok().contains("_flmm()"));
    assert!(place.run(&["--version"]).ok().starts_with("flmm "));
}
