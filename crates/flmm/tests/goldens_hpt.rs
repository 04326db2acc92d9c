//! HPT's towers at another picture size than they were trained on: positions to the last bit (`spec/models.md` §9).

mod common;

use candle_core::{DType, Device};
use common::{Golden, TestResult, golden_dir, json};
use flmm::config::Config;
use flmm::vision::clip::{ClipConfig, ClipVision};
use flmm::weights::{Params, load_checkpoint};

#[test]
fn goldens_hpt_positions_of_clip() -> TestResult {
    let Some(dir) = golden_dir("lmm/hpt_air") else { return Ok(()) };
    let tower = dir.join("model/visual_encoder");
    let geometry = &json(&dir.join("expected/a.f32.json"))?["geometry"];
    let side = geometry["padded_shape"]["height"].as_u64().ok_or("no size")? as usize;
    for (dtype, suffix) in [(DType::F32, "f32"), (DType::BF16, "bf16")] {
        let mut golden = Golden::open(&dir.join(format!("expected/a.{suffix}.safetensors")))?;
        let config = ClipConfig::from_config(&Config::read(&tower.join("config.json"))?, -2)?.at_size(side);
        let params = Params::new(&tower, load_checkpoint(&tower, Some(dtype), &Device::Cpu)?);
        let vision = ClipVision::load(config, &params.pp("vision_model"))?;
        params.finish("")?;
        golden.check("position_embedding", vision.position_embedding(), 0.0)?;
        golden.finish()?;
    }
    Ok(())
}
