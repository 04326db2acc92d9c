//! Mask metrics against the `metrics` goldens: masks and counts exact, values within the tolerances of their README.

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use flmm::masks::Mask;
use flmm::nn::{bilinear, sigmoid};
use flmm_data::coco::RunLengths;
use flmm_data::reasonseg::Reasoning;
use flmm_eval::record::Metrics;
use flmm_eval::runs::{Overlap, Runs};
use flmm_eval::{png, reasonseg, res};
use serde_json::Value;

fn case(name: &str) -> Option<(PathBuf, Value)> {
    let folder = crate::common::golden_dir("metrics")?;
    let text = std::fs::read_to_string(folder.join(name)).unwrap();
    Some((folder, serde_json::from_str(&text).unwrap()))
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is not a number"))
}

fn runs(value: &Value) -> Runs {
    Runs::from_coco(&serde_json::from_value::<RunLengths>(value.clone()).unwrap()).unwrap()
}

#[track_caller]
fn close(name: &str, found: f64, wanted: &Value, tolerance: f64) {
    let wanted = number(wanted);
    assert!((found - wanted).abs() <= tolerance, "{name}: {found}, expected {wanted}");
}

fn get(metrics: &Metrics, name: &str) -> f64 {
    metrics.get(name).unwrap_or_else(|| panic!("no metric {name}"))
}

#[test]
fn goldens_metrics_res() {
    let Some((_, case)) = case("res.json") else { return };
    let mut all: Vec<Overlap> = Vec::new();
    for (image, wanted) in list(&case["images"]).iter().zip(list(&case["expected_per_image"])) {
        let pairs = list(&image["gt"]).iter().zip(list(&image["pred"]));
        let overlaps: Vec<Overlap> = pairs.map(|(gt, pred)| runs(pred).overlap(&runs(gt)).unwrap()).collect();
        let metrics = res::metrics(overlaps.iter().copied()).metrics;
        close("cIoU of an image", get(&metrics, "cIoU"), &wanted["cIoU"], 1e-3);
        close("mIoU of an image", get(&metrics, "mIoU"), &wanted["mIoU"], 1e-3);
        all.extend(overlaps);
    }
    assert!(!all.is_empty());
    let metrics = res::metrics(all.into_iter()).metrics;
    close("cIoU", get(&metrics, "cIoU"), &case["expected"]["cIoU"], 1e-3);
    close("mIoU", get(&metrics, "mIoU"), &case["expected"]["mIoU"], 1e-3);
}

/// Logits become masks as the pipeline makes them: refined logits by sigmoid, resize and threshold, coarse ones by
/// resize and threshold at 0. At the picture's own size both are "above 0".
#[test]
fn goldens_metrics_res_binarisation() {
    let Some((folder, case)) = case("res.json") else { return };
    let tensors =
        candle_core::safetensors::load(folder.join("res_logits.safetensors"), &Device::Cpu).unwrap();
    let masks = |logits: &Tensor| -> Vec<Runs> {
        (0..logits.dim(0).unwrap())
            .map(|at| Runs::from(&Mask::from_logits(&logits.get(at).unwrap()).unwrap()))
            .collect()
    };
    for (index, item) in list(&case["binarisation"]).iter().enumerate() {
        let logits = &tensors[item["logits"].as_str().unwrap()];
        let target: Vec<usize> = list(&item["target"]).iter().map(|v| v.as_u64().unwrap() as usize).collect();
        let resized = |t: &Tensor| {
            bilinear(&t.unsqueeze(0).unwrap(), target[0], target[1]).unwrap().squeeze(0).unwrap()
        };
        let probs = resized(&sigmoid(logits).unwrap()).affine(1.0, -0.5).unwrap();
        let by_probability = masks(&probs);
        let by_logit = masks(&resized(logits));
        for (name, found) in
            [("mask_sigmoid_then_resize", &by_probability), ("mask_resize_then_zero", &by_logit)]
        {
            let wanted: Vec<Runs> = list(&item[name]).iter().map(runs).collect();
            assert_eq!(found, &wanted, "case {index}: {name}");
        }
        let pairs = by_probability.iter().zip(&by_logit);
        let differing: u64 = pairs
            .map(|(a, b)| a.overlap(b).unwrap())
            .map(|overlap| overlap.union - overlap.intersection)
            .sum();
        assert_eq!(Some(differing), item["differing_pixels"].as_u64(), "case {index}");
    }
}

#[test]
fn goldens_metrics_png() {
    let Some((_, case)) = case("png.json") else { return };
    let recall = |ious: &mut dyn Iterator<Item = f64>| {
        let mut recall = png::AverageRecall::default();
        ious.for_each(|iou| recall.add(iou));
        recall.value()
    };
    for (iou, wanted) in case["unit_tests"].as_object().unwrap() {
        close(iou, recall(&mut std::iter::once(iou.parse().unwrap())), wanted, 1e-12);
    }
    let ious = list(&case["iou_list"]).iter().map(number);
    close("list", recall(&mut ious.into_iter()), &case["iou_list_average_recall"], 1e-5);

    let mut scores = Vec::new();
    for image in list(&case["images"]) {
        let pixels = image["height"].as_u64().unwrap() * image["width"].as_u64().unwrap();
        let mut score = png::Score::default();
        for phrase in list(&image["phrases"]) {
            let overlap = runs(&phrase["pred"]).overlap(&runs(&phrase["gt"])).unwrap();
            let flag = |name: &str| phrase[name].as_bool().unwrap();
            score.push(overlap, pixels, flag("isthing"), flag("plural"));
            close("iou", *score.iou.last().unwrap(), &phrase["iou"], 1e-5);
            close("accuracy", *score.accuracy.last().unwrap(), &phrase["pixel_accuracy"], 1e-5);
        }
        scores.push(score);
    }
    let metrics = png::metrics(&scores).metrics;
    for (ours, theirs) in [
        ("AR all", "all"),
        ("AR singular", "singulars"),
        ("AR plural", "plurals"),
        ("AR thing", "things"),
        ("AR stuff", "stuff"),
        ("acc@0.5", "acc_at_05"),
        ("pixel accuracy", "pixel_accuracy"),
    ] {
        close(theirs, get(&metrics, ours) / 100.0, &case["expected"][theirs], 1e-5);
    }
    let closed_form = &case["closed_form_check"]["closed_form_all"];
    close("closed form", get(&metrics, "AR all") / 100.0, closed_form, 1e-9);
}

fn truth(folder: &Path, item: &Value) -> (Reasoning, Runs, Runs) {
    let reasoning = Reasoning::read(&folder.join(item["file"].as_str().unwrap())).unwrap();
    let side = |name: &str| item[name].as_u64().unwrap() as u32;
    let truth = reasoning.ground_truth(side("height"), side("width"));
    let (foreground, ignore) = (Runs::from(&truth.foreground), Runs::from(&truth.ignore));
    assert_eq!(foreground, runs(&item["gt_foreground"]), "{}: foreground", item["file"]);
    assert_eq!(ignore, runs(&item["gt_ignore"]), "{}: ignore", item["file"]);
    (reasoning, foreground, ignore)
}

#[test]
fn goldens_metrics_reasonseg() {
    let Some((folder, case)) = case("reasonseg.json") else { return };
    let mut scores = Vec::new();
    for item in list(&case["samples"]) {
        let (reasoning, foreground, ignore) = truth(&folder, item);
        assert_eq!(item["instruction"], reasoning.instruction());
        assert_eq!(item["is_sentence"], reasoning.is_sentence);
        let score =
            reasonseg::Score::new(&runs(&item["pred"]), &foreground, &ignore, reasoning.is_sentence).unwrap();
        assert_eq!(Some(score.intersection), item["intersection"].as_u64(), "{}", item["file"]);
        assert_eq!(Some(score.union), item["union"].as_u64(), "{}", item["file"]);
        scores.push(score);
    }
    for item in list(&case["equal_area_order"]) {
        truth(&folder, item);
    }
    let metrics = reasonseg::metrics(&scores).metrics;
    for (variant, ours) in [("lisa", ""), ("ref_compat", "ref ")] {
        for (kind, which) in [("overall", ""), ("short", " short"), ("long", " long")] {
            for metric in ["gIoU", "cIoU"] {
                let name = format!("{ours}{metric}{which}");
                close(&name, get(&metrics, &name) / 100.0, &case["expected"][variant][kind][metric], 1e-5);
            }
        }
    }
}
