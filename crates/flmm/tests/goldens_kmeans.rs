//! K-means of attention against recorded partitions (`goldens/kmeans`): partition and mask exact, inertia 1e-3
//! relative, soft IoU 1e-4.

mod common;

use candle_core::{DType, Device, Tensor};
use common::TestResult;
use flmm::clusters::{attention_partition, better_side, sides};
use flmm::masks::Mask;

fn bits(tensor: &Tensor) -> TestResult<Vec<bool>> {
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?.into_iter().map(|v| v > 0.5).collect())
}

#[test]
fn goldens_kmeans_partitions() -> TestResult {
    let Some(dir) = common::golden_dir("kmeans") else { return Ok(()) };
    let tensors = candle_core::safetensors::load(dir.join("kmeans.safetensors"), &Device::Cpu)?;
    let index = common::json(&dir.join("index.json"))?;
    let mut checked = 0;
    for case in index.as_array().ok_or("index.json is no list")? {
        let name = case["name"].as_str().ok_or("no name")?;
        // The fixture carries a part of the cases; the full folder carries all.
        let Some(stack) = tensors.get(&format!("{name}.stack")) else { continue };
        let get =
            |what: &str| tensors.get(&format!("{name}.{what}")).ok_or_else(|| format!("no {name}.{what}"));
        let near = |what: &str, got: f64, key: &str, tolerance: f64| -> TestResult {
            let expected = case[key].as_f64().ok_or_else(|| format!("no {key}"))?;
            match (got - expected).abs() <= tolerance {
                true => Ok(()),
                false => Err(format!("{name}: {what} is {got}, expected {expected}").into()),
            }
        };
        let (_, h, w) = stack.dims3()?;
        let (partition, inertia) = attention_partition(stack, 0)?;
        assert_eq!(partition, bits(get("partition")?)?, "{name}.partition");
        near("inertia", inertia, "inertia", 1e-3 * case["inertia"].as_f64().unwrap_or(0.0))?;

        let truth = get("ground_truth")?;
        let (height, width) = truth.dims2()?;
        let [first, other] = sides(&partition, (h, w), &Mask::new(width, height, bits(truth)?)?)?;
        near("soft IoU of the first side", first.soft_iou, "soft_iou_of_side_with_first_pixel", 1e-4)?;
        near("soft IoU of the other side", other.soft_iou, "soft_iou_of_other_side", 1e-4)?;
        let better = better_side(stack, &Mask::new(width, height, bits(truth)?)?, 0)?;
        assert_eq!(better.mask.bits(), bits(get("final_mask")?)?, "{name}.final_mask");
        near("area", better.mask.area() as f64, "final_mask_area", 0.0)?;
        checked += 1;
    }
    assert!(checked > 0, "no case checked");
    Ok(())
}
