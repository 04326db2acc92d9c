//! Image processors: geometry and 8-bit results exact, normalised values to 2e-6.

mod common;

use std::path::{Path, PathBuf};

use candle_core::Tensor;
use common::{TestResult, golden_dir, json, tensors};
use flmm::Geometry;
use flmm::image_input::read_image;
use flmm::vision::anyres::{AnyResProcessor, PINPOINTS, unpad};
use flmm::vision::dual::DualProcessor;
use flmm::vision::preprocess::{
    LlavaProcessor, Normalisation, SizeRule, pad_to_square, sam_resize, sam_size,
};
use image::RgbImage;
use serde_json::Value;
use sha2::{Digest, Sha256};

/// The processors that pad to a square at the tower's input size, by their key in the goldens.
fn square(key: &str) -> Option<LlavaProcessor> {
    let (name, side) = key.split_at(key.find(|c: char| c.is_ascii_digit())?);
    let side: usize = side.parse().ok()?;
    let divide = SizeRule::DivideFirst { least: 14 };
    Some(match (name, side) {
        ("hpt", 448..) => LlavaProcessor::new(side, SizeRule::MultiplyFirst, Normalisation::HALF),
        ("llava" | "hpt", _) => LlavaProcessor::new(side, SizeRule::MultiplyFirst, Normalisation::CLIP),
        // The larger DeepSeek-VL pads with CLIP's mean colour and leaves normalisation to its towers.
        ("deepseek", 1024..) => LlavaProcessor::new(side, divide, Normalisation::NONE)
            .with_background(Normalisation::CLIP.background()),
        ("deepseek", _) => LlavaProcessor::new(side, divide, Normalisation::HALF),
        _ => return None,
    })
}

fn anyres() -> AnyResProcessor {
    AnyResProcessor::new(336, PINPOINTS.to_vec(), Normalisation::CLIP).unwrap()
}

/// What a processor makes of a picture: 8-bit views, geometry, and the normalised tensor.
struct Made {
    views: Vec<RgbImage>,
    geometry: Option<Geometry>,
    normalised: Option<Tensor>,
}

/// `None` for a processor that is not covered here.
fn make(key: &str, image: &RgbImage) -> TestResult<Option<Made>> {
    let made = |views, geometry, normalised| Ok(Some(Made { views, geometry, normalised }));
    if let Some(processor) = square(key) {
        let (view, geometry) = processor.square(image)?;
        let (tensor, again) = processor.process(image)?;
        assert_eq!(geometry, again);
        return made(vec![view], Some(geometry), Some(tensor));
    }
    match key {
        "pad2square" => {
            let (view, geometry) = pad_to_square(image, Normalisation::CLIP.background())?;
            made(vec![view], Some(geometry), None)
        }
        "llava_next" => {
            let (views, geometry) = anyres().views(image)?;
            made(views, Some(geometry), Some(anyres().process(image)?.0))
        }
        "sam1024" => made(vec![sam_resize(image, 1024)], None, None),
        _ => Ok(None),
    }
}

fn sizes(value: &Value) -> TestResult<Vec<usize>> {
    Ok(serde_json::from_value(value.clone())?)
}

/// Compares rows of the 8-bit result with the PNG, to say where a difference lies; the digest covers all rows.
fn first_difference(dir: &Path, expected: &Value, views: &[RgbImage]) -> TestResult<String> {
    let Some(file) = expected["u8_file"].as_str().map(|name| dir.join(name)).filter(|file| file.is_file())
    else {
        return Ok("digest differs".into());
    };
    let rows = read_image(&file)?;
    let step = expected["row_step"].as_u64().ok_or("no row_step")? as usize;
    let found = views.iter().flat_map(|view| view.rows().step_by(step));
    for (y, (a, b)) in found.zip(rows.rows()).enumerate() {
        for (x, (a, b)) in a.zip(b).enumerate() {
            if a != b {
                return Ok(format!("stored row {y}, column {x}: found {:?}, expected {:?}", a.0, b.0));
            }
        }
    }
    Ok("digest differs, stored rows agree".into())
}

fn check_normalised(expected: &Value, made: &Made, stored: &Tensor, what: &str) -> TestResult {
    let Some(tensor) = &made.normalised else { return Ok(()) };
    assert_eq!(tensor.dims(), sizes(&expected["normalised_shape"])?, "{what}");
    let rows: Vec<u32> = serde_json::from_value(expected["normalised_rows"].clone())?;
    let count = rows.len();
    let axis = tensor.rank() - 2;
    let mut picked = tensor.index_select(&Tensor::from_vec(rows, count, tensor.device())?, axis)?;
    if let Some(step) = expected["normalised_column_step"].as_u64() {
        let columns: Vec<u32> = (0..picked.dims()[axis + 1] as u32).step_by(step as usize).collect();
        let count = columns.len();
        picked = picked.index_select(&Tensor::from_vec(columns, count, tensor.device())?, axis + 1)?;
    }
    let difference = common::max_abs_diff(&picked, stored)?;
    assert!(difference <= 2e-6, "{what}: normalised rows differ by {difference:e}");
    let values = tensor.flatten_all()?.to_vec1::<f32>()?;
    let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / values.len() as f64;
    let recorded = expected["normalised_mean"].as_f64().ok_or("no normalised_mean")?;
    assert!((mean - recorded).abs() < 1e-5, "{what}: mean {mean}, expected {recorded}");
    Ok(())
}

fn check_geometry(expected: &Value, geometry: &Geometry, what: &str) {
    let meta = &expected["meta"];
    let pair = |value: &Value, a: &str, b: &str| {
        (value[a].as_u64().unwrap() as usize, value[b].as_u64().unwrap() as usize)
    };
    assert_eq!(geometry.image_shape, pair(&meta["image_shape"], "height", "width"), "{what}: image shape");
    assert_eq!(geometry.padded_shape, pair(&meta["padded_shape"], "height", "width"), "{what}: padded shape");
    assert_eq!(geometry.before, pair(&meta["padding"], "before_height", "before_width"), "{what}: padding");
    assert_eq!(
        (
            geometry.padded_shape.0 - geometry.image_shape.0 - geometry.before.0,
            geometry.padded_shape.1 - geometry.image_shape.1 - geometry.before.1
        ),
        pair(&meta["padding"], "after_height", "after_width"),
        "{what}: padding after"
    );
}

#[test]
fn goldens_preprocess_pixels() -> TestResult {
    let Some(dir) = golden_dir("preprocess") else { return Ok(()) };
    let index = json(&dir.join("index.json"))?;
    let mut compared = 0;
    for entry in index["images"].as_array().ok_or("no images")? {
        let name = entry["name"].as_str().ok_or("no name")?;
        let image = read_image(dir.join(entry["file"].as_str().ok_or("no file")?))?;
        assert_eq!(
            (u64::from(image.height()), u64::from(image.width())),
            (entry["height"].as_u64().unwrap(), entry["width"].as_u64().unwrap()),
            "{name}"
        );
        let stored = dir.join(format!("{name}.safetensors"));
        let stored = if stored.is_file() { tensors(&stored)? } else { Default::default() };
        // DeepSeek-VL resizes palette and alpha pictures in their own mode; this library reads RGB.
        let own_mode = matches!(entry["mode"].as_str(), Some("P" | "RGBA"));
        for (key, expected) in entry["processors"].as_object().ok_or("no processors")? {
            if own_mode && key.starts_with("deepseek") {
                continue;
            }
            let Some(made) = make(key, &image)? else { continue };
            let what = format!("{name}.{key}");
            let shape = sizes(&expected["shape"])?;
            let (h, w) = (made.views[0].height() as usize, made.views[0].width() as usize);
            let found = if shape.len() == 4 { vec![made.views.len(), h, w, 3] } else { vec![h, w, 3] };
            assert_eq!(found, shape, "{what}: shape");
            if let Some(geometry) = &made.geometry {
                check_geometry(expected, geometry, &what);
            }
            let bytes: Vec<&[u8]> = made.views.iter().map(|view| view.as_raw().as_slice()).collect();
            let digest = hex_digest(&bytes.concat());
            if expected["sha256"] != digest.as_str() {
                panic!("{what}: {}", first_difference(&dir, expected, &made.views)?);
            }
            if let Some(stored) = stored.get(&format!("{key}.rows")) {
                check_normalised(expected, &made, stored, &what)?;
            }
            compared += 1;
        }
    }
    println!("{compared} results equal");
    assert!(compared > 0);
    Ok(())
}

fn hex_digest(bytes: &[u8]) -> String {
    flmm::hex(Sha256::digest(bytes))
}

/// Recorded rows `rows` and every `step`-th column of a tensor, and its mean.
fn check_sampled(tensor: &Tensor, stored: &Tensor, rows: &Value, step: u64, mean: &Value) -> TestResult<f64> {
    let rows: Vec<u32> = serde_json::from_value(rows.clone())?;
    let axis = tensor.rank() - 2;
    let columns: Vec<u32> = (0..tensor.dim(axis + 1)? as u32).step_by(step as usize).collect();
    let picked = tensor
        .index_select(&Tensor::new(rows, tensor.device())?, axis)?
        .index_select(&Tensor::new(columns, tensor.device())?, axis + 1)?;
    let found = tensor.to_dtype(candle_core::DType::F64)?.mean_all()?.to_scalar::<f64>()?;
    assert!((found - mean.as_f64().ok_or("no mean")?).abs() < 1e-6, "mean {found}, expected {mean}");
    common::max_abs_diff(&picked, &stored.reshape(picked.shape())?)
}

#[test]
fn goldens_preprocess_mini_gemini() -> TestResult {
    let Some(dir) = golden_dir("preprocess") else { return Ok(()) };
    let index = json(&dir.join("index.json"))?;
    let mut compared = 0;
    for entry in index["images"].as_array().ok_or("no images")? {
        let name = entry["name"].as_str().ok_or("no name")?;
        let image = read_image(dir.join(entry["file"].as_str().ok_or("no file")?))?;
        let stored = dir.join(format!("{name}.safetensors"));
        let stored = if stored.is_file() { tensors(&stored)? } else { Default::default() };
        for (key, grid) in [("mgm", 1), ("mgm_hd", 2)] {
            let Some(expected) = entry["processors"].get(key) else { continue };
            let side = |name: &str| expected[name][3].as_u64().or_else(|| expected[name][4].as_u64());
            let aux = side("aux_shape").ok_or("no aux_shape")? as usize;
            let processor = DualProcessor::new(336, aux, grid, Normalisation::CLIP);
            let digest = hex_digest(processor.square(&image)?.0.as_raw());
            assert_eq!(expected["aux_u8_sha256"], digest.as_str(), "{name}.{key}: 8-bit square");
            let made = processor.process(&image)?;
            assert_eq!(made.main.dims(), [if grid == 1 { 1 } else { 5 }, 3, 336, 336]);
            for (part, tensor, rows) in [("main", &made.main, "rows"), ("aux", &made.aux, "aux_rows")] {
                let Some(stored) = stored.get(&format!("{key}.{part}_rows")) else { continue };
                let step = expected[format!("{part}_column_step")].as_u64().ok_or("no column step")?;
                let mean = &expected[format!("{part}_mean")];
                let difference = check_sampled(tensor, stored, &expected[rows], step, mean)?;
                println!("{name}.{key}.{part}: {difference:.1e}");
                assert!(difference <= 5e-6, "{name}.{key}.{part}: differs by {difference:e}");
                compared += 1;
            }
        }
    }
    println!("{compared} tensors");
    Ok(())
}

#[test]
fn goldens_preprocess_geometry() -> TestResult {
    let Some(dir) = golden_dir("preprocess") else { return Ok(()) };
    let table = json(&dir.join("geometry.json"))?;
    let rows = table.as_array().ok_or("not a list")?;
    assert!(!rows.is_empty());
    for row in rows {
        let original = (row["height"].as_u64().unwrap() as usize, row["width"].as_u64().unwrap() as usize);
        let pair = |value: &Value| -> (usize, usize) { serde_json::from_value(value.clone()).unwrap() };
        for (key, expected) in row.as_object().ok_or("not an object")? {
            let what = format!("{}×{} {key}", original.0, original.1);
            let geometry = match key.as_str() {
                "height" | "width" => continue,
                "sam_input" => {
                    assert_eq!(sam_size(original, 1024), pair(expected), "{what}");
                    continue;
                }
                "llava_next" => {
                    check_anyres(original, expected, &what);
                    continue;
                }
                "pad2square" => {
                    let blank = RgbImage::new(original.1 as u32, original.0 as u32);
                    pad_to_square(&blank, [0; 3])?.1
                }
                key => square(key).ok_or_else(|| format!("unknown processor {key}"))?.geometry(original)?,
            };
            assert_eq!(geometry.image_shape, pair(&expected["image_shape"]), "{what}: image shape");
            assert_eq!(geometry.padded_shape, pair(&expected["padded_shape"]), "{what}: padded shape");
            assert_eq!(geometry.before, pair(&expected["before"]), "{what}: padding");
            let rect = geometry.picture_rect(64, 64);
            let found = vec![rect.y0, rect.x0, rect.height, rect.width];
            assert_eq!(found, sizes(&expected["crop64"])?, "{what}: crop rectangle");
        }
    }
    println!("{} sizes", rows.len());
    Ok(())
}

fn check_anyres(original: (usize, usize), expected: &Value, what: &str) {
    let pair = |key: &str| -> (usize, usize) { serde_json::from_value(expected[key].clone()).unwrap() };
    let processor = anyres();
    let geometry = processor.geometry(original).unwrap();
    assert_eq!(geometry.padded_shape, pair("target"), "{what}: target");
    assert_eq!(geometry.image_shape, pair("image_shape"), "{what}: image shape");
    assert_eq!(geometry.before, pair("before"), "{what}: padding");
    assert!(!geometry.crop);
    let grid = processor.crop_grid(&geometry);
    assert_eq!(grid, pair("crop_grid"), "{what}: crop grid");
    assert_eq!(grid.0 * grid.1 + 1, expected["views"].as_u64().unwrap() as usize, "{what}: views");
    let (_, _, rows, columns) = unpad(original, (24 * grid.0, 24 * grid.1));
    assert_eq!((rows, columns), pair("fine_grid"), "{what}: fine grid");
    let tokens = 576 + rows * (columns + 1);
    assert_eq!(tokens, expected["image_tokens"].as_u64().unwrap() as usize, "{what}: tokens");
}

#[test]
fn goldens_preprocess_reads_the_model_folders() -> TestResult {
    let Some(lmm) = golden_dir("lmm") else { return Ok(()) };
    let mut compared = 0;
    for family in std::fs::read_dir(lmm)? {
        let dir: PathBuf = family?.path();
        let file = dir.join("expected/a.f32.safetensors");
        let is_llava = dir.file_name().is_some_and(|n| n.to_string_lossy().starts_with("llava15"));
        if !is_llava || !file.is_file() {
            continue;
        }
        let recorded = tensors(&file)?;
        // Large inputs are recorded as statistics only.
        let Some(expected) = recorded.get("pixel_values") else { continue };
        let (found, _) = LlavaProcessor::from_config(dir.join("model"))?
            .process(&read_image(dir.join("images/a.png"))?)?;
        let difference = common::max_abs_diff(&found, expected)?;
        assert!(difference <= 1e-6, "{}: pixel_values differ by {difference:e}", dir.display());
        compared += 1;
    }
    println!("{compared} model folders");
    Ok(())
}
