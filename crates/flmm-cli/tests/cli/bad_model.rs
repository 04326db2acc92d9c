//! Models that cannot be opened: the error names what is wrong, nothing is written.

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::{Device, Tensor};
use insta::assert_snapshot;

use crate::support::{Place, Ran, copy_folder, fixture, model_with};

/// A copy of the model of random weights that can be damaged.
fn copy(place: &Place) -> PathBuf {
    let folder = place.path("model");
    copy_folder(&fixture("lmm/llava15/model"), &folder);
    folder
}

fn open(place: &Place) -> Ran {
    let ran = place.command(&["inspect", "model"]).args(model_with(&place.path("model"))).output().unwrap();
    place.ran(ran)
}

/// Changes the tensors of the model's file.
fn edit(place: &Place, change: impl FnOnce(&mut BTreeMap<String, Tensor>)) {
    let file = copy(place).join("model.safetensors");
    let read = flmm::weights::load_safetensors(std::slice::from_ref(&file), None, &Device::Cpu).unwrap();
    let mut tensors: BTreeMap<String, Tensor> = read.into_iter().collect();
    change(&mut tensors);
    flmm::weights::save_safetensors(&file, &tensors, &BTreeMap::new()).unwrap();
}

#[track_caller]
fn refused(ran: &Ran) -> &str {
    assert_eq!((ran.status, ran.out.as_str()), (1, ""), "{}", ran.err);
    &ran.err
}

const TENSOR: &str = "language_model.model.layers.0.mlp.up_proj.weight";

#[test]
fn a_missing_tensor_is_named() {
    let place = Place::new();
    edit(&place, |tensors| assert!(tensors.remove(TENSOR).is_some()));
    assert_snapshot!(refused(&open(&place)));
}

#[test]
fn a_tensor_of_another_shape_is_named_with_both_shapes() {
    let place = Place::new();
    edit(&place, |tensors| {
        let other = tensors[TENSOR].narrow(0, 0, 7).unwrap().contiguous().unwrap();
        tensors.insert(TENSOR.into(), other);
    });
    assert_snapshot!(refused(&open(&place)));
}

#[test]
fn a_truncated_file_is_named() {
    let place = Place::new();
    let file = copy(&place).join("model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() - 1000]).unwrap();
    assert_snapshot!(refused(&open(&place)));
}

#[test]
fn an_unknown_type_is_answered_with_the_known_ones() {
    let place = Place::new();
    let file = copy(&place).join("config.json");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("\"model_type\": \"llava\"", "\"model_type\": \"eyeball\"")).unwrap();
    let ran = open(&place);
    let error = refused(&ran);
    assert!(error.contains("`eyeball`") && error.contains("llava") && error.contains("hint: "), "{error}");
}

#[test]
fn a_model_that_is_no_bundle_needs_its_parts() {
    let place = Place::new();
    let lmm = fixture("lmm/llava15/model").display().to_string();
    let ran = place.run(&["inspect", "model", "--model", &lmm]);
    assert_eq!((ran.status, ran.out.as_str()), (2, ""));
    assert_snapshot!("model_without_parts", ran.err);
    let ran = place.run(&["inspect", "model", "--model", "none", "--sam", "none", "--head", "none"]);
    assert_eq!((ran.status, ran.out.as_str()), (2, ""));
    assert_snapshot!("model_absent", ran.err);
}

#[test]
fn a_head_of_another_model_is_refused() {
    let place = Place::new();
    let head = fixture("lmm/llava15/model/model.safetensors").display().to_string();
    let lmm = fixture("lmm/llava15/model").display().to_string();
    let sam = fixture("lmm/_sam/sam_vit_tiny.pth").display().to_string();
    let ran = place.run(&["inspect", "model", "--model", &lmm, "--sam", &sam, "--head", &head]);
    assert!(refused(&ran).contains("language_model.model.layers.0"), "{}", ran.err);
}
