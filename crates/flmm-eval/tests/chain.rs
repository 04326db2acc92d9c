//! The visual chain of thought on every model of the registry, with small random weights and a random head.

#[path = "../../flmm-data/tests/common/mod.rs"]
mod common;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use flmm::grounder::{GroundingHead, HeadSizes, ModelPaths, overlay};
use flmm::image_input::read_image;
use flmm::lmm::{self, Lmm, OpenOptions};
use flmm::mask_head::{UNet, UNetConfig};
use flmm::sam::{Refiner, Sam, SamConfig};
use flmm::weights::{Params, load_checkpoint};
use flmm::{Grounder, Result};
use flmm_eval::viscot::chain::{Chain, Protocol, Variant, answer};
use image::RgbImage;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

const CPU: &Device = &Device::Cpu;

/// Folders of models, in order.
fn models() -> Vec<PathBuf> {
    let folder = common::golden_dir("lmm").unwrap();
    let mut found: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path().join("model")).collect();
    found.retain(|model| model.is_dir());
    found.sort();
    assert!(!found.is_empty(), "no model among the goldens");
    found
}

fn grounder(model: &Path) -> Result<Grounder> {
    let mut options = OpenOptions::new(DType::F32, CPU);
    // Vision towers with a repository of their own lie beside the model.
    for entry in std::fs::read_dir(model.parent().unwrap()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.starts_with("openai-clip") {
            options.vision_tower = Some(path);
        } else if name.starts_with("openclip-convnext") {
            options.vision_tower_aux = Some(path);
        }
    }
    // HPT's files do not tell the size of the picture.
    let recorded = std::fs::read(model.with_file_name("expected").join("a.f32.json")).unwrap();
    let recorded: serde_json::Value = serde_json::from_slice(&recorded).unwrap();
    let side = recorded["geometry"]["padded_shape"]["height"].as_u64();
    options.image_size = side.map(|side| side as usize);
    let lmm = lmm::open_with(model, &options)?;
    let sam = common::golden_dir("lmm/_sam").unwrap();
    let (config, file) = (sam.join("sam_config.json"), sam.join("sam_vit_tiny.pth"));
    let sam_tensors = load_checkpoint(&file, Some(DType::F32), CPU)?;
    let sizes = HeadSizes::of(lmm.as_ref(), SamConfig::from_file(&config)?);
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let unet = UNetConfig { in_channels: sizes.channels, base_channels: 8, input_size: 64 };
    let mut head: HashMap<String, Tensor> = HashMap::new();
    let named = UNet::init(&unet, &mut rng)?.into_iter().map(|(name, t)| (format!("mask_head.{name}"), t));
    head.extend(named);
    let refiner = Refiner::init(&sizes.sam, &mut rng)?.into_iter();
    head.extend(refiner.map(|(name, tensor)| (format!("sam.model.{name}"), tensor)));
    let width = sizes.sam.prompt_embed_dim;
    head.insert("text_proj.weight".into(), Tensor::zeros((width, sizes.hidden_size), DType::F32, CPU)?);
    head.insert("text_proj.bias".into(), Tensor::zeros(width, DType::F32, CPU)?);
    head.insert("text_layer_weights".into(), Tensor::zeros(sizes.layers, DType::F32, CPU)?);
    let params = Params::new(&file, overlay(&file, &sam_tensors, head)?);
    let head = GroundingHead::from_params(&sizes, &params)?;
    let sam = Sam::load(&sizes.sam, &params.pp("sam.model"))?;
    params.finish("")?;
    Ok(Grounder::from_parts(lmm, sam, head))
}

fn picture() -> RgbImage {
    let folder = common::golden_dir("lmm/llava15").unwrap().join("images");
    read_image(folder.join("a.png")).unwrap()
}

fn ask(grounder: &Grounder, variant: Variant, protocol: Protocol) -> Chain {
    let asked = ("What is on the left?", "\nAnswer the question using a single word or phrase.");
    answer(grounder, &picture(), asked, variant, &protocol, 5).unwrap()
}

#[test]
fn every_variant_runs_on_every_model() {
    for model in models() {
        let grounder = grounder(&model).unwrap();
        let name = model.display();
        let plain = ask(&grounder, Variant::V3, Protocol::default());
        let whole = [0, 0, picture().width(), picture().height()];
        assert_eq!((plain.box_in_image, plain.mask.is_none()), (whole, true), "{name}");
        for (variant, sam) in [(Variant::V1, false), (Variant::V1, true), (Variant::V2, false)] {
            let chain = ask(&grounder, variant, Protocol { sam, box_scale: 1.0 });
            let [x0, y0, x1, y1] = chain.box_in_image;
            assert!(x0 <= x1 && x1 <= whole[2] && y0 <= y1 && y1 <= whole[3], "{name}: {chain:?}");
            assert!(variant == Variant::V1 || chain.thought.is_empty(), "{name}");
            if let Some(mask) = &chain.mask {
                assert_eq!([mask.width() as u32, mask.height() as u32], whole[2..], "{name}");
            }
        }
    }
}

/// Without a trained head, masks come from attention and SAM alone.
#[test]
fn the_chain_needs_no_head() {
    let folder = common::golden_dir("lmm").unwrap();
    let paths = ModelPaths {
        model: folder.join("llava15/model"),
        sam: folder.join("_sam/sam_vit_tiny.pth"),
        head: None,
    };
    let grounder = Grounder::open(&paths, CPU, DType::F32).unwrap();
    let whole = (picture().width() as usize, picture().height() as usize);
    for (variant, sam) in [(Variant::V1, false), (Variant::V2, false), (Variant::V2, true)] {
        let chain = ask(&grounder, variant, Protocol { sam, box_scale: 1.0 });
        let mask = chain.mask.unwrap_or_else(|| panic!("{variant:?}, SAM {sam}: nothing was grounded"));
        assert_eq!((mask.width(), mask.height()), whole);
        assert!(sam || mask.area() > 0, "{variant:?}: an empty mask");
    }
}

/// The question's tokens are those of the instruction wrapper, and end where the question ends.
#[test]
fn the_question_is_grounded_behind_the_wrapper() {
    for model in models() {
        let grounder = grounder(&model).unwrap();
        let lmm: &dyn Lmm = grounder.lmm();
        let ids = flmm_eval::viscot::chain::wrapped(lmm, "What is on the left?").unwrap();
        let full =
            lmm.prompt(&[flmm::lmm::Turn::user("What is on the left?"), flmm::lmm::Turn::opening("")], 1);
        let full = full.unwrap();
        assert_eq!(ids.iter().filter(|&&id| id == lmm.image_token()).count(), 1, "{}", model.display());
        assert_eq!(full[..ids.len()], ids, "{}", model.display());
        let text = lmm.tokenizer().decode(&ids, false);
        assert!(text.trim_end().ends_with("left?"), "{}: {text:?}", model.display());
    }
}
