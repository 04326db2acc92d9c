//! Run lengths of the harness against the `rle` goldens: counts and areas exact, IoU to 1e-12.

use flmm_data::coco::RunLengths;
use flmm_eval::runs::Runs;
use serde_json::Value;

fn runs(value: &Value) -> Runs {
    Runs::from_coco(&serde_json::from_value::<RunLengths>(value.clone()).unwrap()).unwrap()
}

fn list(value: &Value) -> Vec<Runs> {
    value.as_array().unwrap().iter().map(runs).collect()
}

#[test]
fn goldens_rle_runs() {
    let Some(folder) = crate::common::golden_dir("rle") else { return };
    let case: Value = serde_json::from_slice(&std::fs::read(folder.join("rle.json")).unwrap()).unwrap();
    for item in case["encode"].as_array().unwrap() {
        let mask = runs(item);
        let plain = serde_json::json!({"size": item["size"], "counts": item["uncompressed_counts"]});
        assert_eq!(runs(&plain), mask, "{}", item["name"]);
        assert_eq!(Some(mask.area()), item["area"].as_u64(), "{}", item["name"]);
        assert_eq!(
            serde_json::to_value(mask.to_coco()).unwrap()["counts"],
            item["counts"],
            "{}",
            item["name"]
        );
    }
    for item in case["merge"].as_array().unwrap() {
        let inputs = list(&item["inputs"]);
        let [height, width] = inputs[0].size();
        let union = Runs::union_of(height, width, &inputs).unwrap();
        assert_eq!(union.overlap(&runs(&item["union"])).unwrap().iou(), 1.0);
        if let [a, b] = &inputs[..] {
            assert_eq!(a.intersection(b).unwrap(), runs(&item["intersection"]).area());
        }
    }
    for item in case["iou"].as_array().unwrap() {
        for (dt, row) in list(&item["dt"]).iter().zip(item["iou"].as_array().unwrap()) {
            for (g, gt) in list(&item["gt"]).iter().enumerate() {
                if item["iscrowd"][g] == 0 {
                    let (found, wanted) = (dt.overlap(gt).unwrap().iou(), row[g].as_f64().unwrap());
                    assert!((found - wanted).abs() <= 1e-12, "{found}, expected {wanted}");
                }
            }
        }
    }
}
