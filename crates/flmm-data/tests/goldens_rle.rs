//! COCO run-length masks against the `rle` goldens: strings, counts, areas, boxes exact; IoU to 1e-12.

mod common;

use flmm_data::Mask;
use flmm_data::coco::{Counts, RunLengths, Segmentation};
use serde_json::Value;

fn case() -> Option<Value> {
    let folder = common::golden_dir("rle")?;
    let text = std::fs::read_to_string(folder.join("rle.json")).unwrap();
    Some(serde_json::from_str(&text).unwrap())
}

fn numbers<T: TryFrom<u64>>(value: &Value) -> Vec<T>
where
    T::Error: std::fmt::Debug,
{
    value.as_array().unwrap().iter().map(|v| T::try_from(v.as_u64().unwrap()).unwrap()).collect()
}

fn decode(rle: &Value) -> Mask {
    let size: Vec<u32> = numbers(&rle["size"]);
    let segmentation: Segmentation = serde_json::from_value(rle.clone()).unwrap();
    segmentation.to_mask(size[0], size[1]).unwrap()
}

fn encode(mask: &Mask) -> String {
    let Segmentation::Runs(RunLengths { counts: Counts::Compressed(text), .. }) =
        Segmentation::compress(mask)
    else {
        panic!("expected compressed run lengths")
    };
    text
}

fn bbox(mask: &Mask) -> Vec<f64> {
    mask.bbox().map(f64::from).to_vec()
}

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

#[test]
fn goldens_rle_encode_and_decode() {
    let Some(case) = case() else { return };
    for item in case["encode"].as_array().unwrap() {
        let name = &item["name"];
        let mask = decode(item);
        assert_eq!(encode(&mask), item["counts"].as_str().unwrap(), "{name}: counts");
        let plain = serde_json::json!({"size": item["size"], "counts": item["uncompressed_counts"]});
        assert_eq!(decode(&plain), mask, "{name}: uncompressed counts");
        assert_eq!(u64::from(mask.area()), item["area"].as_u64().unwrap(), "{name}: area");
        assert_eq!(bbox(&mask), floats(&item["bbox"]), "{name}: bbox");
        if let Some(rows) = item["rows"].as_array() {
            let rows: Vec<&[u8]> = rows.iter().map(|row| row.as_str().unwrap().as_bytes()).collect();
            let expected =
                Mask::from_fn(mask.width, mask.height, |x, y| rows[y as usize][x as usize] == b'1');
            assert_eq!(mask, expected, "{name}: rows");
        }
    }
}

#[test]
fn goldens_rle_merge_and_iou() {
    let Some(case) = case() else { return };
    for (index, item) in case["merge"].as_array().unwrap().iter().enumerate() {
        let inputs: Vec<Mask> = item["inputs"].as_array().unwrap().iter().map(decode).collect();
        let (w, h) = (inputs[0].width, inputs[0].height);
        let union = Mask::from_fn(w, h, |x, y| inputs.iter().any(|mask| mask.get(x, y)));
        let both = Mask::from_fn(w, h, |x, y| inputs.iter().all(|mask| mask.get(x, y)));
        assert_eq!(encode(&union), item["union"]["counts"].as_str().unwrap(), "merge {index}: union");
        assert_eq!(
            encode(&both),
            item["intersection"]["counts"].as_str().unwrap(),
            "merge {index}: intersection"
        );
    }
    for (index, item) in case["iou"].as_array().unwrap().iter().enumerate() {
        let masks = |key: &str| -> Vec<Mask> { item[key].as_array().unwrap().iter().map(decode).collect() };
        let crowd: Vec<u8> = numbers(&item["iscrowd"]);
        for (d, dt) in masks("dt").iter().enumerate() {
            for (g, gt) in masks("gt").iter().enumerate() {
                let both = dt.data.iter().zip(&gt.data).filter(|(a, b)| **a && **b).count() as f64;
                let (a, b) = (f64::from(dt.area()), f64::from(gt.area()));
                let denominator = if crowd[g] != 0 { a } else { a + b - both };
                let iou = if both == 0.0 { 0.0 } else { both / denominator };
                let expected = item["iou"][d][g].as_f64().unwrap();
                assert!((iou - expected).abs() <= 1e-12, "iou {index}[{d}][{g}]: {iou}, expected {expected}");
            }
        }
    }
}

#[test]
fn goldens_rle_polygons() {
    let Some(case) = case() else { return };
    let fill = |size: &Value, parts: &Value| {
        let size: Vec<u32> = numbers(size);
        let parts = parts.as_array().unwrap().iter().map(floats).collect();
        Segmentation::Polygons(parts).to_mask(size[0], size[1]).unwrap()
    };
    for item in case["from_polygon"].as_array().unwrap() {
        let name = &item["name"];
        let parts = serde_json::json!([item["polygon"]]);
        // A single polygon of the goldens is rasterised whatever its length.
        let size: Vec<u32> = numbers(&item["size"]);
        let runs = hotcoco::mask::fr_poly(&floats(&item["polygon"]), size[0], size[1]).unwrap();
        assert_eq!(
            hotcoco::mask::rle_to_string(&runs),
            item["rle"]["counts"].as_str().unwrap(),
            "{name}: counts"
        );
        if floats(&item["polygon"]).len() >= 6 {
            let mask = fill(&item["size"], &parts);
            assert_eq!(encode(&mask), item["rle"]["counts"].as_str().unwrap(), "{name}: mask");
            assert_eq!(u64::from(mask.area()), item["area"].as_u64().unwrap(), "{name}: area");
            if mask.area() > 0 {
                assert_eq!(bbox(&mask), floats(&item["bbox"]), "{name}: bbox");
            }
        }
    }
    for (index, item) in case["multi_polygon"].as_array().unwrap().iter().enumerate() {
        let mask = fill(&item["size"], &item["polygons"]);
        assert_eq!(encode(&mask), item["rle"]["counts"].as_str().unwrap(), "multi_polygon {index}");
    }
    for (index, item) in case["from_bbox"].as_array().unwrap().iter().enumerate() {
        let size: Vec<u32> = numbers(&item["size"]);
        let bbox: [f64; 4] = floats(&item["bbox"]).try_into().unwrap();
        let runs = hotcoco::mask::fr_bbox(&bbox, size[0], size[1]).unwrap();
        assert_eq!(
            hotcoco::mask::rle_to_string(&runs),
            item["rle"]["counts"].as_str().unwrap(),
            "from_bbox {index}"
        );
    }
}
