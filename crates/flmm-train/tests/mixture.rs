//! The mixture on a world: what is drawn, replaced, left out, and how samples are called.

use std::collections::HashSet;
use std::path::Path;

use flmm::lmm::{GROUNDING_INSTRUCTION, llava::LLAVA_1_5_7B, llava_next::LLAVA_NEXT_VICUNA_7B};
use flmm::text::tokenizer::Tokenizer;
use flmm_data::narratives::Narrative;
use flmm_data::world::{self, Level, Split};
use flmm_train::mixture::{EmptyNarratives, Expressions, Instruction};
use flmm_train::{DataConfig, Dataset, LabelledText, Mixture};

fn tokenizer() -> Tokenizer {
    Tokenizer::load(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/flmm-tiny/lmm")).unwrap()
}

fn world(count: u64) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    world::write(&dir.path().join("w"), Split::Train, count, 3, Level::One, &|_| {}).unwrap();
    dir
}

fn open(dir: &tempfile::TempDir, config: &DataConfig) -> Mixture {
    Mixture::open(&dir.path().join("w"), "train", config, 7).unwrap()
}

fn texts(mixture: &Mixture, epoch: u64) -> Vec<LabelledText> {
    let tokenizer = tokenizer();
    (0..mixture.len()).map(|i| mixture.text(i, epoch, &tokenizer, &LLAVA_1_5_7B).unwrap()).collect()
}

fn words(text: &LabelledText) -> String {
    text.pieces.iter().map(|(piece, _)| piece.as_str()).collect()
}

#[test]
fn a_world_gives_every_part_with_masks_for_every_phrase() {
    let dir = world(6);
    let mixture = open(&dir, &DataConfig::default());
    assert_eq!(mixture.parts().iter().map(|(dataset, _)| *dataset).collect::<Vec<_>>(), Dataset::ALL);
    let all = texts(&mixture, 0);
    for (index, text) in all.iter().enumerate() {
        assert_eq!(text.key, mixture.key(index, 0));
        assert_eq!(text.caption.phrases().unwrap().len(), text.masks.len(), "{}", text.key);
        assert!(dir.path().join("w").join(&text.picture).is_file(), "{}", text.picture);
        assert!(text.masks.iter().all(|mask| [mask.height, mask.width] == text.size));
        assert_eq!(text.is_narrative, text.key.starts_with("png/train/"));
    }
    let keys: HashSet<&String> = all.iter().map(|text| &text.key).collect();
    assert_eq!(keys.len(), all.len());
}

#[test]
fn expressions_are_drawn_once_or_for_every_epoch() {
    let dir = world(12);
    let config =
        |expressions| DataConfig { datasets: vec![Dataset::RefCoco], expressions, ..DataConfig::default() };
    let all = |expressions, epoch| {
        let mixture = open(&dir, &config(expressions));
        let texts = texts(&mixture, epoch);
        (texts.iter().map(words).collect::<Vec<_>>(), texts[0].key.clone())
    };
    assert_eq!(all(Expressions::Once, 0), all(Expressions::Once, 5));
    assert_ne!(all(Expressions::Once, 0).0, all(Expressions::First, 0).0);
    assert_ne!(all(Expressions::PerEpoch, 0).0, all(Expressions::PerEpoch, 1).0);
    // Equal keys, equal samples.
    assert_ne!(all(Expressions::PerEpoch, 0).1, all(Expressions::PerEpoch, 1).1);
    assert_eq!(all(Expressions::PerEpoch, 1), all(Expressions::PerEpoch, 1));
}

#[test]
fn narratives_without_phrases_are_replaced_dropped_or_kept() {
    let dir = world(8);
    let file = dir.path().join("w/coco/annotations/png_coco_train2017.json");
    let mut narratives: Vec<Narrative> = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    for segment in &mut narratives[2].segments {
        segment.segment_ids.clear();
    }
    std::fs::write(&file, serde_json::to_vec(&narratives).unwrap()).unwrap();
    let mixture = |empty_narratives| {
        open(&dir, &DataConfig { datasets: vec![Dataset::Png], empty_narratives, ..DataConfig::default() })
    };
    let replaced = mixture(EmptyNarratives::Replace);
    assert_eq!(replaced.len(), narratives.len());
    let drawn: HashSet<String> = (0..20).map(|epoch| replaced.key(2, epoch)).collect();
    assert!(drawn.len() > 3 && !drawn.contains("png/train/2"), "{drawn:?}");
    for epoch in 0..3 {
        let text = &texts(&replaced, epoch)[2];
        assert_eq!((text.key.clone(), text.masks.is_empty()), (replaced.key(2, epoch), false));
    }
    assert_eq!(mixture(EmptyNarratives::Drop).len(), narratives.len() - 1);
    let kept = &texts(&mixture(EmptyNarratives::Keep), 0)[2];
    assert!(kept.masks.is_empty() && kept.caption.mask_ids.iter().all(|&id| id == -1));
}

#[test]
fn pictures_can_be_left_out_and_parts_cut() {
    let dir = world(6);
    let config = DataConfig::default();
    let (whole, first) = (open(&dir, &config), texts(&open(&dir, &config), 0)[0].picture.clone());
    let id: u64 = first.rsplit('/').next().unwrap().trim_end_matches(".jpg").parse().unwrap();
    let list = dir.path().join("ids.txt");
    std::fs::write(&list, format!("# not these\n{id}\n\n")).unwrap();
    let left = open(&dir, &DataConfig { exclude: Some(list.clone()), ..config.clone() });
    assert!(left.len() < whole.len());
    assert!(texts(&left, 0).iter().all(|text| !text.picture.contains(&format!("{id:012}"))));
    let cut = open(&dir, &DataConfig { limit: Some(2), ..config.clone() });
    assert!(cut.parts().iter().all(|(_, len)| *len == 2));
    std::fs::write(&list, "5\nx\n").unwrap();
    let root = dir.path().join("w");
    let error =
        Mixture::open(&root, "train", &DataConfig { exclude: Some(list), ..config }, 0).err().unwrap();
    assert!(error.to_string().contains("line 2: `x`"), "{error}");
}

#[test]
fn llava_1_6_is_asked_another_question_in_training() {
    let dir = world(2);
    let mixture =
        |narrative_instruction| open(&dir, &DataConfig { narrative_instruction, ..DataConfig::default() });
    let published = mixture(Instruction::Published);
    assert_eq!(published.narrative_instruction(&LLAVA_NEXT_VICUNA_7B), "What is shown in this image?");
    assert_eq!(published.narrative_instruction(&LLAVA_1_5_7B), GROUNDING_INSTRUCTION);
    let common = mixture(Instruction::Common);
    assert_eq!(common.narrative_instruction(&LLAVA_NEXT_VICUNA_7B), GROUNDING_INSTRUCTION);
}
