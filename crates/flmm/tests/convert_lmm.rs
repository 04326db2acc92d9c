//! Models converted ahead of time compute what models converted while they are opened compute, bit for bit.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use common::TestResult;
use common::models::{models, tiny_options};
use flmm::convert::convert_lmm;
use flmm::lmm::{self, OpenOptions, Turn, converted_to};
use flmm::text::KvCache;
use flmm::weights::{
    WeightFormat, fingerprint, load_checkpoint, load_safetensors, rehearse, safetensors_metadata,
    save_safetensors, stored_format,
};

/// bf16 with matrices in `weights`.
fn in_format(options: &OpenOptions, weights: WeightFormat) -> OpenOptions {
    OpenOptions { weights, dtype: DType::BF16, ..options.clone() }
}

/// Image features and logits of a short conversation, as bits.
fn numbers(model: &Path, options: &OpenOptions) -> TestResult<Vec<u32>> {
    let lmm = lmm::open_with(model, options)?;
    let picture = image::RgbImage::from_fn(64, 48, |x, y| image::Rgb([x as u8 * 4, y as u8 * 5, 99]));
    let prepared = lmm.prepare(&picture, &[Turn::user("What is this?")])?;
    let embeddings = lmm.embed(&prepared)?;
    let mut cache = KvCache::new(lmm.decoder().config(), prepared.token_ids.len() + 1);
    // Many rows, and then one.
    let hidden = lmm.decoder().forward(&embeddings, &mut cache, None)?;
    let next = lmm.decoder().forward(&embeddings.narrow(0, 0, 1)?, &mut cache, None)?;
    let all =
        [lmm.decoder().logits(&hidden)?, lmm.decoder().logits(&next)?, embeddings.to_dtype(DType::F32)?];
    let mut bits = Vec::new();
    for tensor in all {
        bits.extend(tensor.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits));
    }
    Ok(bits)
}

/// A LLaVA of the fixtures and how it is opened.
fn llava() -> TestResult<(PathBuf, OpenOptions)> {
    let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/lmm/llava15");
    let options = tiny_options(&case, DType::BF16)?;
    Ok((case.join("model"), options))
}

#[test]
fn every_family_computes_the_same() -> TestResult {
    for (name, case) in models()? {
        let (model, options) = (case.join("model"), tiny_options(&case, DType::BF16)?);
        let mut seen = vec![numbers(&model, &in_format(&options, WeightFormat::AsLoaded))?];
        for weights in [WeightFormat::AsLoaded, WeightFormat::Int8, WeightFormat::Int4] {
            let options = in_format(&options, weights);
            let folder = tempfile::tempdir()?;
            let out = folder.path().join("out");
            let done = convert_lmm(&model, &options, &out, false).map_err(|e| format!("{name}: {e}"))?;
            assert_eq!(done.name, name);
            assert_eq!(done.matrices > 0, weights != WeightFormat::AsLoaded, "{name}");
            let (expected, found) = (numbers(&model, &options)?, numbers(&out, &options)?);
            assert!(expected == found, "{name} in {weights:?}: the converted folder computes other numbers");
            if weights != WeightFormat::AsLoaded {
                assert!(!seen.contains(&found), "{name}: {weights:?} changes nothing");
                seen.push(found);
            }
            assert_eq!(converted_to(&out)?.unwrap_or_default(), weights, "{name}");
            // What looks at headers alone finds all tensors, and none too many.
            let plain = options_f32(&options);
            let (_, before) = rehearse(|| lmm::open_with(&model, &plain).map(drop));
            let (opened, after) = rehearse(|| lmm::open_with(&out, &plain).map(drop));
            opened?;
            assert_eq!((after.problems, after.unused), (before.problems, before.unused), "{name}");
        }
    }
    Ok(())
}

#[test]
fn files_are_as_documented() -> TestResult {
    let (model, options) = llava()?;
    let folder = tempfile::tempdir()?;
    let out = folder.path().join("out");
    let done = convert_lmm(&model, &in_format(&options, WeightFormat::Int4), &out, false)?;
    let file = out.join("model.safetensors");
    assert_eq!(done.bytes[1], std::fs::metadata(&file)?.len());
    assert!(done.bytes[1] < done.bytes[0]);
    let metadata = safetensors_metadata(&file)?;
    assert_eq!((&*metadata["flmm_weights"], &*metadata["flmm_weights_version"]), ("int4", "1"));
    let tensors = load_safetensors(&[file], None, &Device::Cpu)?;
    for (part, dtype) in
        [(".weight.int4", DType::U8), (".weight.int8", DType::U8), (".weight.scales", DType::BF16)]
    {
        let mut types =
            tensors.iter().filter(|(name, _)| name.ends_with(part)).map(|(_, tensor)| tensor.dtype());
        assert!(types.next() == Some(dtype) && types.all(|found| found == dtype), "{part}");
    }
    // Only the decoder's layers have four bits.
    let four: Vec<&String> = tensors.keys().filter(|name| name.ends_with(".int4")).collect();
    assert!(four.iter().all(|name| name.contains("language_model") && name.contains(".layers.")), "{four:?}");
    assert!(tensors.keys().any(|name| name.ends_with("lm_head.weight.int8")));
    // Another model, by all that tells models apart.
    assert_ne!(fingerprint(&out)?, fingerprint(&model)?);
    assert!(out.join("tokenizer.json").is_file() && out.join("config.json").is_file());
    Ok(())
}

#[test]
fn shards_are_converted_one_by_one() -> TestResult {
    let (model, options) = llava()?;
    let folder = tempfile::tempdir()?;
    let (sharded, out) = (folder.path().join("sharded"), folder.path().join("out"));
    std::fs::create_dir(&sharded)?;
    for entry in std::fs::read_dir(&model)? {
        let path = entry?.path();
        if !path.ends_with("model.safetensors") {
            std::fs::copy(&path, sharded.join(path.file_name().unwrap_or_default()))?;
        }
    }
    let all: BTreeMap<String, Tensor> = load_checkpoint(&model, None, &Device::Cpu)?.into_iter().collect();
    let mut map = serde_json::Map::new();
    for number in 0..2 {
        let name = format!("part-{number}.safetensors");
        let part = all.iter().enumerate().filter(|(at, _)| at % 2 == number);
        let part: BTreeMap<_, _> = part.map(|(_, (name, tensor))| (name.clone(), tensor.clone())).collect();
        map.extend(part.keys().map(|tensor| (tensor.clone(), name.clone().into())));
        save_safetensors(sharded.join(name), &part, &BTreeMap::new())?;
    }
    let index = serde_json::json!({ "weight_map": map }).to_string();
    std::fs::write(sharded.join("model.safetensors.index.json"), index)?;
    // Left over from a download, of no use.
    std::fs::write(sharded.join("optimizer.bin"), "x")?;
    std::fs::write(sharded.join(".partial"), "x")?;

    let options = in_format(&options, WeightFormat::Int4);
    convert_lmm(&sharded, &options, &out, false)?;
    let mut names: Vec<_> = std::fs::read_dir(&out)?
        .map(|e| Ok(e?.file_name().into_string()))
        .collect::<std::io::Result<Vec<_>>>()?;
    names.retain(|name| name.as_ref().is_ok_and(|name| !name.contains("token") && !name.contains("config")));
    names.sort();
    let expected = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ];
    assert_eq!(names, expected.map(|name| Ok(name.to_owned())));
    assert!(numbers(&model, &options)? == numbers(&out, &options)?);
    // One shard of another conversion.
    let other = folder.path().join("other");
    convert_lmm(&sharded, &in_format(&options, WeightFormat::Int8), &other, false)?;
    std::fs::copy(other.join(expected[1]), out.join(expected[1]))?;
    let error = stored_format(&out).unwrap_err().to_string();
    assert!(error.contains("different formats"), "{error}");
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused_with_a_hint() -> TestResult {
    let (model, options) = llava()?;
    let folder = tempfile::tempdir()?;
    let (out, again) = (folder.path().join("out"), folder.path().join("again"));
    let int4 = in_format(&options, WeightFormat::Int4);
    convert_lmm(&model, &int4, &out, false)?;
    let refused = |result: flmm::Result<()>, parts: &[&str]| {
        let error = result.unwrap_err();
        let text = format!("{error} hint: {}", error.hint().unwrap_or_default());
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    };
    // Asked for in another format than it has.
    for weights in [WeightFormat::AsLoaded, WeightFormat::Int8] {
        let open = |options: &OpenOptions| lmm::open_with(&out, options).map(drop);
        refused(open(&in_format(&options, weights)), &["converted to int4", "--dtype int4"]);
        refused(in_format(&options, weights).check_folder(&out), &["converted to int4", "--dtype int4"]);
    }
    refused(
        lmm::open(&out, DType::F32, &Device::Cpu).map(drop),
        &["converted to int4, and f32 is asked for", "--dtype int4"],
    );
    // Converted twice, into itself, over something.
    let convert = |from: &Path, to: &Path| convert_lmm(from, &int4, to, false).map(drop);
    refused(convert(&out, &again), &["was converted to int4 before", "as published"]);
    refused(convert_lmm(&model, &int4, &model, true).map(drop), &["its own folder"]);
    refused(convert(&model, &out), &["is not empty", "--force"]);
    refused(convert_lmm(&model, &options_f32(&options), &again, false).map(drop), &["bf16"]);
    convert_lmm(&model, &int4, &out, true)?;
    assert!(!again.exists());
    // Written by a later program, or damaged.
    let file = out.join("model.safetensors");
    let tensors: BTreeMap<_, _> =
        load_safetensors(std::slice::from_ref(&file), None, &Device::Cpu)?.into_iter().collect();
    let mut metadata = safetensors_metadata(&file)?;
    metadata.insert("flmm_weights_version".to_owned(), "2".to_owned());
    save_safetensors(&file, &tensors, &metadata)?;
    refused(lmm::open_with(&out, &int4).map(drop), &["`int4`, version 2", "flmm convert lmm"]);
    metadata.insert("flmm_weights_version".to_owned(), "1".to_owned());
    let name = tensors.keys().find(|name| name.ends_with(".scales")).ok_or("no scales")?.clone();
    let without: BTreeMap<_, _> = tensors.into_iter().filter(|(other, _)| *other != name).collect();
    save_safetensors(&file, &without, &metadata)?;
    refused(lmm::open_with(&out, &int4).map(drop), &[name.as_str(), "is missing"]);
    Ok(())
}

fn options_f32(options: &OpenOptions) -> OpenOptions {
    OpenOptions { dtype: DType::F32, weights: WeightFormat::AsLoaded, ..options.clone() }
}

#[test]
fn values_that_are_not_finite_are_refused() -> TestResult {
    let (model, options) = llava()?;
    let folder = tempfile::tempdir()?;
    let (broken, out) = (folder.path().join("broken"), folder.path().join("out"));
    std::fs::create_dir(&broken)?;
    for entry in std::fs::read_dir(&model)? {
        let path = entry?.path();
        std::fs::copy(&path, broken.join(path.file_name().unwrap_or_default()))?;
    }
    let mut tensors: BTreeMap<String, Tensor> =
        load_checkpoint(&model, None, &Device::Cpu)?.into_iter().collect();
    let name = tensors.keys().find(|name| name.ends_with("q_proj.weight")).ok_or("no q_proj")?.clone();
    let tensor = (tensors[&name].clone() * f64::NAN)?;
    tensors.insert(name.clone(), tensor);
    save_safetensors(broken.join("model.safetensors"), &tensors, &BTreeMap::new())?;
    let error = convert_lmm(&broken, &in_format(&options, WeightFormat::Int8), &out, false).unwrap_err();
    assert!(error.to_string().contains(&name) && error.to_string().contains("not finite"), "{error}");
    assert_eq!(std::fs::read_dir(folder.path())?.count(), 1, "nothing is left behind");
    Ok(())
}
