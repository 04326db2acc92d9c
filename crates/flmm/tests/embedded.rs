//! A model inside the program opens like the same model on disk, and answers alike.

mod common;

use std::path::Path;

use candle_core::{DType, Device};
use common::TestResult;
use flmm::grounder::{GroundOptions, GroundedAnswer, ModelPaths};
use flmm::phrases::PhraseChoice;
use flmm::{Grounder, weights::files};

/// The files of `folder` under another folder name, kept in memory for good.
fn embedded(name: &str, folder: &Path, only: &[&str]) -> TestResult<Vec<(&'static str, &'static [u8])>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let file = entry?.path();
        let base = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if file.is_file() && (only.is_empty() || only.contains(&base.as_str())) {
            let path: &'static str = format!("{name}/{base}").leak();
            files.push((path, &*std::fs::read(&file)?.leak()));
        }
    }
    Ok(files)
}

fn ground(paths: &ModelPaths, picture: &Path) -> TestResult<GroundedAnswer> {
    let grounder = Grounder::open(paths, &Device::Cpu, DType::F32)?;
    let choice = PhraseChoice::Given(vec!["a ball".into()]);
    Ok(grounder.ground(
        &flmm::image_input::read_image(picture)?,
        "Here is a ball.",
        &choice,
        &GroundOptions::default(),
    )?)
}

#[test]
fn an_embedded_bundle_is_the_same_model() -> TestResult {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/lmm");
    let (case, sam) = (fixtures.join("llava15"), fixtures.join("_sam/sam_vit_tiny.pth"));
    let on_disk = ModelPaths { model: case.join("model"), sam, head: Some(case.join("heads.pth")) };

    let mut files = embedded("lmm", &case.join("model"), &[])?;
    files.extend(embedded("sam", &fixtures.join("_sam"), &["sam_vit_tiny.pth", "sam_config.json"])?);
    files.extend(embedded("head", &case, &["heads.pth"])?);
    let bundle = ModelPaths::bundle(&files::embed("twin", files.leak()));

    let picture = case.join("images/a.png");
    let (a, b) = (ground(&on_disk, &picture)?, ground(&bundle, &picture)?);
    assert!(a.phrases[0].mask.area() > 0);
    assert_eq!(
        (&a.phrases[0].mask, &a.phrases[0].coarse_mask),
        (&b.phrases[0].mask, &b.phrases[0].coarse_mask)
    );
    // What is not inside is missing, not looked for on the disk.
    let none = Grounder::open(&ModelPaths::bundle(&bundle.model.join("../other")), &Device::Cpu, DType::F32);
    assert!(none.err().ok_or("opened nothing")?.to_string().contains("embedded:"));
    Ok(())
}
