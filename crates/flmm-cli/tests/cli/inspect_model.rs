//! `flmm inspect model PATH`.

use insta::assert_snapshot;

use crate::support::{Place, copy_folder, fixture};

fn path(name: &str) -> String {
    fixture(name).display().to_string()
}

#[test]
fn parts_are_told_apart() {
    let place = Place::new();
    let inspect = |what: &str| place.run(&["inspect", "model", what]);
    assert_snapshot!("lmm", inspect(&path("lmm/llava15/model")).ok());
    assert_snapshot!("sam", inspect(&path("lmm/_sam/sam_vit_tiny.pth")).ok());
    assert_snapshot!("head", inspect(&path("lmm/llava15/heads.pth")).ok());
    let published = inspect(&path("lmm/llava15_336/heads.safetensors"));
    assert!(published.ok().contains("grounding head"));
    let verbose = place.run(&["inspect", "model", &path("lmm/llava15/heads.pth"), "-v"]);
    assert!(verbose.ok().contains("text_proj.weight") && verbose.out.contains("[32, 48]"), "{}", verbose.out);
    // A SAM under the names of `transformers`.
    let tensor = candle_core::Tensor::zeros(1, candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
    let named = std::collections::BTreeMap::from([("vision_encoder.pos_embed".to_owned(), tensor)]);
    flmm::weights::save_safetensors(place.path("sam.safetensors"), &named, &Default::default()).unwrap();
    let ran = inspect("sam.safetensors");
    assert!(!ran.out.contains("those of no LMM, SAM or grounding head"), "{} {}", ran.out, ran.err);
    let unknown = inspect(&path("unet_head/small_c12_cases.safetensors"));
    assert!(unknown.ok().contains("unknown"), "{}", unknown.out);
}

#[test]
fn what_is_missing_is_listed() {
    let place = Place::new();
    copy_folder(&fixture("lmm/llava15/model"), &place.path("model"));
    let file = place.path("model/model.safetensors");
    let read = flmm::weights::load_checkpoint(&file, None, &candle_core::Device::Cpu).unwrap();
    let mut tensors: std::collections::BTreeMap<_, _> = read.into_iter().collect();
    let moved = tensors.remove("language_model.model.norm.weight").unwrap();
    tensors.insert("language_model.model.another.weight".into(), moved);
    flmm::weights::save_safetensors(&file, &tensors, &Default::default()).unwrap();
    let ran = place.run(&["inspect", "model", "model", "--json"]);
    let json: serde_json::Value = serde_json::from_str(ran.ok()).unwrap();
    assert_eq!(
        json["missing"][0],
        "tensor `language_model.model.norm.weight` is missing: expected shape [48]"
    );
    assert_eq!(json["unused"][0], "language_model.model.another.weight");
    assert_eq!(json["fitting_head"], serde_json::json!({ "channels": 8, "layers": 2, "hidden_size": 48 }));
    // Without its tokenizer it cannot be opened; the tensors are still told.
    std::fs::remove_file(place.path("model/tokenizer.json")).unwrap();
    let ran = place.run(&["inspect", "model", "model"]);
    assert!(ran.ok().contains("cannot_be_opened") && ran.out.contains("tokenizer.json"), "{}", ran.out);
}

#[test]
fn a_bundle_is_told_part_by_part() {
    let place = Place::new();
    copy_folder(&fixture("lmm/llava15/model"), &place.path("bundle/lmm"));
    std::fs::create_dir_all(place.path("bundle/sam")).unwrap();
    for name in ["sam_vit_tiny.pth", "sam_config.json"] {
        std::fs::copy(fixture("lmm/_sam").join(name), place.path("bundle/sam").join(name)).unwrap();
    }
    let ran = place.run(&["inspect", "model", "bundle", "--json"]);
    let json: serde_json::Value = serde_json::from_str(ran.ok()).unwrap();
    assert_eq!(
        (&json["kind"], &json["parts"][0]["kind"], &json["parts"][1]["kind"]),
        (&"bundle".into(), &"LMM".into(), &"SAM".into())
    );
}

#[test]
fn what_is_no_model_is_refused() {
    let place = Place::new();
    std::fs::create_dir(place.path("empty")).unwrap();
    for (name, status) in [("empty", 1), ("a.png", 1), ("none", 2)] {
        let ran = place.run(&["inspect", "model", name]);
        assert_eq!((ran.status, ran.out.as_str()), (status, ""), "{name}");
        assert_snapshot!(format!("refused_{name}"), ran.err);
    }
}
