//! Samples of the miniature trees: prompts, tokens, phrases and masks exactly as recorded.

#[path = "../../flmm-data/tests/common/mod.rs"]
mod common;

use std::path::{Path, PathBuf};

use candle_core::Tensor;
use flmm::Geometry;
use flmm::grounder::Caption;
use flmm::lmm::{GROUNDING_INSTRUCTION, Turn, llava};
use flmm::nn::nearest;
use flmm::text::chat::{ChatFormat, MODELS};
use flmm::text::tokenizer::Tokenizer;
use flmm::vision::anyres::{AnyResProcessor, PINPOINTS};
use flmm::vision::preprocess::{LlavaProcessor, Normalisation, SizeRule, pad_to_square};
use flmm_data::Mask;
use flmm_data::coco::Segmentation;
use flmm_data::refcoco::{RefCoco, TextMode};
use flmm_train::mixture::EmptyNarratives;
use flmm_train::text::expressions;
use flmm_train::{DataConfig, Dataset, LabelledText, Mixture, stacked};
use image::RgbImage;
use serde_json::{Value, json};

/// The case, if it comes with its tokenizers: `fixtures/` has the tree alone.
fn case() -> Option<(PathBuf, Value)> {
    let folder = common::golden_dir("datasets").filter(|folder| folder.join("tokenizers").is_dir())?;
    let text = std::fs::read_to_string(folder.join("expected.json")).unwrap();
    Some((folder, serde_json::from_str(&text).unwrap()))
}

/// A model as far as samples depend on it: tokenizer, prompt format, geometry.
struct Setup {
    tokenizer: Tokenizer,
    format: &'static ChatFormat,
    /// How often the image token is written in the prompt, and its id.
    copies: usize,
    image: u32,
    processor: String,
}

impl Setup {
    fn new(folder: &Path, prompt: &Value) -> Self {
        let text = |key: &str| prompt[key].as_str().unwrap().to_owned();
        let place = tempfile::tempdir().unwrap();
        std::fs::copy(folder.join(text("tokenizer")), place.path().join("tokenizer.json")).unwrap();
        let mut tokenizer = Tokenizer::load(place.path()).unwrap();
        let image = match prompt["image_token_added_at_start_up"].as_bool().unwrap() {
            true => tokenizer.add_special_token(&text("image_token")).unwrap(),
            false => tokenizer.id(&text("image_token")).unwrap(),
        };
        let wrapper = |format: &ChatFormat| format!("{}{{input}}{}", format.before, format.after);
        let fits = |format: &&'static ChatFormat| {
            wrapper(format) == text("template") && format.image == text("image_token")
        };
        let format = MODELS.iter().map(|(_, format)| *format).find(fits).expect("a known template");
        let ids = prompt["prompt_input_ids"].as_array().unwrap();
        let stands_for_image = |id: &&Value| **id == json!(-200) || **id == json!(image);
        let copies = ids.iter().filter(stands_for_image).count();
        Self { tokenizer, format, copies, image, processor: text("processor") }
    }

    fn geometry(&self, [height, width]: [u32; 2]) -> Geometry {
        let size = (height as usize, width as usize);
        let (name, side) =
            self.processor.split_at(self.processor.find(|c: char| c.is_ascii_digit()).unwrap_or(0));
        match (name, self.processor.as_str()) {
            ("llava", _) => {
                let processor =
                    LlavaProcessor::new(side.parse().unwrap(), SizeRule::MultiplyFirst, Normalisation::CLIP);
                processor.geometry(size).unwrap()
            }
            ("deepseek", _) => {
                let rule = SizeRule::DivideFirst { least: 14 };
                LlavaProcessor::new(side.parse().unwrap(), rule, Normalisation::HALF).geometry(size).unwrap()
            }
            (_, "llava_next") => AnyResProcessor::new(336, PINPOINTS.to_vec(), Normalisation::CLIP)
                .unwrap()
                .geometry(size)
                .unwrap(),
            (_, "pad2square") => pad_to_square(&RgbImage::new(width, height), [0; 3]).unwrap().1,
            other => panic!("unknown processor {other:?}"),
        }
    }

    /// Compares a sample with what is recorded of it.
    fn compare(&self, caption: &Caption, masks: &[Mask], size: [u32; 2], wanted: &Value, at: &str) {
        assert_eq!(json!(caption.token_ids), wanted["caption_ids"], "{at}");
        assert_eq!(json!(caption.mask_ids), wanted["mask_ids"], "{at}");
        assert_eq!(json!(size), wanted["image_sizes"], "{at}");
        assert_eq!(json!(masks.iter().map(Mask::area).collect::<Vec<_>>()), wanted["gt_areas"], "{at}");
        let geometry = self.geometry(size);
        let meta = &wanted["meta_data"];
        let pair = |value: (usize, usize)| json!({ "height": value.0, "width": value.1 });
        assert_eq!(pair(geometry.image_shape), meta["image_shape"], "{at}");
        assert_eq!(pair(geometry.padded_shape), meta["padded_shape"], "{at}");
        let before = (&meta["padding"]["before_height"], &meta["padding"]["before_width"]);
        assert_eq!((&json!(geometry.before.0), &json!(geometry.before.1)), before, "{at}");

        let (height, width) = geometry.image_shape;
        let resized = nearest(&stacked(masks, size).unwrap(), height, width).unwrap();
        assert_eq!(json!(resized.dims()), wanted["masks_shape"], "{at}");
        let resized = unstacked(&resized);
        let areas: Vec<u32> = resized.iter().map(Mask::area).collect();
        assert_eq!(json!(areas), wanted["mask_areas"], "{at}");
        if let Some(recorded) = wanted["masks_rle"].as_array() {
            let found = resized.iter().map(|mask| json!(Segmentation::compress(mask)));
            assert_eq!(found.collect::<Vec<_>>(), *recorded, "{at}");
        }
        let (y, x) = geometry.before;
        let padded = resized.iter().map(|mask| {
            let [left, top, width, height] = mask.bbox();
            if width == 0 {
                json!([0, 0, 0, 0])
            } else {
                json!([left + x as u32, top + y as u32, width, height])
            }
        });
        assert_eq!(padded.collect::<Vec<_>>(), *wanted["padded_bbox"].as_array().unwrap(), "{at}");
    }

    fn compare_text(&self, text: &LabelledText, wanted: &Value, at: &str) {
        self.compare(&text.caption, &text.masks, text.size, wanted, at);
    }
}

fn unstacked(masks: &Tensor) -> Vec<Mask> {
    let values = masks.to_vec3::<u8>().unwrap();
    let mask = |rows: &Vec<Vec<u8>>| {
        Mask::from_fn(rows[0].len() as u32, rows.len() as u32, |x, y| rows[y as usize][x as usize] != 0)
    };
    values.iter().map(mask).collect()
}

fn setups() -> Vec<(String, Setup, PathBuf, Value)> {
    let Some((folder, expected)) = case() else { return Vec::new() };
    let prompts = expected["prompts"].as_object().unwrap();
    prompts
        .iter()
        .map(|(name, prompt)| (name.clone(), Setup::new(&folder, prompt), folder.clone(), expected.clone()))
        .collect()
}

#[test]
fn goldens_datasets_prompts() {
    for (name, setup, _, expected) in setups() {
        let wanted = &expected["prompts"][&name];
        let turns = [Turn::user(GROUNDING_INSTRUCTION)];
        let prompt = setup.format.render(&turns, setup.copies).unwrap();
        let ids = setup.tokenizer.encode(&prompt, true).unwrap();
        let sentinel = wanted["prompt_input_ids"].as_array().unwrap().contains(&json!(-200));
        let ids: Vec<i64> = ids
            .into_iter()
            .map(|id| if sentinel && id == setup.image { -200 } else { i64::from(id) })
            .collect();
        assert_eq!(json!(ids), wanted["prompt_input_ids"], "{name}");
        let separator = Caption::from_expressions(&setup.tokenizer, ["a"]).unwrap().token_ids.pop();
        assert_eq!(json!(separator), wanted["separator_id"], "{name}");
    }
}

#[test]
fn goldens_datasets_narrative_samples() {
    let mut compared = 0;
    for (name, setup, folder, expected) in setups() {
        for (split, wanted) in expected["png"][&name].as_object().unwrap() {
            let split = ["train", "val"].into_iter().find(|known| split == &format!("{known}2017")).unwrap();
            let config = DataConfig {
                datasets: vec![Dataset::Png],
                empty_narratives: EmptyNarratives::Keep,
                ..DataConfig::default()
            };
            let mixture = Mixture::open(&folder.join("tree"), split, &config, 0).unwrap();
            let wanted = wanted.as_array().unwrap();
            assert_eq!(mixture.len(), wanted.len());
            for (index, wanted) in wanted.iter().enumerate() {
                let at = format!("{name} {split} {index}");
                let text = mixture.text(index, 0, &setup.tokenizer, &llava::LLAVA_1_5_7B).unwrap();
                assert_eq!(text.masks.is_empty(), wanted.is_null(), "{at}");
                if !wanted.is_null() {
                    setup.compare_text(&text, wanted, &at);
                    assert!(text.picture.ends_with(wanted["file_name"].as_str().unwrap()), "{at}");
                    assert_eq!(text.key, format!("png/{split}/{index}"));
                    compared += 1;
                }
            }
        }
    }
    assert!(compared > 0 || case().is_none());
}

#[test]
fn goldens_datasets_expression_samples() {
    let mut compared = 0;
    for (name, setup, folder, expected) in setups() {
        for (key, images) in expected["refcoco"][&name].as_object().unwrap() {
            let [dataset, split, mode, kind] = key.split('/').collect::<Vec<_>>()[..] else {
                panic!("{key}")
            };
            let mode = match mode {
                "select_first" => TextMode::SelectFirst,
                "original" => TextMode::Original,
                "concat" => TextMode::Concat,
                other => panic!("unknown text mode {other}"),
            };
            let data = RefCoco::open_split(&folder.join("tree"), dataset, split).unwrap();
            for image in &data.images {
                let at = format!("{name} {key} {}", image.image_id);
                let wanted = images[&image.image_id.to_string()]["samples"].as_array().unwrap();
                let text = expressions(&setup.tokenizer, &data, image, mode, at.clone()).unwrap();
                match kind {
                    "concat" => setup.compare_text(&text, &wanted[0], &at),
                    _ => {
                        // One sample for every expression.
                        let texts = image.expressions(mode);
                        assert_eq!(texts.len(), wanted.len(), "{at}");
                        for (((text_of, _), mask), wanted) in texts.iter().zip(&text.masks).zip(wanted) {
                            let caption =
                                Caption::from_expressions(&setup.tokenizer, [text_of.as_str()]).unwrap();
                            setup.compare(&caption, std::slice::from_ref(mask), image.size, wanted, &at);
                        }
                    }
                }
                compared += wanted.len();
            }
        }
    }
    assert!(compared > 0 || case().is_none());
}
