//! A written world read back by the readers of the real data.

use flmm_data::gcg::Gcg;
use flmm_data::grefcoco::GrefCoco;
use flmm_data::narratives::Narratives;
use flmm_data::reasonseg::{self, Reasoning};
use flmm_data::refcoco::{RefCoco, TextMode};
use flmm_data::viscot;
use flmm_data::world::{Level, Scene, SegmentRef, Split, WorldConfig, generate, write};
use sha2::{Digest, Sha256};
use std::path::Path;

const COUNT: u64 = 12;

fn written(split: Split, level: Level, seed: u64) -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("world");
    write(&out, split, COUNT, seed, level, &|_| {}).unwrap();
    (folder, out)
}

/// Scene of an image id, which counts from 1 within its split.
fn scene(level: Level, split: Split, seed: u64, image_id: u64) -> Scene {
    generate(&WorldConfig::new(level), split, seed, image_id % 10_000_000 - 1)
}

fn digest(folder: &Path) -> Vec<u8> {
    let mut hash = Sha256::new();
    let mut open = vec![folder.to_owned()];
    while let Some(path) = open.pop() {
        let mut inside: Vec<_> =
            std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()).collect();
        inside.sort();
        for path in inside {
            if path.is_dir() {
                open.push(path);
            } else {
                hash.update(path.strip_prefix(folder).unwrap().to_str().unwrap());
                hash.update(std::fs::read(&path).unwrap());
            }
        }
    }
    hash.finalize().to_vec()
}

#[test]
fn the_same_settings_give_the_same_bytes() {
    let (_a, first) = written(Split::Val, Level::Two, 7);
    let (_b, second) = written(Split::Val, Level::Two, 7);
    let (_c, other) = written(Split::Val, Level::Two, 8);
    assert_eq!(digest(&first), digest(&second));
    assert_ne!(digest(&first), digest(&other));
}

#[test]
fn narratives_and_panoptic_masks_come_back() {
    let (_folder, out) = written(Split::Train, Level::Two, 1);
    let narratives = Narratives::open_split(&out, "train2017").unwrap();
    assert_eq!(narratives.len() as u64, 2 * COUNT);
    for index in 0..narratives.len() {
        let sample = narratives.sample(index).unwrap();
        let scene = scene(Level::Two, Split::Train, 1, sample.image_id);
        let narration = &scene.texts.narrations[index % 2];
        let text: String = sample.utterances.iter().map(|(words, _)| words.as_str()).collect();
        assert_eq!(text, narration.text());
        let phrases = narration.segments.iter().filter(|segment| segment.noun);
        for (phrase, segment) in sample.phrases.iter().zip(phrases) {
            assert_eq!(phrase.plural, segment.plural);
            let stuff = matches!(segment.segments[0], SegmentRef::Stuff(_));
            assert_eq!(phrase.is_thing, !stuff);
            for (at, &inside) in phrase.mask.data.iter().enumerate() {
                let expected = segment.segments.iter().any(|segment| match *segment {
                    SegmentRef::Object(i) => scene.objects[i].mask.data[at],
                    SegmentRef::Stuff(i) => scene.stuff[i].mask.data[at],
                });
                assert_eq!(inside, expected, "{text}");
            }
        }
        assert!(out.join("coco/train2017").join(&sample.file_name).is_file());
    }
}

#[test]
fn references_come_back() {
    let (_folder, out) = written(Split::Test, Level::Two, 2);
    let mut objects = 0;
    for (dataset, split) in
        [("refcoco", "testA"), ("refcoco", "testB"), ("refcoco+", "testA"), ("refcocog", "test")]
    {
        let data = RefCoco::open_split(&out, dataset, split).unwrap();
        for image in &data.images {
            let scene = scene(Level::Two, Split::Test, 2, image.image_id);
            assert!(out.join("coco/train2014").join(&image.file_name).is_file());
            assert_eq!(image.size, [scene.image.height(), scene.image.width()]);
            for (text, index) in image.expressions(TextMode::Original) {
                let object = (image.objects[index].ann_id % 16) as usize;
                let referring = scene.texts.referring.iter().find(|r| r.target == object).unwrap();
                assert!(referring.text == text || referring.alternatives.contains(&text), "{text}");
                assert_eq!(data.mask(image, index).unwrap(), scene.objects[object].mask);
                assert!(dataset != "refcoco+" || !text.contains(" left"), "{text}");
                objects += 1;
            }
            let drawn = |seed| image.expressions(TextMode::Random(seed));
            assert_eq!(drawn(3), drawn(3));
            assert_eq!(drawn(3).len(), image.objects.len());
        }
    }
    assert!(objects > 50, "{objects}");
}

#[test]
fn groups_come_back() {
    let (_folder, out) = written(Split::Val, Level::Two, 3);
    let data = GrefCoco::open_split(&out, "val").unwrap();
    let mut kinds = [0; 3];
    for sample in &data.samples {
        let scene = scene(Level::Two, Split::Val, 3, sample.image_id);
        let masks = data.masks(sample).unwrap();
        kinds[masks.len()] += 1;
        for (ann_id, mask) in sample.targets.iter().zip(&masks) {
            let object = &scene.objects[(ann_id % 16) as usize];
            assert_eq!(hotcoco::mask::area(mask), u64::from(object.mask.area()));
            let referring =
                scene.texts.referring.iter().find(|r| r.target == (ann_id % 16) as usize).unwrap();
            assert!(sample.text.contains(&referring.text), "{}", sample.text);
        }
    }
    assert!(kinds.iter().all(|count| *count > 2), "{kinds:?}");
}

#[test]
fn reasoning_captions_and_chains_come_back() {
    let (_folder, out) = written(Split::Val, Level::One, 3);
    let files = reasonseg::list(&out.join("ReasonSeg/val")).unwrap();
    assert!(files.len() as u64 > COUNT);
    for path in files {
        let reasoning = Reasoning::read(&path).unwrap();
        let stem = path.file_stem().unwrap().to_str().unwrap();
        let (id, kind) = stem.split_once('_').unwrap();
        let scene = scene(Level::One, Split::Val, 3, id.parse().unwrap());
        assert_eq!(reasoning.is_sentence, kind == "long");
        let truth = reasoning.ground_truth(scene.image.height(), scene.image.width());
        assert_eq!(truth.ignore.area(), 0);
        let target = if kind == "long" {
            let asked = scene.texts.reasoning.iter().find(|q| q.question == reasoning.instruction()).unwrap();
            let SegmentRef::Object(index) = asked.links[0].segments[0] else { panic!() };
            index
        } else {
            scene.texts.referring[0].target
        };
        // Polygons close holes, so the mask can only grow, and only a little.
        let mask = &scene.objects[target].mask;
        assert!(
            mask.data.iter().zip(&truth.foreground.data).all(|(exact, polygon)| !exact || *polygon),
            "{stem}"
        );
        assert!(f64::from(truth.foreground.area()) < 1.25 * f64::from(mask.area()), "{stem}");
        assert!(path.with_extension("jpg").is_file());
    }
    let gcg = Gcg::open_split(&out, "val").unwrap();
    assert_eq!(gcg.samples.len() as u64, COUNT);
    for sample in &gcg.samples {
        let masks = gcg.masks(sample).unwrap();
        assert_eq!(masks.len(), sample.phrases.len());
        assert!(masks.iter().all(|mask| mask.area() > 0));
        assert!(sample.phrases.iter().all(|phrase| sample.caption.contains(phrase.as_str())));
        let (w, h) =
            image::image_dimensions(out.join(format!("GranDf/images/{}.jpg", sample.image_id))).unwrap();
        assert_eq!(sample.size, [h, w]);
    }
    let questions = viscot::read(&out.join("viscot/world.json")).unwrap();
    assert!(questions.len() as u64 > COUNT / 2);
    for question in questions {
        assert!(question.question.ends_with('?') && !question.question.contains("bounding box"));
        assert!(!question.answer.is_empty() && question.box_in_image[2] > question.box_in_image[0]);
        assert!(out.join("viscot").join(&question.image).is_file());
    }
}

#[test]
fn nothing_but_the_same_world_is_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("world");
    let write = |count, seed| write(&out, Split::Train, count, seed, Level::One, &|_| {});
    write(2, 1).unwrap();
    write(2, 1).unwrap();
    let before = digest(&out);
    let error = write(2, 2).unwrap_err();
    assert!(error.to_string().contains("--seed 1"), "{error}");
    assert!(error.hint().is_some());
    assert!(write(0, 1).is_err());
    assert_eq!(digest(&out), before);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary folder stays behind");

    let other = folder.path().join("mine");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("notes.txt"), "keep").unwrap();
    assert!(flmm_data::world::write(&other, Split::Train, 1, 1, Level::One, &|_| {}).is_err());
    assert_eq!(std::fs::read_to_string(other.join("notes.txt")).unwrap(), "keep");
}

#[test]
fn damaged_files_are_explained() {
    let (_folder, out) = written(Split::Train, Level::One, 4);
    let coco = out.join("coco");
    let png = std::fs::read_dir(coco.join("annotations/panoptic_train2017"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    std::fs::write(&png, b"no picture").unwrap();
    let narratives = Narratives::open_split(&out, "train2017").unwrap();
    let failures: Vec<String> =
        (0..narratives.len()).filter_map(|i| Some(narratives.sample(i).err()?.to_string())).collect();
    assert_eq!(failures.len(), 2, "{failures:?}");
    assert!(failures[0].contains(png.file_name().unwrap().to_str().unwrap()), "{failures:?}");
    assert!(narratives.sample(10_000).is_err());

    let error = |dataset, split| RefCoco::open_split(&out, dataset, split).err().unwrap().to_string();
    assert!(error("refcoco", "testA").contains("testA"));
    let pickle = coco.join("refcoco/refs(unc).p");
    let bytes = std::fs::read(&pickle).unwrap();
    std::fs::write(&pickle, &bytes[..bytes.len() / 2]).unwrap();
    assert!(error("refcoco", "train").contains("refs(unc).p"));
    // A pickle that would call something.
    std::fs::write(&pickle, b"cos\nsystem\n(S'true'\ntR.").unwrap();
    assert!(error("refcoco", "train").contains("not a pickled reference list"));
    std::fs::write(coco.join("refcoco+/instances.json"), b"{\"images\": 3}").unwrap();
    assert!(error("refcoco+", "train").contains("instances.json"));
}
