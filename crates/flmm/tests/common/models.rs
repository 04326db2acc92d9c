//! The small models of the golden cases.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use flmm::lmm::{OpenOptions, recognise};

use super::{TestResult, golden_dir, json};

/// Names of models and their cases' folders, which hold the model in `model`; sorted.
pub fn models() -> TestResult<Vec<(&'static str, PathBuf)>> {
    let Some(root) = golden_dir("lmm") else { return Ok(Vec::new()) };
    let mut models = Vec::new();
    for entry in std::fs::read_dir(&root)? {
        let dir = entry?.path();
        if let Ok(entry) = recognise(&dir.join("model")) {
            models.push((entry.spec.name, dir));
        }
    }
    models.sort();
    Ok(models)
}

/// What the files of a case do not tell: towers that lie beside the model, the size of the picture.
pub fn tiny_options(dir: &Path, dtype: DType) -> TestResult<OpenOptions> {
    let mut options = OpenOptions::new(dtype, &Device::Cpu);
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with("openai-clip") {
            options.vision_tower = Some(path);
        } else if name.starts_with("openclip") {
            options.vision_tower_aux = Some(path);
        }
    }
    let record = dir.join("expected/a.f32.json");
    if record.is_file() {
        let geometry = &json(&record)?["geometry"];
        options.image_size = geometry["padded_shape"]["height"].as_u64().map(|side| side as usize);
    }
    Ok(options)
}
