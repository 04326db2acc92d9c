//! `flmm eval` on question answering and visual chain of thought, with a model of random weights and a small world.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;

use serde_json::Value;

use crate::support::{Place, model};

const TASKS: &str = "mme,mmbench,mmvet,llavabench,pope,gqa,vqav2,ai2d,viscot,viscot_v2,viscot_v3,pope_cot,pope_cot_v2,pope_cot_v3";

/// A place with a world in `w`.
fn place() -> Place {
    let place = Place::new();
    place.run(&["world", "--out", "w", "--split", "val", "--count", "6", "--seed", "3", "--level", "2"]).ok();
    place
}

/// A server that says "score: 0.5", or two numbers or a letter where its prompt asks for those.
fn judge() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut reader = BufReader::new(stream);
            let (mut line, mut length) = (String::new(), 0);
            while reader.read_line(&mut line).unwrap_or(0) > 2 {
                if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap_or(0);
                }
                line.clear();
            }
            let mut body = vec![0; length];
            let _ = reader.read_exact(&mut body);
            let asked = String::from_utf8_lossy(&body).into_owned();
            let said = match () {
                () if asked.contains("two numbers alone") => "8 6",
                () if asked.contains("Write one letter") => "A",
                () if asked.contains("Write the number") => "0.25",
                () => "score: 0.5",
            };
            let text = format!(r#"{{"choices":[{{"message":{{"content":"{said}"}}}}]}}"#);
            let head =
                format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", text.len());
            let _ = reader.into_inner().write_all((head + &text).as_bytes());
        }
    });
    url
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
    assert!(found["tasks"]["viscot"]["metrics"]["box IoU world"].is_number());
    assert!(found["tasks"]["mmvet"]["metrics"].get("score").is_none());
    let table = std::fs::read_to_string(place.path("run/results.md")).unwrap();
    assert!(table.contains("POPE") && table.contains("Visual CoT"), "{table}");

    // The answers are judged without the model.
    let url = judge();
    for (task, metric, score) in
        [("viscot", "world", 50.0), ("mmvet", "score", 25.0), ("llavabench", "score", 75.0)]
    {
        let samples = format!("run/samples_{task}.jsonl");
        let args =
            ["eval", "score", "--task", task, "--predictions", &samples, "--data", "w", "--out", "judged"];
        let more = ["--judge-url", &url, "--judge-model", "wise", "--judge-cache", "cache"];
        place.run(&[&args[..], &more].concat()).ok();
        assert_eq!(results(&place, "judged")["tasks"][task]["metrics"][metric], score, "{task}");
    }
    assert!(place.files().contains(&"cache".to_owned()));
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
