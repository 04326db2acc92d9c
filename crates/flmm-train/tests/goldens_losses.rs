//! Losses, statistics, targets and one whole backward pass against recorded values (`losses`).

#[path = "../../flmm/tests/common/mod.rs"]
mod common;

use std::collections::HashMap;

use candle_core::{Tensor, Var};
use common::{Golden, TestResult, golden_dir, json, max_abs_diff, rel_l2};
use flmm::Geometry;
use flmm::mask_head::{UNet, UNetConfig};
use flmm::nn::nearest;
use flmm::weights::Params;
use flmm_train::losses::{MaskStats, bce, dice, stats};
use serde_json::Value;

fn number(value: &Value, key: &str) -> TestResult<f64> {
    value[key].as_f64().ok_or_else(|| format!("index without `{key}`").into())
}

fn pair(value: &Value, key: &str) -> TestResult<(usize, usize)> {
    let list: Vec<usize> = serde_json::from_value(value[key].clone())?;
    match *list {
        [a, b] => Ok((a, b)),
        _ => Err(format!("`{key}` is not a pair").into()),
    }
}

fn relative(what: &str, found: f64, expected: f64, tolerance: f64) -> TestResult {
    println!("{what}: {found} (expected {expected})");
    match (found - expected).abs() <= tolerance * expected.abs().max(1e-30) {
        true => Ok(()),
        false => Err(format!("{what}: {found} instead of {expected}").into()),
    }
}

fn absolute(what: &str, found: f64, expected: f64, tolerance: f64) -> TestResult {
    match (found - expected).abs() <= tolerance {
        true => Ok(()),
        false => Err(format!("{what}: {found} instead of {expected}").into()),
    }
}

fn scalar(x: &Tensor) -> TestResult<f64> {
    Ok(f64::from(x.to_scalar::<f32>()?))
}

#[test]
fn goldens_losses_cases() -> TestResult {
    let Some(dir) = golden_dir("losses") else { return Ok(()) };
    let mut golden = Golden::open(&dir.join("losses.safetensors"))?;
    for case in json(&dir.join("index.json"))?["cases"].as_array().ok_or("index without `cases`")? {
        let name = case["name"].as_str().ok_or("case without `name`")?;
        let logits = Var::from_tensor(golden.get(&format!("{name}.logits"))?)?;
        let target = golden.get(&format!("{name}.target"))?.clone();
        for (key, loss) in [("bce", bce(&logits, &target)?), ("dice", dice(&logits, &target)?)] {
            relative(&format!("{name} {key}"), scalar(&loss)?, number(case, key)?, 1e-5)?;
            let grads = loss.backward()?;
            let grad = grads.get(&logits).ok_or("no gradient")?;
            golden.check(&format!("{name}.grad_{key}"), grad, 1e-7)?;
        }
        let MaskStats { accuracy, aiou } = stats(&logits, &target)?;
        absolute(&format!("{name} accuracy"), accuracy, number(case, "accuracy")?, 1e-6)?;
        absolute(&format!("{name} aiou"), aiou, number(case, "aiou")?, 1e-6)?;
    }
    golden.finish()?;
    Ok(())
}

#[test]
fn goldens_losses_batch() -> TestResult {
    let Some(dir) = golden_dir("losses") else { return Ok(()) };
    let index = json(&dir.join("index.json"))?;
    let golden = Golden::open(&dir.join("losses.safetensors"))?;
    let counts: Vec<usize> = serde_json::from_value(index["batch_masks"].clone())?;
    let mut sums: HashMap<String, f64> = HashMap::new();
    for (image, &count) in counts.iter().enumerate() {
        let get = |key: &str| golden.get(&format!("batch.{image}.{key}"));
        let masks = get("masks")?;
        assert_eq!(masks.dim(0)?, count);
        for (prefix, logits, target) in
            [("", "pred_masks", "cnn_target"), ("sam_", "sam_pred_masks", "sam_target")]
        {
            let logits = get(logits)?;
            let (_, h, w) = logits.dims3()?;
            let resized = nearest(masks, h, w)?;
            if max_abs_diff(&resized, get(target)?)? != 0.0 {
                return Err(format!("batch.{image}.{target} differs").into());
            }
            let MaskStats { accuracy, aiou } = stats(logits, &resized)?;
            let values = [
                ("loss_mask", scalar(&bce(logits, &resized)?)?),
                ("loss_dice", scalar(&dice(logits, &resized)?)?),
                ("accuracy", accuracy),
                ("aiou", aiou),
            ];
            for (key, value) in values {
                *sums.entry(format!("{prefix}{key}")).or_default() += value * count as f64;
            }
        }
    }
    let all = counts.iter().sum::<usize>() as f64;
    let mut total = 0.0;
    for (key, expected) in index["batch"].as_object().ok_or("index without `batch`")? {
        let found = sums[key] / all;
        relative(key, found, expected.as_f64().ok_or("not a number")?, 1e-5)?;
        total += if key.contains("loss") { found } else { 0.0 };
    }
    relative("total", total, number(&index, "batch_total_loss")?, 1e-5)
}

#[test]
fn goldens_losses_unet_backward() -> TestResult {
    let Some(dir) = golden_dir("losses") else { return Ok(()) };
    let index = &json(&dir.join("index.json"))?["unet_backward"];
    let mut golden = Golden::open(&dir.join("unet_backward.safetensors"))?;
    let mut vars: HashMap<String, Var> = HashMap::new();
    for (key, tensor) in &golden.tensors {
        if let Some(name) = key.strip_prefix("weight.") {
            vars.insert(name.to_owned(), Var::from_tensor(tensor)?);
        }
    }
    let config = UNetConfig {
        in_channels: number(index, "C")? as usize,
        base_channels: number(index, "base_channels")? as usize,
        input_size: 64,
    };
    let params =
        Params::new("unet_backward", vars.iter().map(|(k, v)| (k.clone(), v.as_tensor().clone())).collect());
    let unet = UNet::load(&config, &params)?;
    params.finish("the golden must hold every tensor")?;

    let geometry = Geometry {
        original: (0, 0),
        image_shape: pair(index, "image_shape")?,
        before: pair(index, "before")?,
        padded_shape: pair(index, "padded_shape")?,
        crop: true,
    };
    let logits = unet.forward(golden.get("input")?)?;
    let (_, h, w) = logits.dims3()?;
    let r = geometry.picture_rect(h, w);
    let crop: Vec<usize> = serde_json::from_value(index["crop"].clone())?;
    assert_eq!(crop, [r.y0, r.x0, r.height, r.width]);
    let cropped = Var::from_tensor(&logits.narrow(1, r.y0, r.height)?.narrow(2, r.x0, r.width)?)?;
    golden.check("cropped_logits", &cropped, 2e-4)?;
    let target = nearest(golden.get("masks")?, r.height, r.width)?;
    golden.check("target", &target, 0.0)?;

    // The gradient at the cropped logits, then the whole chain.
    let (loss_bce, loss_dice) = (bce(&cropped, &target)?, dice(&cropped, &target)?);
    relative("bce", scalar(&loss_bce)?, number(index, "bce")?, 1e-5)?;
    relative("dice", scalar(&loss_dice)?, number(index, "dice")?, 1e-5)?;
    let grads = (loss_bce + loss_dice)?.backward()?;
    golden.check("grad_cropped_logits", grads.get(&cropped).ok_or("no gradient")?, 1e-7)?;
    let found = stats(&cropped, &target)?;
    absolute("accuracy", found.accuracy, number(index, "accuracy")?, 1e-6)?;
    absolute("aiou", found.aiou, number(index, "aiou")?, 1e-6)?;

    let cropped = logits.narrow(1, r.y0, r.height)?.narrow(2, r.x0, r.width)?;
    let grads = (bce(&cropped, &target)? + dice(&cropped, &target)?)?.backward()?;
    let (mut squares, mut worst) = (0f64, 0f64);
    for (name, var) in &vars {
        let grad = grads.get(var).ok_or_else(|| format!("`{name}` has no gradient"))?;
        let error = rel_l2(grad, golden.get(&format!("grad.{name}"))?)?;
        squares += scalar(&grad.sqr()?.sum_all()?)?;
        worst = worst.max(error);
        if error > 1e-4 {
            return Err(format!("gradient of `{name}`: relative error {error:e}").into());
        }
    }
    println!("worst relative error of {} gradients: {worst:.1e}", vars.len());
    relative("grad_norm", squares.sqrt(), number(index, "grad_norm")?, 1e-5)
}
