//! SigLIP towers under both naming styles, and re-gridded positions (`spec/models.md` §7, §9).

mod common;

use candle_core::{DType, Device, Tensor};
use common::{Golden, TestResult, golden_dir, rel_l2};
use flmm::config::Config;
use flmm::vision::regrid::regrid;
use flmm::vision::siglip::{SiglipConfig, SiglipVision};
use flmm::weights::{Params, load_checkpoint};

/// HPT-Air-1.5: Hugging Face names, tanh GELU, hidden state −2, positions for another picture size.
#[test]
fn goldens_siglip_hugging_face_at_another_size() -> TestResult {
    let Some(dir) = golden_dir("lmm/hpt_air_1_5") else { return Ok(()) };
    let tower = dir.join("model/visual_encoder");
    for (dtype, suffix) in [(DType::F32, "f32"), (DType::BF16, "bf16")] {
        let pixels = Golden::open(&dir.join("expected/a.f32.safetensors"))?.get("pixel_values")?.clone();
        let mut golden = Golden::open(&dir.join(format!("expected/a.{suffix}.safetensors")))?;
        let config = SiglipConfig::from_config(&Config::read(&tower.join("config.json"))?, -2)?;
        let config = config.at_size(pixels.dim(1)?);
        let params = Params::new(&tower, load_checkpoint(&tower, Some(dtype), &Device::Cpu)?);
        let vision = SiglipVision::load(config, &params.pp("vision_model"))?;
        params.finish("")?;
        golden.check("position_embedding", vision.position_embedding(), 0.0)?;
        let output = vision.forward(&pixels.unsqueeze(0)?)?;
        if dtype == DType::F32 {
            golden.check("vision_out", &output, 2e-4)?;
        } else {
            let difference = rel_l2(&output, golden.get("vision_out")?)?;
            println!("{suffix}: vision_out: {difference:.4} relative");
            assert!(difference <= 0.04, "{difference}");
        }
        golden.finish()?;
    }
    Ok(())
}

/// HPT-Air: CLIP's table, whose class token keeps its row.
#[test]
fn goldens_siglip_positions_with_a_class_token() -> TestResult {
    let Some(dir) = golden_dir("lmm/hpt_air") else { return Ok(()) };
    let tower = dir.join("model/visual_encoder");
    for (dtype, suffix) in [(DType::F32, "f32"), (DType::BF16, "bf16")] {
        let tensors = load_checkpoint(&tower, Some(dtype), &Device::Cpu)?;
        let table = &tensors["vision_model.embeddings.position_embedding.weight"];
        let mut golden = Golden::open(&dir.join(format!("expected/a.{suffix}.safetensors")))?;
        let side = |table: &Tensor| Ok::<_, candle_core::Error>((table.dim(0)? - 1).isqrt());
        let to = side(golden.get("position_embedding")?)?;
        golden.check("position_embedding", &regrid(table, side(table)?, to)?, 0.0)?;
        golden.finish()?;
    }
    Ok(())
}

/// A picture of the wrong size is an error, not a panic.
#[test]
fn goldens_siglip_refuses_another_size() -> TestResult {
    let Some(dir) = golden_dir("lmm/hpt_air_1_5") else { return Ok(()) };
    let tower = dir.join("model/visual_encoder");
    let config = SiglipConfig::from_config(&Config::read(&tower.join("config.json"))?, -2)?;
    let side = config.image_size;
    let params = Params::new(&tower, load_checkpoint(&tower, Some(DType::F32), &Device::Cpu)?);
    let vision = SiglipVision::load(config, &params.pp("vision_model"))?;
    let pixels = Tensor::zeros((1, 3, side, side + 1), DType::F32, &Device::Cpu)?;
    let error = vision.forward(&pixels).err().ok_or("no error")?;
    assert!(error.to_string().contains("the tower reads"), "{error}");
    Ok(())
}
