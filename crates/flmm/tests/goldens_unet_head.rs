//! The mask head against recorded logits and stage outputs (`unet_head`).

mod common;

use std::collections::HashMap;
use std::path::Path;

use candle_core::Tensor;
use common::{Golden, TestResult, formula_weights, golden_dir, json, tensors};
use flmm::mask_head::{UNet, UNetConfig};
use flmm::weights::Params;
use serde_json::Value;

const LOGITS: f64 = 2e-4;

fn unet(variant: &Value, weights: HashMap<String, Tensor>) -> TestResult<UNet> {
    let size = |key: &str| variant[key].as_u64().map(|n| n as usize).ok_or(format!("index without `{key}`"));
    let config =
        UNetConfig { in_channels: size("C")?, base_channels: size("base_channels")?, input_size: 64 };
    assert_eq!(config.parameter_count(), size("parameter_count")?);
    let params = Params::new("unet_head", weights);
    let unet = UNet::load(&config, &params)?;
    params.finish("the golden must hold every tensor")?;
    assert_eq!(params.unused(), Vec::<String>::new());
    Ok(unet)
}

/// Every `<name>.input` of a file of cases.
fn check_cases(unet: &UNet, file: &Path) -> TestResult {
    let mut golden = Golden::open(file)?;
    let inputs: Vec<String> = golden.tensors.keys().filter(|key| key.ends_with(".input")).cloned().collect();
    for input in inputs {
        let logits = unet.forward(golden.get(&input)?)?;
        golden.check(&input.replace(".input", ".logits"), &logits, LOGITS)?;
    }
    golden.finish()?;
    Ok(())
}

fn file<'a>(variant: &'a Value, key: &str) -> TestResult<&'a str> {
    variant[key].as_str().ok_or_else(|| format!("index without `{key}`").into())
}

#[test]
fn goldens_unet_head_small() -> TestResult {
    let Some(dir) = golden_dir("unet_head") else { return Ok(()) };
    let index = json(&dir.join("index.json"))?;
    for variant in index["small"].as_array().ok_or("index without `small`")? {
        let unet = unet(variant, tensors(&dir.join(file(variant, "weights")?))?)?;
        check_cases(&unet, &dir.join(file(variant, "cases")?))?;

        // Stages are recorded for one geometry of some variants.
        let stages = &variant["stages"];
        if stages.is_null() {
            continue;
        }
        let cases = Golden::open(&dir.join(file(variant, "cases")?))?;
        let mut golden = Golden::open(&dir.join(file(stages, "file")?))?;
        let mut outputs: Vec<(String, Tensor)> = Vec::new();
        let logits = unet.forward_with(cases.get(file(stages, "input")?)?, &mut |name, output| {
            outputs.push((name.to_owned(), output.clone()));
        })?;
        for (name, output) in &outputs {
            // The inner 1×1 units are recorded for the deepest decoder only.
            if name.ends_with(".upsampled") && !golden.has(name) {
                continue;
            }
            let largest = golden.get(name)?.abs()?.max_all()?.to_scalar::<f32>()?;
            golden.check(name, output, 1e-4 * f64::from(largest))?;
        }
        golden.check("logits", &logits, LOGITS)?;
        assert_eq!(golden.tensors.len(), golden.finish()?, "a recorded stage was not compared");
    }
    Ok(())
}

#[test]
fn goldens_unet_head_wide() -> TestResult {
    let Some(dir) = golden_dir("unet_head") else { return Ok(()) };
    let variant = &json(&dir.join("index.json"))?["wide"];
    let weights = formula_weights(&json(&dir.join(file(variant, "manifest")?))?)?;
    let unet = unet(variant, weights.into_iter().collect())?;
    check_cases(&unet, &dir.join(file(variant, "cases")?))
}
