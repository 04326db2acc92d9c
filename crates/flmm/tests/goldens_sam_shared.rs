//! The small SAM checkpoint that all golden LMM families share (`goldens/lmm/_sam`).

mod common;

use candle_core::{Device, Tensor};
use common::{Golden, TestResult, golden_dir, json};
use flmm::sam::{Sam, SamConfig};
use flmm::weights::{Params, load_checkpoint};

fn stride4(map: &Tensor) -> TestResult<Tensor> {
    let pick = |len: usize| Tensor::new((0..len as u32).step_by(4).collect::<Vec<_>>(), &Device::Cpu);
    Ok(map.index_select(&pick(map.dim(2)?)?, 2)?.index_select(&pick(map.dim(3)?)?, 3)?)
}

#[test]
fn goldens_sam_shared_checkpoint() -> TestResult {
    let Some(dir) = golden_dir("lmm/_sam") else { return Ok(()) };
    let config = SamConfig::from_file(&dir.join("sam_config.json"))?;
    let mut opened = None;
    for entry in std::fs::read_dir(&dir)? {
        let file = entry?.path();
        let name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if !name.starts_with("sam_vit") {
            continue;
        }
        let params = Params::new(&file, load_checkpoint(&file, None, &Device::Cpu)?);
        let told = SamConfig::from_tensors(&params, &file)?;
        let expected = SamConfig { iou_head_hidden_dim: told.iou_head_hidden_dim, ..config.clone() };
        assert_eq!(told, expected, "{name}: sizes told by the tensors");
        opened = Some(Sam::open(&file, &Device::Cpu)?);
    }
    let sam = opened.ok_or("no checkpoint named sam_vit*")?;
    let expected = json(&dir.join("expected.json"))?;
    let mut golden = Golden::open(&dir.join("expected.safetensors"))?;

    let pe = sam.refiner().prompt_encoder().dense_pe();
    let grid = sam.config().grid();
    let pe = pe.transpose(1, 2)?.contiguous()?.reshape((1, sam.config().prompt_embed_dim, grid, grid))?;
    golden.check("dense_pe", &stride4(&pe)?, 1e-5)?;

    let mut pictures = 0;
    for (picture, info) in expected.as_object().ok_or("expected.json is no object")? {
        let Some(file) = info["image"].as_str() else { continue };
        // The path is relative to the folder of all families.
        let file = dir.join("..").join(file);
        if !file.exists() {
            continue;
        }
        pictures += 1;
        let image = image::open(&file)?.to_rgb8();
        let (pixels, geometry) = sam.pixel_values(&image)?;
        assert_eq!(serde_json::json!([geometry.original.0, geometry.original.1]), info["original_hw"]);
        assert_eq!(serde_json::json!([geometry.resized.0, geometry.resized.1]), info["resized_hw"]);
        let input = &expected[&format!("{picture}.encoder_input")];
        let rows: Vec<u32> = serde_json::from_value(input["rows_index_in_flattened_leading_dims"].clone())?;
        let rows = pixels.flatten(0, 1)?.index_select(&Tensor::new(rows, &Device::Cpu)?, 0)?;
        golden.check(&format!("{picture}.encoder_input.rows"), &rows, 1e-6)?;
        let (embedding, _) = sam.encode_image(&image)?;
        golden.check(&format!("{picture}.image_embedding"), &embedding, 1e-4)?;
        golden.check(&format!("{picture}.image_embedding.stride4"), &stride4(&embedding)?, 1e-4)?;
    }
    assert!(pictures > 0, "no picture that expected.json names exists");
    golden.finish()?;
    Ok(())
}
