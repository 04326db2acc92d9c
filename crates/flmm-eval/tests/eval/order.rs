//! Numbers depend neither on the order of the samples nor on how they are shared out: bit for bit.

use std::io::Write;

use flmm_eval::results::{Header, Scores, TaskResult, read_samples};
use flmm_eval::{Task, find};
use proptest::prelude::*;
use serde_json::{Value, json};

/// Scores as each task writes them.
fn scores(task: &str, [a, b, c]: [u32; 3]) -> Value {
    let (small, large) = (u64::from(a.min(b)), u64::from(a.max(b)));
    let ratio = f64::from(a) / (f64::from(a) + f64::from(b) + 1.0);
    let flag = |bit: u32| c >> bit & 1 == 1;
    match task {
        "png" => json!({
            "iou": [ratio, ratio * ratio], "accuracy": [ratio, 0.3], "thing": [flag(0), flag(1)],
            "plural": [flag(2), flag(3)],
        }),
        "png_keywords" => json!({
            "positive": [ratio], "negative": [ratio / 3.0, 0.5], "phrases": [1, 2, 3], "iou": [ratio],
            "thing": [flag(0)],
        }),
        "grefcoco_val" => json!({
            "intersection": small, "union": large, "target": flag(0), "abstained": flag(1),
        }),
        "reasonseg_val" => {
            json!({ "intersection": small, "union": large, "pixels": large + u64::from(c), "long": flag(0) })
        }
        _ => json!({ "intersection": [small, 0], "union": [large, c % 2] }),
    }
}

fn result(task: &dyn Task, scores: &Scores, of: usize) -> TaskResult {
    let header =
        Header { task: task.name().into(), model: "m".into(), revision: None, settings: Value::Null, of };
    scores.result(task, &header).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn results_do_not_depend_on_order_or_shards(
        samples in prop::collection::vec(any::<[u32; 3]>(), 1..40),
        keys in prop::collection::vec(any::<u32>(), 40),
        shards in 1usize..5,
    ) {
        for name in ["refcoco_val", "grefcoco_val", "png", "png_keywords", "reasonseg_val"] {
            let task = find(name).unwrap();
            let lines: Vec<Value> = samples
                .iter()
                .enumerate()
                .map(|(id, numbers)| {
                    let other = scores(name, numbers.map(|n| n / 2));
                    json!({ "id": id.to_string(), "scores": scores(name, *numbers),
                            "rows": { "coarse": { "segmentations": [], "scores": other } } })
                })
                .collect();
            let mut plain = Scores::default();
            for line in &lines {
                let id = line["id"].as_str().unwrap();
                plain.add("", id, line["scores"].clone());
                plain.add("coarse", id, line["rows"]["coarse"]["scores"].clone());
            }
            let wanted = result(task.as_ref(), &plain, lines.len());

            let folder = tempfile::tempdir().unwrap();
            let mut order: Vec<usize> = (0..lines.len()).collect();
            order.sort_by_key(|&at| keys[at]);
            let mut shared = Scores::default();
            for shard in 0..shards {
                let path = folder.path().join(format!("{shard}.jsonl"));
                let mut file = std::fs::File::create(&path).unwrap();
                // Neighbouring shards overlap by a sample; the last line is torn.
                for &at in order.iter().filter(|&&at| at % shards == shard || at == shard) {
                    writeln!(file, "{}", lines[at]).unwrap();
                }
                write!(file, r#"{{"id": "torn", "sco"#).unwrap();
                read_samples(&path, "key", &mut shared).unwrap();
            }
            let found = result(task.as_ref(), &shared, lines.len());
            prop_assert_eq!(serde_json::to_string(&found).unwrap(), serde_json::to_string(&wanted).unwrap());
        }
    }
}
