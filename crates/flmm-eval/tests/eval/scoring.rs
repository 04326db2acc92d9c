//! Predictions of other systems: right ones, and every kind of fault.

use std::path::Path;

use flmm_data::coco::RunLengths;
use flmm_data::grefcoco::GrefCoco;
use flmm_data::narratives::Narratives;
use flmm_data::refcoco::{RefCoco, TextMode};
use flmm_eval::runs::Runs;
use flmm_eval::score::{Scored, score};
use flmm_eval::{Settings, find, res};
use serde_json::{Value, json};

use crate::support::world;

fn scored(task: &str, settings: &Settings, lines: &str, out: Option<&Path>) -> flmm::Result<Scored> {
    let task = find(task).unwrap();
    let samples = task.open(settings)?;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), lines).unwrap();
    score(task.as_ref(), samples.as_ref(), ("theirs", file.path()), out, &mut |_, _| {})
}

fn coco(runs: impl Into<Runs>) -> RunLengths {
    runs.into().to_coco()
}

/// The truth of RefCOCO val as predictions.
fn truth(settings: &Settings) -> Vec<Value> {
    let data = RefCoco::open_split(&settings.data, "refcoco", "val").unwrap();
    let line = |image: &flmm_data::refcoco::RefImage| {
        let phrases: Vec<Value> = image
            .expressions(TextMode::SelectFirst)
            .into_iter()
            .map(|(text, at)| json!({"text": text, "segmentation": coco(data.rle(image, at).unwrap())}))
            .collect();
        json!({"id": image.image_id, "phrases": phrases})
    };
    data.images.iter().map(line).collect()
}

fn lines(values: &[Value]) -> String {
    values.iter().map(|value| format!("{value}\n")).collect()
}

#[test]
fn the_truth_scores_full_marks() {
    let (_folder, settings) = world(6);
    let result = scored("refcoco_val", &settings, &lines(&truth(&settings)), None).unwrap().result;
    let get = |name: &str| result.metrics.get(name).unwrap();
    assert!(result.complete && get("cIoU") == 100.0 && get("mIoU") == 100.0 && get("Pr@0.9") == 100.0);

    let narratives = Narratives::open_split(&settings.data, "val2017").unwrap();
    let told: Vec<Value> = (0..narratives.len())
        .filter(|&index| narratives.is_grounded(index))
        .map(|index| {
            let sample = narratives.sample_rle(index).unwrap();
            let phrases: Vec<Value> =
                sample.phrases.into_iter().map(|p| json!({"segmentation": coco(p.mask)})).collect();
            json!({"id": index.to_string(), "image_id": sample.image_id, "phrases": phrases})
        })
        .collect();
    let result = scored("png", &settings, &lines(&told), None).unwrap().result;
    let recall = result.metrics.get("AR all").unwrap();
    assert!(result.complete && (recall - 99.999).abs() < 1e-9, "{recall}");

    let groups = GrefCoco::open_split(&settings.data, "val").unwrap();
    let said: Vec<Value> = groups
        .samples
        .iter()
        .map(|sample| {
            let masks = groups.masks(sample).unwrap();
            let phrases: Vec<Value> = masks.into_iter().map(|m| json!({"segmentation": coco(m)})).collect();
            json!({"id": sample.sent_id, "phrases": phrases})
        })
        .collect();
    let result = scored("grefcoco_val", &settings, &lines(&said), None).unwrap().result;
    for name in ["gIoU", "cIoU", "N-acc", "T-acc"] {
        assert_eq!(result.metrics.get(name), Some(100.0), "{name}");
    }
}

#[test]
fn protocols_count_what_they_say() {
    let (_folder, settings) = world(4);
    let data = RefCoco::open_split(&settings.data, "refcoco", "val").unwrap();
    let objects: usize = data.images.iter().map(|image| image.objects.len()).sum();
    let sentences: usize = data.images.iter().flat_map(|i| &i.objects).map(|o| o.sentences.len()).sum();
    for (split, all_sentences, count) in
        [(false, false, data.images.len()), (true, false, objects), (true, true, sentences)]
    {
        let settings = Settings { res: res::Protocol { split, all_sentences }, ..settings.clone() };
        let samples = find("refcoco_val").unwrap().open(&settings).unwrap();
        let mut ids = samples.ids().to_vec();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!((samples.ids().len(), ids.len()), (count, count));
    }
    // A narrative without a grounded phrase is left out, or replaced where the reference is followed.
    let narratives = settings.data.join("coco/annotations/png_coco_val2017.json");
    let mut list: Value = serde_json::from_slice(&std::fs::read(&narratives).unwrap()).unwrap();
    let all = list.as_array().unwrap().len();
    list[1]["segments"] = json!([{"utterance": "Nothing.", "segment_ids": [], "plural": false}]);
    std::fs::write(&narratives, list.to_string()).unwrap();
    for (seed, count) in [(None, all - 1), (Some(3), all)] {
        let mut settings = settings.clone();
        settings.png.replace_empty = seed;
        let samples = find("png").unwrap().open(&settings).unwrap();
        assert_eq!(samples.ids().len(), count);
        assert_eq!(samples.ids().contains(&"1".to_owned()), seed.is_some());
        assert!(!samples.template(1).unwrap()["phrases"].as_array().unwrap().is_empty());
    }
}

/// Two files of one dataset would give two questions of one id.
#[test]
fn a_dataset_of_the_visual_chain_of_thought_has_one_file() {
    let (_folder, settings) = world(2);
    let viscot = settings.data.join("viscot");
    let open = || find("viscot").unwrap().open(&settings).map(|samples| samples.ids().len());
    assert!(open().unwrap() > 0);
    std::fs::create_dir(viscot.join("benchmark")).unwrap();
    std::fs::rename(viscot.join("world.json"), viscot.join("benchmark/world.json")).unwrap();
    assert!(open().unwrap() > 0);
    std::fs::copy(viscot.join("benchmark/world.json"), viscot.join("world.json")).unwrap();
    let error = open().unwrap_err().to_string();
    assert!(error.contains("world.json") && error.contains("is a file of the same dataset"), "{error}");
}

#[test]
fn faults_are_named_and_the_rest_counts() {
    let (_folder, settings) = world(14);
    let right = truth(&settings);
    let good: Vec<String> = right.iter().map(Value::to_string).collect();
    let with = |at: usize, change: &dyn Fn(&mut Value)| {
        let mut line = right[at].clone();
        change(&mut line);
        line.to_string()
    };
    let first_mask =
        |line: &mut Value, key: &str, value: Value| line["phrases"][0]["segmentation"][key] = value;
    let bad = [
        (with(0, &|line| line["id"] = json!("no such")), "sample no such: the data has no sample"),
        (with(1, &|line| line["image_id"] = json!(99)), "picture 99 is given"),
        (with(2, &|line| first_mask(line, "counts", json!("zz"))), "phrase 1"),
        (with(3, &|line| first_mask(line, "counts", json!([1, 2]))), "they cover 3 of"),
        (with(4, &|line| first_mask(line, "size", json!([2, 3]))), "the mask is 2 x 3, the picture"),
        (with(5, &|line| line["phrases"] = json!([])), "0 masks for"),
        (with(6, &|line| line["phrases"][0]["segmentation"] = Value::Null), "no mask"),
        (with(7, &|line| line["phrases"][0]["score"] = json!("NaN")), "not a prediction"),
        (with(8, &|_| {}).replacen(r#""text""#, r#""score": NaN, "text""#, 1), "not JSON"),
        (with(9, &|_| {}).replacen(r#""text""#, r#""score": 1e999, "text""#, 1), "number out of range"),
        (with(10, &|line| line["id"] = json!([])), "is not an id"),
        (good[11].clone(), "already on line 2"),
        (good[12][..good[12].len() / 2].to_owned(), "torn off"),
    ];
    // Two good lines, a blank one, then one fault per line; the last one is torn.
    let mut text = format!("{}\n{}\n \n", good[13], good[11]);
    text += &bad.iter().map(|(line, _)| line.as_str()).collect::<Vec<_>>().join("\n");
    let out = tempfile::tempdir().unwrap();
    let Scored { result, faults } = scored("refcoco_val", &settings, &text, Some(out.path())).unwrap();
    assert_eq!((result.samples, result.complete, result.metrics.get("cIoU")), (2, false, Some(100.0)));
    assert_eq!(faults.len(), bad.len());
    for (number, (fault, (_, wanted))) in faults.iter().zip(&bad).enumerate() {
        let text = format!("{fault} {}", fault.hint);
        assert!(text.contains(wanted), "{wanted}: {text}");
        assert_eq!(fault.line, number + 4, "{text}");
        assert!(!fault.hint.is_empty() && (fault.id.is_some() || number == 10), "{text}");
    }
    assert!(faults[8].hint.contains("NaN"));
    // The folder has what counts, and the faults.
    let results = flmm_eval::results::build(out.path()).unwrap();
    assert_eq!(results.tasks["refcoco_val"].metrics, result.metrics);
    let listed = std::fs::read_to_string(out.path().join("failed_refcoco_val.jsonl")).unwrap();
    assert_eq!(listed.lines().count(), bad.len());
}

#[test]
fn samples_that_are_there_stay_until_better_ones_are_complete() {
    let (_folder, settings) = world(3);
    let right = truth(&settings);
    let mut wrong = right[0].clone();
    wrong["phrases"] = json!([]);
    let out = tempfile::tempdir().unwrap();
    let out = out.path();
    let files = || {
        let mut files: Vec<(String, String)> = std::fs::read_dir(out)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .map(|path| (path.display().to_string(), std::fs::read_to_string(&path).unwrap()))
            .collect();
        files.sort();
        files
    };
    // Nothing that counts at all: an error that names the first fault, and no file.
    let error = scored("refcoco_val", &settings, &lines(&[wrong.clone()]), Some(out)).unwrap_err();
    assert!(error.to_string().contains("line 1, sample"), "{error}");
    assert!(files().is_empty());
    scored("refcoco_val", &settings, &lines(&right), Some(out)).unwrap();
    let good = files();
    assert_eq!(good.len(), 2, "{good:?}");
    for (bad, wanted) in [(lines(&[wrong]), "0 masks for"), (String::new(), "no predictions")] {
        let error = scored("refcoco_val", &settings, &bad, Some(out)).unwrap_err();
        assert!(error.to_string().contains(wanted), "{error}");
        assert_eq!(files(), good);
    }
    // Other predictions under another protocol do not get into the folder either.
    let split = Settings { res: res::Protocol { split: true, all_sentences: false }, ..settings.clone() };
    let error = scored("refcoco_val", &split, &lines(&right), Some(out)).unwrap_err();
    assert!(error.to_string().contains("holds other samples of refcoco_val"), "{error}");
    assert_eq!(files(), good);
}
