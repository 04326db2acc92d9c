//! `flmm eval` on question answering and visual chain of thought, with a model of random weights and a small world.

use serde_json::Value;

use crate::fake_judge::{Act, FakeJudge};
use crate::support::{Place, model};

const TASKS: &str = "mme,mmbench,mmvet,llavabench,pope,gqa,vqav2,ai2d,viscot,viscot_v2,viscot_v3,pope_cot,pope_cot_v2,pope_cot_v3";

/// A place with a world in `w`.
fn place() -> Place {
    let place = Place::new();
    place.run(&["world", "--out", "w", "--split", "val", "--count", "6", "--seed", "3", "--level", "2"]).ok();
    place
}

/// Says "score: 0.5", or two numbers or a letter where its prompt asks for those.
fn judge() -> FakeJudge {
    FakeJudge::saying([], |asked| {
        let asked = asked.to_string();
        match () {
            () if asked.contains("two numbers alone") => "8 6",
            () if asked.contains("Write one letter") => "A",
            () if asked.contains("Write the number") => "0.25",
            () => "score: 0.5",
        }
    })
}

fn results(place: &Place, out: &str) -> Value {
    serde_json::from_slice(&std::fs::read(place.path(out).join("results.json")).unwrap()).unwrap()
}

#[test]
fn every_benchmark_runs_on_a_world() {
    let place = place();
    let args = ["eval", "--task", TASKS, "--data", "w", "--out", "run", "--limit", "3"];
    place.run_with_model(&args).ok();
    let found = results(&place, "run");
    for task in TASKS.split(',') {
        assert_eq!(found["tasks"][task]["samples"], 3, "{task}");
    }
    // Without a judge there are labelled numbers only.
    let viscot = found["tasks"]["viscot"]["metrics"].as_object().unwrap();
    assert!(viscot.contains_key("offline ANLS world") && !viscot.contains_key("world"), "{viscot:?}");
    for (task, has_box) in [("viscot", true), ("viscot_v2", true), ("viscot_v3", false)] {
        assert_eq!(found["tasks"][task]["metrics"]["box IoU world"].is_number(), has_box, "{task}");
    }
    assert!(found["tasks"]["mmvet"]["metrics"].get("score").is_none());
    let table = std::fs::read_to_string(place.path("run/results.md")).unwrap();
    assert!(table.contains("POPE") && table.contains("Visual CoT"), "{table}");

    // The answers are judged without the model.
    let server = judge();
    let score = |task: &str, out: &str, cache: &str, url: &str| {
        let samples = format!("run/samples_{task}.jsonl");
        let args = ["eval", "score", "--task", task, "--predictions", &samples, "--data", "w", "--out", out];
        let more = ["--judge-url", url, "--judge-model", "wise", "--judge-cache", cache];
        place.run(&[&args[..], &more].concat())
    };
    let graded = [("viscot", "world", 50.0), ("mmvet", "score", 25.0), ("llavabench", "score", 75.0)];
    for (task, metric, points) in graded {
        score(task, "judged", "cache", &server.url).ok();
        assert_eq!(results(&place, "judged")["tasks"][task]["metrics"][metric], points, "{task}");
    }
    // What was judged before is judged again without asking anybody.
    assert!(!server.requests().is_empty());
    let before = std::fs::read(place.path("judged/samples_viscot.jsonl")).unwrap();
    for (task, metric, points) in graded {
        score(task, "again", "cache", &server.url).ok();
        assert_eq!(results(&place, "again")["tasks"][task]["metrics"][metric], points, "{task}");
    }
    assert!(server.requests().is_empty());
    // A judge that refuses: nothing is written over what is there.
    (0..9).for_each(|_| server.then(Act::Status(401, "", "")));
    let refused = score("viscot", "judged", "empty", &server.url);
    assert_eq!(refused.status, 1, "{}", refused.all());
    assert!(refused.err.contains("is not asked any more after 3 questions"), "{}", refused.err);
    assert_eq!(std::fs::read(place.path("judged/samples_viscot.jsonl")).unwrap(), before);
}

/// A wrong key is known before anything is computed; one that is refused on the way leaves the answers.
#[test]
fn a_judge_that_refuses_costs_no_answer() {
    let place = place();
    let server = judge();
    let run = |out: &str| {
        let args = ["eval", "--task", "mmvet", "--data", "w", "--out", out, "--limit", "5"];
        let more = ["--judge-url", &server.url, "--judge-model", "wise", "--judge-cache", "cache"];
        place.run_with_model(&[&args[..], &more].concat())
    };
    server.then(Act::Status(401, "", ""));
    let refused = run("o");
    assert!(refused.status == 1 && refused.err.contains("OPENAI_API_KEY"), "{}", refused.all());
    assert!(!place.path("o").exists() && server.requests().len() == 1);

    // Ready, one good reply, then refusals.
    server.then(Act::Say("ready"));
    server.then(Act::Say("0.25"));
    (0..3).for_each(|_| server.then(Act::Status(403, "", "")));
    let halted = run("o");
    assert!(halted.status == 1 && halted.err.contains("flmm eval score"), "{}", halted.all());
    let samples = std::fs::read_to_string(place.path("o/samples_mmvet.jsonl")).unwrap();
    let lines: Vec<Value> = samples.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 4);
    assert_eq!((lines[0]["scores"]["judge"].as_f64(), lines[0]["scores"].get("failed")), (Some(0.25), None));
    for line in &lines[1..] {
        assert!(line["scores"]["failed"].as_str().unwrap().contains("status 403"), "{line}");
    }
}

#[test]
fn answers_are_identical_with_and_without_grounding() {
    let place = place();
    let args = ["eval", "identity", "--task", "pope,gqa", "--data", "w", "--limit", "2", "--seed", "5"];
    let ran = place.run_with_model(&args);
    let lines: Vec<&str> = ran.ok().lines().collect();
    assert!(lines[0].starts_with("pope: 4 answers to 2 questions are identical"), "{lines:?}");
    assert!(lines[1].starts_with("gqa: 4 answers to 2 questions are identical"), "{lines:?}");
}

#[test]
fn mistakes_are_known_before_anything_is_computed() {
    let place = place();
    let run = |args: &[&str]| {
        let ran = place.ran(place.command(args).args(model()).output().unwrap());
        assert!(ran.status != 0 && ran.out.is_empty(), "{}", ran.all());
        (ran.status, ran.err)
    };
    let (status, text) = run(&["eval", "identity", "--task", "viscot", "--data", "w"]);
    assert!(status == 2 && text.contains("mme, mmbench"), "{text}");
    let base = ["eval", "--task", "viscot", "--data", "w", "--out", "o", "--judge-cache", "c"];
    let (status, text) = run(&base);
    assert!(status == 2 && text.contains("--judge-url"), "{text}");
    let (status, text) = run(&[&base[..], &["--judge-url", "localhost"]].concat());
    assert!(status == 1 && text.contains("https://"), "{text}");
    std::fs::remove_dir_all(place.path("w/qa/gqa")).unwrap();
    let (status, text) = run(&["eval", "--task", "gqa", "--data", "w", "--out", "o"]);
    assert!(status == 2 && text.contains("qa/gqa") && text.contains("lmms-lab/GQA"), "{text}");
    assert!(!place.path("o").exists());
}
