//! COCO run-length masks against recorded ones (`goldens/rle`): exact.

mod common;

use common::TestResult;
use flmm::masks::{Mask, Segmentation};
use serde_json::Value;

fn segmentation(value: &Value) -> TestResult<Segmentation> {
    Ok(serde_json::from_value(value.clone())?)
}

fn list<'a>(file: &'a Value, key: &str) -> TestResult<&'a Vec<Value>> {
    Ok(file[key].as_array().ok_or_else(|| format!("no list `{key}`"))?)
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, got: T, expected: T) -> TestResult {
    if got == expected { Ok(()) } else { Err(format!("{what}: got {got:?}, expected {expected:?}").into()) }
}

fn size(value: &Value) -> TestResult<[usize; 2]> {
    Ok(serde_json::from_value(value["size"].clone())?)
}

fn file() -> TestResult<Option<Value>> {
    common::golden_dir("rle").map(|dir| common::json(&dir.join("rle.json"))).transpose()
}

#[test]
fn goldens_rle_masks() -> TestResult {
    let Some(file) = file()? else { return Ok(()) };
    for case in list(&file, "encode")? {
        let name = case["name"].as_str().unwrap_or("?");
        let coco = Segmentation {
            size: serde_json::from_value(case["size"].clone())?,
            counts: serde_json::from_value(case["counts"].clone())?,
        };
        let mask = Mask::from_coco(&coco)?;
        if let Some(rows) = case["rows"].as_array() {
            let bits: Vec<bool> =
                rows.iter().filter_map(Value::as_str).flat_map(str::bytes).map(|b| b == b'1').collect();
            let [height, width] = size(case)?;
            same(&format!("{name}: pixels"), &mask, &Mask::new(width, height, bits)?)?;
        }
        same(&format!("{name}: counts"), mask.to_coco()?, coco)?;
        same(&format!("{name}: area"), Some(mask.area() as u64), case["area"].as_u64())?;
        let bbox: [f64; 4] = serde_json::from_value(case["bbox"].clone())?;
        same(&format!("{name}: bbox"), mask.bbox().map(|v| v as f64), bbox)?;
    }
    Ok(())
}

#[test]
fn goldens_rle_combinations() -> TestResult {
    let Some(file) = file()? else { return Ok(()) };
    for (i, case) in list(&file, "merge")?.iter().enumerate() {
        let inputs: Vec<Mask> = list(case, "inputs")?
            .iter()
            .map(|m| Ok(Mask::from_coco(&segmentation(m)?)?))
            .collect::<TestResult<_>>()?;
        let Some((first, rest)) = inputs.split_first() else { continue };
        let union = rest.iter().try_fold(first.clone(), |all, mask| all.union(mask))?;
        let shared = rest.iter().try_fold(first.clone(), |all, mask| all.intersection(mask))?;
        same(&format!("merge {i}: union"), union.to_coco()?, segmentation(&case["union"])?)?;
        same(&format!("merge {i}: intersection"), shared.to_coco()?, segmentation(&case["intersection"])?)?;
    }
    for (i, case) in list(&file, "iou")?.iter().enumerate() {
        for (d, dt) in list(case, "dt")?.iter().enumerate() {
            for (g, gt) in list(case, "gt")?.iter().enumerate() {
                let (detection, truth) =
                    (Mask::from_coco(&segmentation(dt)?)?, Mask::from_coco(&segmentation(gt)?)?);
                let crowd = case["iscrowd"][g] == 1;
                let iou = match crowd {
                    false => detection.iou(&truth)?,
                    true => {
                        detection.intersection(&truth)?.area() as f64 / (detection.area() as f64).max(1.0)
                    }
                };
                let expected = case["iou"][d][g].as_f64().ok_or("no iou")?;
                if (iou - expected).abs() > 1e-12 {
                    return Err(format!("iou {i} [{d}][{g}]: got {iou}, expected {expected}").into());
                }
            }
        }
    }
    Ok(())
}

#[test]
fn goldens_rle_polygons() -> TestResult {
    let Some(file) = file()? else { return Ok(()) };
    for case in list(&file, "from_polygon")? {
        let name = case["name"].as_str().unwrap_or("?");
        let [height, width] = size(case)?;
        let mask = Mask::from_polygons(&[serde_json::from_value(case["polygon"].clone())?], width, height)?;
        same(&format!("{name}: mask"), mask.to_coco()?, segmentation(&case["rle"])?)?;
        same(&format!("{name}: area"), Some(mask.area() as u64), case["area"].as_u64())?;
        let bbox: [f64; 4] = serde_json::from_value(case["bbox"].clone())?;
        same(&format!("{name}: bbox"), mask.bbox().map(|v| v as f64), bbox)?;
    }
    for (i, case) in list(&file, "multi_polygon")?.iter().enumerate() {
        let [height, width] = size(case)?;
        let polygons: Vec<Vec<f64>> = serde_json::from_value(case["polygons"].clone())?;
        let mask = Mask::from_polygons(&polygons, width, height)?;
        same(&format!("multi_polygon {i}"), mask.to_coco()?, segmentation(&case["rle"])?)?;
    }
    for (i, case) in list(&file, "from_bbox")?.iter().enumerate() {
        let [height, width] = size(case)?;
        let [x, y, w, h]: [f64; 4] = serde_json::from_value(case["bbox"].clone())?;
        let corners = vec![x, y, x, y + h, x + w, y + h, x + w, y];
        let mask = Mask::from_polygons(&[corners], width, height)?;
        same(&format!("from_bbox {i}"), mask.to_coco()?, segmentation(&case["rle"])?)?;
    }
    Ok(())
}
