//! From attention rows and hidden states to the mask head's input, text embeddings and logits, for all five layouts.

mod common;

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Tensor};
use common::{Golden, TestResult, formula, golden_dir, json};
use flmm::Geometry;
use flmm::capture::weighted_hidden;
use flmm::layout::{ImageLayout, Merge, maps_in_picture};
use flmm::mask_head::{UNet, UNetConfig};
use flmm::nn::Linear;
use flmm::weights::Params;
use serde_json::Value;

fn number(value: &Value) -> TestResult<usize> {
    Ok(value.as_u64().ok_or_else(|| format!("expected a number, found {value}"))? as usize)
}

fn pair(value: &Value) -> TestResult<(usize, usize)> {
    Ok((number(&value[0])?, number(&value[1])?))
}

/// The layout that a case's sizes describe.
fn layout(case: &Value) -> TestResult<ImageLayout> {
    let tokens = number(&case["image_tokens"])?;
    let side = |tokens: usize| tokens.isqrt();
    if case["geometry"].get("fine").is_some() {
        let fine = pair(&case["geometry"]["fine"])?;
        return Ok(ImageLayout::coarse_and_fine(0, side(tokens - fine.0 * (fine.1 + 1)), fine));
    }
    let (layers, heads) = (number(&case["L"])?, number(&case["H"])?);
    if number(&case["C"])? == layers * heads {
        return Ok(ImageLayout::single(0, side(tokens), side(tokens)));
    }
    // One global view and grid² crops, all with side² tokens; the map is grid · side wide.
    let width = number(&case["stack_shape"][3])?;
    let global = side(tokens - width * width);
    Ok(ImageLayout::global_and_crops(0, global, width / global))
}

fn geometry(case: &Value) -> TestResult<Geometry> {
    let part = &case["geometry"];
    if part.get("fine").is_some() {
        let any = (1, 1);
        return Ok(Geometry {
            original: any,
            image_shape: any,
            before: (0, 0),
            padded_shape: any,
            crop: false,
        });
    }
    let (image_shape, before) = (pair(&part["image"])?, pair(&part["before"])?);
    Ok(Geometry {
        original: image_shape,
        image_shape,
        before,
        padded_shape: pair(&part["padded"])?,
        crop: true,
    })
}

fn mask_head(case: &Value) -> TestResult<UNet> {
    let manifest = &case["mask_head"];
    let mut tensors = HashMap::new();
    for entry in manifest["tensors"].as_array().ok_or("no tensors")? {
        let name = entry["name"].as_str().ok_or("no name")?;
        let shape: Vec<usize> = serde_json::from_value(entry["shape"].clone())?;
        let (c, k) = (entry["c"].as_f64().ok_or("no c")?, entry["k"].as_f64().ok_or("no k")?);
        tensors.insert(name.to_owned(), formula(name, number(&manifest["seed"])? as u32, &shape, c, k)?);
    }
    let params = Params::new("attention goldens", tensors);
    let (in_channels, base_channels) = (number(&case["C"])?, number(&manifest["base_channels"])?);
    let unet = UNet::load(&UNetConfig { in_channels, base_channels, input_size: 64 }, &params)?;
    params.finish("check the goldens")?;
    Ok(unet)
}

fn check(dir: &Path, case: &Value) -> TestResult {
    let file = case["file"].as_str().ok_or("no file")?;
    let mut golden = Golden::open(&dir.join(file))?;
    let rows = golden.get("attn_rows")?.clone();
    let phrase_of: Vec<i64> = golden.get("row_phrase")?.to_vec1()?;
    let phrases = case["counts"].as_array().ok_or("no counts")?.len() as i64;
    let rows_of = |phrase: i64| -> Vec<u32> {
        (0..phrase_of.len() as u32).filter(|&row| phrase_of[row as usize] == phrase).collect()
    };
    let index: Vec<Tensor> =
        (0..phrases).map(|phrase| Tensor::new(rows_of(phrase), rows.device())).collect::<Result<_, _>>()?;
    let (layout, dtype) = (layout(case)?, rows.dtype());
    let fold = |merge| {
        layout.fold(number(&case["L"]).unwrap_or(0), merge, dtype, |layer| {
            let layer = rows.get(layer)?.to_dtype(DType::F32)?;
            index.iter().map(|rows| Ok(layer.index_select(rows, 1)?)).collect()
        })
    };
    let maps = fold(Merge::Mean)?;
    assert_eq!(maps.dim(1)?, layout.channels(number(&case["L"])?, number(&case["H"])?));
    // Identical, or one bf16 unit away.
    golden.check("mask_head_input", &maps, 1.0 / 256.0)?;
    let expected = golden.get("mask_head_input")?.to_dtype(DType::F32)?;
    let off = ((&maps - &expected)?.abs()? / (expected.abs()? + 1e-9)?)?.max_all()?.to_scalar::<f32>()?;
    let differing = maps.ne(&expected)?.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()?;
    println!(
        "{}: mask_head_input: {differing} of {} values differ, by {off:e}",
        golden.case,
        maps.elem_count()
    );
    assert!(off <= 1.0 / 128.0, "{}: mask_head_input: {off:e} of the value", golden.case);
    golden.check("mask_head_input_max_merge", &fold(Merge::Max)?, 0.0)?;

    let hidden = golden.get("hidden_rows")?.clone();
    let states =
        weighted_hidden(&hidden.narrow(0, 1, hidden.dim(0)? - 1)?, golden.get("text_layer_weights")?)?;
    golden.check("weighted_hidden_rows", &states, 1e-5)?;
    let project =
        Linear::new(golden.get("text_proj_weight")?.clone(), Some(golden.get("text_proj_bias")?.clone()));
    for phrase in 0..phrases {
        let embeds = project.forward(&states.index_select(&index[phrase as usize], 0)?)?;
        golden.check(&format!("text_embeds.{phrase}"), &embeds, 1e-4)?;
    }

    let logits = mask_head(case)?.forward(&maps)?;
    golden.check("logits", &logits, 2e-4)?;
    let (_, height, width) = logits.dims3()?;
    let geometry = geometry(case)?;
    let rect = geometry.picture_rect(height, width);
    let cropped = logits.narrow(1, rect.y0, rect.height)?.narrow(2, rect.x0, rect.width)?;
    golden.check("cropped_logits", &cropped, 2e-4)?;
    if let Ok(expected) = golden.get("resized_cropped_attention") {
        let channels = expected.dim(1)?;
        let shown = maps_in_picture(&maps.narrow(1, 0, channels)?, &geometry, height, width)?;
        golden.check("resized_cropped_attention", &shown, 1e-6)?;
    }
    golden.finish()?;
    Ok(())
}

#[test]
fn goldens_attention() -> TestResult {
    let Some(dir) = golden_dir("attention") else { return Ok(()) };
    let cases = json(&dir.join("index.json"))?;
    let cases = cases.as_array().ok_or("index.json is not a list")?;
    assert!(!cases.is_empty());
    for case in cases {
        check(&dir, case)?;
    }
    Ok(())
}
