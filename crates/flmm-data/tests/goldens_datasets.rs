//! The readers against the `datasets` goldens: everything that needs no tokenizer, exact.

mod common;

use flmm_data::coco::Segmentation;
use flmm_data::gcg::Gcg;
use flmm_data::narratives::Narratives;
use flmm_data::reasonseg::{self, Reasoning};
use flmm_data::refcoco::{RefCoco, TextMode, read_references};
use flmm_data::{Mask, viscot};
use serde_json::{Value, json};
use std::path::PathBuf;

fn case() -> Option<(PathBuf, Value)> {
    let folder = common::golden_dir("datasets")?;
    let text = std::fs::read_to_string(folder.join("expected.json")).unwrap();
    Some((folder, serde_json::from_str(&text).unwrap()))
}

fn rle(mask: &Mask) -> Value {
    serde_json::to_value(Segmentation::compress(mask)).unwrap()
}

#[test]
fn goldens_datasets_narratives() {
    let Some((folder, expected)) = case() else { return };
    let mut masks_compared = 0;
    for (setup, splits) in expected["png"].as_object().unwrap() {
        for (split, samples) in splits.as_object().unwrap() {
            let narratives = Narratives::open_split(&folder.join("tree"), split).unwrap();
            let samples = samples.as_array().unwrap();
            assert_eq!(narratives.len(), samples.len());
            for (index, wanted) in samples.iter().enumerate() {
                let at = format!("{setup} {split} {index}");
                let sample = narratives.sample(index).unwrap();
                assert_eq!(sample.phrases.is_empty(), wanted.is_null(), "{at}");
                if wanted.is_null() {
                    continue;
                }
                assert_eq!(json!(sample.size), wanted["image_sizes"], "{at}");
                let areas: Vec<u32> = sample.phrases.iter().map(|phrase| phrase.mask.area()).collect();
                assert_eq!(json!(areas), wanted["gt_areas"], "{at}");
                let infos: Vec<Value> = sample
                    .phrases
                    .iter()
                    .map(|phrase| json!({"plural": phrase.plural, "isthing": phrase.is_thing}))
                    .collect();
                if !wanted["mask_infos"].is_null() {
                    assert_eq!(json!(infos), wanted["mask_infos"], "{at}");
                }
                if let Some(masks) = wanted["gt_masks"].as_array() {
                    let found: Vec<Value> = sample.phrases.iter().map(|phrase| rle(&phrase.mask)).collect();
                    assert_eq!(json!(found), json!(masks), "{at}");
                    masks_compared += masks.len();
                }
                let linked: Vec<usize> = sample.utterances.iter().filter_map(|(_, phrase)| *phrase).collect();
                assert_eq!(linked, (0..sample.phrases.len()).collect::<Vec<_>>(), "{at}");
            }
        }
    }
    assert!(masks_compared > 0);
}

#[test]
fn goldens_datasets_refcoco() {
    let Some((folder, expected)) = case() else { return };
    let mut masks_compared = 0;
    for (setup, entries) in expected["refcoco"].as_object().unwrap() {
        for (key, images) in entries.as_object().unwrap() {
            let [dataset, split, mode, kind] = key.split('/').collect::<Vec<_>>()[..] else {
                panic!("{key}")
            };
            let mode = match mode {
                "select_first" => TextMode::SelectFirst,
                "original" => TextMode::Original,
                "concat" => TextMode::Concat,
                other => panic!("unknown text mode {other}"),
            };
            let data = RefCoco::open_split(&folder.join("tree"), dataset, split).unwrap();
            let images = images.as_object().unwrap();
            assert_eq!(data.images.len(), images.len(), "{key}");
            for image in &data.images {
                let at = format!("{setup} {key} {}", image.image_id);
                let wanted = &images[&image.image_id.to_string()];
                let expressions = image.expressions(mode);
                let texts: Vec<&str> = expressions.iter().map(|(text, _)| text.as_str()).collect();
                assert_eq!(json!(texts), wanted["texts"], "{at}");
                let masks: Vec<Mask> =
                    expressions.iter().map(|&(_, object)| data.mask(image, object).unwrap()).collect();
                let samples = wanted["samples"].as_array().unwrap();
                let groups: Vec<&[Mask]> =
                    if kind == "concat" { vec![&masks[..]] } else { masks.chunks(1).collect() };
                assert_eq!(groups.len(), samples.len(), "{at}");
                for (group, sample) in groups.iter().zip(samples) {
                    assert_eq!(json!(image.size), sample["image_sizes"], "{at}");
                    let areas: Vec<u32> = group.iter().map(Mask::area).collect();
                    assert_eq!(json!(areas), sample["gt_areas"], "{at}");
                    if let Some(wanted) = sample["gt_masks"].as_array() {
                        assert_eq!(json!(group.iter().map(rle).collect::<Vec<_>>()), json!(wanted), "{at}");
                        masks_compared += wanted.len();
                    }
                }
            }
        }
    }
    assert!(masks_compared > 0);
}

#[test]
fn goldens_datasets_pickles() {
    let Some((folder, _)) = case() else { return };
    let folder = folder.join("pickle_variants");
    let expected: Value = serde_json::from_slice(&std::fs::read(folder.join("refs.json")).unwrap()).unwrap();
    let mut read = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "p") {
            let found = serde_json::to_value(read_references(&path).unwrap()).unwrap();
            assert_eq!(found, expected, "{}", path.display());
            read += 1;
        }
    }
    assert!(read > 0);
}

#[test]
fn goldens_datasets_reasonseg() {
    let Some((folder, expected)) = case() else { return };
    for (name, wanted) in expected["reasonseg"].as_object().unwrap() {
        let reasoning = Reasoning::read(&folder.join(format!("tree/ReasonSeg/{name}.json"))).unwrap();
        assert_eq!(json!(reasoning.instruction()), wanted["instruction"], "{name}");
        assert_eq!(json!(reasoning.is_sentence), wanted["is_sentence"], "{name}");
        let (height, width) = image_size(&folder.join(format!("tree/ReasonSeg/{name}.jpg")));
        assert_eq!(
            (json!(height), json!(width)),
            (wanted["height"].clone(), wanted["width"].clone()),
            "{name}"
        );
        let truth = reasoning.ground_truth(height, width);
        assert_eq!(json!(truth.foreground.area()), wanted["foreground_area"], "{name}");
        assert_eq!(json!(truth.ignore.area()), wanted["ignore_area"], "{name}");
        assert_eq!(rle(&truth.foreground), wanted["foreground"], "{name}");
        assert_eq!(rle(&truth.ignore), wanted["ignore"], "{name}");
    }
    for split in ["val", "test"] {
        let listed = reasonseg::list(&folder.join("tree/ReasonSeg").join(split)).unwrap();
        let known = expected["reasonseg"].as_object().unwrap().keys().filter(|name| name.starts_with(split));
        assert_eq!(listed.len(), known.count());
    }
}

fn image_size(path: &std::path::Path) -> (u32, u32) {
    let (width, height) = image::image_dimensions(path).unwrap();
    (height, width)
}

#[test]
fn goldens_datasets_gcg_and_viscot() {
    let Some((folder, expected)) = case() else { return };
    let tree = folder.join("tree");
    for split in ["val", "test"] {
        let gcg = Gcg::open_split(&tree, split).unwrap();
        assert_eq!(gcg.samples.len(), expected["gcg"].as_object().unwrap().len());
        for sample in &gcg.samples {
            let wanted = &expected["gcg"][&sample.image_id.to_string()];
            assert_eq!(json!(sample.caption), wanted["caption"]);
            assert_eq!(json!(sample.phrases), wanted["phrases"]);
            let areas: Vec<u32> = gcg.masks(sample).unwrap().iter().map(Mask::area).collect();
            assert_eq!(json!(areas), wanted["mask_areas"], "{}", sample.image_id);
        }
    }
    let questions: Vec<_> = std::fs::read_dir(tree.join("viscot"))
        .unwrap()
        .flat_map(|entry| viscot::read(&entry.unwrap().path()).unwrap())
        .collect();
    let wanted = expected["viscot"].as_array().unwrap();
    assert_eq!(questions.len(), wanted.len());
    for (question, wanted) in questions.iter().zip(wanted) {
        assert_eq!(json!(question.question), wanted["question"]);
        assert_eq!(json!(question.image), wanted["image"]);
        assert_eq!(json!(question.answer), wanted["answer"]);
        let corners: Vec<f64> =
            wanted["gt_box"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
        assert_eq!(question.box_in_image.to_vec(), corners);
    }
}
