//! The world's promises: same seed same scene, masks that tile the picture, sentences that agree with the masks.

use flmm_data::world::{
    Level, Mask, Object, Question, QuestionKind, Scene, SegmentRef, Split, WorldConfig, affordances, classes,
    generate, stuff_classes, vocabulary_texts,
};
use proptest::prelude::*;
use std::collections::BTreeSet;

const NUMBERS: [&str; 7] = ["no", "one", "two", "three", "four", "five", "six"];

fn scene(level: u8, split: Split, seed: u64, index: u64) -> Scene {
    generate(&WorldConfig::new(Level::from_number(level).unwrap()), split, seed, index)
}

/// Objects that a noun phrase without article can mean: "dog", "dogs", "red books", "one red book", "two cats".
fn named(scene: &Scene, phrase: &str) -> Vec<usize> {
    let words: Vec<&str> = phrase.split(' ').filter(|word| !NUMBERS.contains(word)).collect();
    let (colour, noun) = match words[..] {
        [noun] => (None, noun),
        [colour, noun] => (Some(colour), noun),
        _ => panic!("not a noun phrase: {phrase}"),
    };
    let fits = |object: &Object| {
        [object.class().name, object.class().plural].contains(&noun)
            && colour.is_none_or(|word| object.colour.is_some_and(|c| c.name() == word))
    };
    (0..scene.objects.len()).filter(|&i| fits(&scene.objects[i])).collect()
}

fn only(scene: &Scene, phrase: &str) -> usize {
    let found = named(scene, phrase);
    assert_eq!(found.len(), 1, "\"the {phrase}\" is ambiguous");
    found[0]
}

/// Mean pixel of the mask relative to its box: the tests judge by box centres, as the world says it does.
fn centre(mask: &Mask) -> (f64, f64) {
    let [x, y, w, h] = mask.bbox().map(f64::from);
    (x + w / 2.0, y + h / 2.0)
}

fn holds(scene: &Scene, a: usize, words: &str, b: usize) -> bool {
    let ((ax, ay), (bx, by)) = (centre(&scene.objects[a].mask), centre(&scene.objects[b].mask));
    let (dx, dy) = (ax - bx, ay - by);
    match words {
        "to the left of" => dx < 0.0 && dx.abs() > dy.abs(),
        "to the right of" => dx > 0.0 && dx.abs() > dy.abs(),
        "above" => dy < 0.0 && dy.abs() > dx.abs(),
        "below" => dy > 0.0 && dy.abs() > dx.abs(),
        _ => panic!("unknown relation {words}"),
    }
}

fn split_relation(text: &str) -> (&str, &str, &str) {
    for words in ["to the left of", "to the right of", "above", "below"] {
        if let Some((a, b)) = text.split_once(&format!(" {words} the ")) {
            return (a.trim_end_matches(" is"), words, b);
        }
    }
    panic!("no relation in {text}")
}

fn strip<'a>(text: &'a str, start: &str, end: &str) -> &'a str {
    let inner = text.strip_prefix(start).and_then(|rest| rest.strip_suffix(end));
    inner.unwrap_or_else(|| panic!("{text:?} is not {start:?}…{end:?}"))
}

fn without_article(phrase: &str) -> &str {
    phrase.strip_prefix("an ").or_else(|| phrase.strip_prefix("a ")).unwrap_or(phrase)
}

/// Answers the question from the masks alone and compares with what the world says.
fn check(scene: &Scene, q: &Question) {
    let (question, answer) = (q.question.as_str(), q.answer.as_str());
    let context = format!("{question} -> {answer}");
    match q.kind {
        QuestionKind::Exist => {
            let what = without_article(strip(question, "Is there ", "?"));
            let stuff = scene.stuff.iter().any(|region| stuff_classes()[region.class].name == what);
            let yes = stuff || (what.split(' ').count() <= 2 && !named(scene, what).is_empty());
            assert_eq!(answer.starts_with("Yes, "), yes, "{context}");
            assert_eq!(answer.starts_with("No, "), !yes, "{context}");
        }
        QuestionKind::RelYesNo => {
            let (a, words, b) = split_relation(strip(question, "Is the ", "?"));
            let truth = holds(scene, only(scene, a), words, only(scene, b));
            assert_eq!(answer.starts_with("Yes, "), truth, "{context}");
            let statement = answer.split_once(", the ").unwrap().1;
            let (a, words, b) = split_relation(statement.trim_end_matches('.'));
            assert!(holds(scene, only(scene, a), words, only(scene, b)), "{context}");
        }
        QuestionKind::Count => {
            let what = strip(question, "How many ", " are there?");
            let number = NUMBERS.iter().position(|n| answer.contains(&format!(" {n} "))).expect("a number");
            assert_eq!(number, named(scene, what).len(), "{context}");
        }
        QuestionKind::Colour => {
            let what = only(scene, strip(question, "What colour is the ", "?"));
            assert!(
                answer.ends_with(&format!(" {}.", scene.objects[what].colour.unwrap().name())),
                "{context}"
            );
        }
        QuestionKind::Largest | QuestionKind::Smallest => {
            let word = if q.kind == QuestionKind::Largest { "largest" } else { "smallest" };
            let what = only(scene, strip(answer, "The ", &format!(" is the {word}.")));
            let area = scene.objects[what].mask.area();
            let areas =
                scene.objects.iter().enumerate().filter(|(i, _)| *i != what).map(|(_, o)| o.mask.area());
            let right = |other: u32| if word == "largest" { area > other } else { area < other };
            assert!(areas.into_iter().all(right), "{context}");
        }
        QuestionKind::Rel => {
            let (_, words, landmark) = split_relation(strip(question, "What is", "?"));
            let landmark = only(scene, landmark);
            let found: Vec<usize> = (0..scene.objects.len())
                .filter(|&a| a != landmark && holds(scene, a, words, landmark))
                .collect();
            if answer.starts_with("Nothing") {
                assert!(found.is_empty(), "{context}");
            } else {
                assert_eq!(found.len(), 1, "{context}");
                assert_eq!(q.links[0].segments, [SegmentRef::Object(found[0])], "{context}");
            }
        }
        QuestionKind::WhatIn | QuestionKind::Where => {
            let SegmentRef::Object(what) = q.links[0].segments[0] else { panic!("{context}") };
            let (x, y) = centre(&scene.objects[what].mask);
            let (x, y) = (x / f64::from(scene.image.width()), y / f64::from(scene.image.height()));
            for (word, true_if) in
                [("left", x < 0.4), ("right", x > 0.6), ("top", y < 0.4), ("bottom", y > 0.6)]
            {
                assert!(!answer.contains(word) || true_if, "{context}: centre {x} {y}");
            }
            assert!(
                !answer.contains("middle") || ((x - 0.5).abs() < 0.17 && (y - 0.5).abs() < 0.17),
                "{context}"
            );
        }
        QuestionKind::Reason => {
            let affordance = affordances(Level::Two).find(|a| a.question == question).expect("a known use");
            let fits: Vec<usize> = (0..scene.objects.len())
                .filter(|&i| affordance.applies(scene.objects[i].class) != Some(false))
                .collect();
            assert_eq!(
                q.links[0].segments,
                fits.into_iter().map(SegmentRef::Object).collect::<Vec<_>>(),
                "{context}"
            );
        }
        QuestionKind::WhatBackground => assert_eq!(q.links.len(), scene.stuff.len(), "{context}"),
        QuestionKind::List => {
            let mentioned: usize = q.links.iter().map(|link| link.segments.len()).sum();
            assert_eq!(mentioned, scene.objects.len(), "{context}");
        }
        QuestionKind::Which => {
            let what = only(scene, answer.strip_prefix("The ").unwrap().split(" is ").next().unwrap());
            assert_eq!(q.links[0].segments, [SegmentRef::Object(what)], "{context}");
        }
        QuestionKind::Behind => {
            let SegmentRef::Object(a) = q.links[0].segments[0] else { panic!("{context}") };
            let SegmentRef::Object(b) = q.links[1].segments[0] else { panic!("{context}") };
            assert_eq!(
                answer.contains("behind"),
                scene.objects[a].depth < scene.objects[b].depth,
                "{context}"
            );
        }
    }
    for link in &q.links {
        check_link(scene, &answer[link.range.clone()], &link.segments, &context);
        let noun = answer[link.range.clone()].rsplit(' ').next().unwrap();
        if link.from_image {
            assert!(
                !question.split(|c: char| !c.is_alphanumeric()).any(|word| word == noun),
                "{context}: {noun}"
            );
        }
    }
}

fn check_link(scene: &Scene, words: &str, segments: &[SegmentRef], context: &str) {
    assert!(!segments.is_empty(), "{context}");
    for segment in segments {
        match *segment {
            SegmentRef::Stuff(region) => {
                assert_eq!(words, stuff_classes()[scene.stuff[region].class].name, "{context}");
            }
            SegmentRef::Object(index) => {
                assert!(named(scene, words).contains(&index), "{context}: {words:?} is not object {index}");
            }
        }
    }
    if let Some(number) = NUMBERS.iter().position(|n| words.starts_with(&format!("{n} "))) {
        assert_eq!(number, segments.len(), "{context}");
    } else {
        assert_eq!(segments.len(), 1, "{context}");
    }
}

fn check_texts(scene: &Scene) {
    for question in scene.texts.questions.iter().chain(&scene.texts.reasoning) {
        check(scene, question);
    }
    for narration in &scene.texts.narrations {
        let text = narration.text();
        assert!(text.starts_with(|c: char| c.is_ascii_uppercase()) && text.ends_with('.'), "{text}");
        assert!(!text.contains("  ") && !text.contains(" ."), "{text}");
        let mut mentioned = BTreeSet::new();
        for segment in &narration.segments {
            assert_eq!(segment.noun, !segment.segments.is_empty());
            assert_eq!(segment.plural, segment.segments.len() > 1);
            if segment.noun {
                let words = segment.utterance.trim_start().to_lowercase();
                check_link(scene, &words, &segment.segments, &text);
                mentioned.extend(segment.segments.iter().map(|s| format!("{s:?}")));
            }
        }
        assert_eq!(
            mentioned.len(),
            scene.objects.len() + scene.stuff.len(),
            "everything is mentioned: {text}"
        );
    }
    for referring in &scene.texts.referring {
        for text in std::iter::once(&referring.text).chain(&referring.alternatives) {
            let words = text.strip_prefix("the ").expect("an article");
            if let Some(relation) = ["to the left of", "to the right of", "above", "below"]
                .into_iter()
                .find(|r| words.contains(&format!(" {r} the ")))
            {
                let (a, _, b) = split_relation(words);
                let landmark = only(scene, b);
                let found: Vec<usize> = named(scene, a)
                    .into_iter()
                    .filter(|&i| i != landmark && holds(scene, i, relation, landmark))
                    .collect();
                assert_eq!(found, [referring.target], "{text}");
            } else if !["top", "bottom", "left", "right", "middle", "larg", "small"]
                .iter()
                .any(|w| words.contains(w))
            {
                assert_eq!(only(scene, words), referring.target, "{text}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_scene_is_determined_by_its_number(level in 1u8..=2, seed in any::<u64>(), index in any::<u64>()) {
        let (a, b) = (scene(level, Split::Test, seed, index), scene(level, Split::Test, seed, index));
        prop_assert_eq!(a.image.as_raw(), b.image.as_raw());
        prop_assert_eq!(&a.texts.questions, &b.texts.questions);
        prop_assert_eq!(&a.texts.narrations, &b.texts.narrations);
        prop_assert_eq!(&a.texts.referring, &b.texts.referring);
        for other in [
            scene(level, Split::Train, seed, index),
            scene(level, Split::Test, seed.wrapping_add(1), index),
            scene(level, Split::Test, seed, index.wrapping_add(1)),
        ] {
            prop_assert_ne!(a.image.as_raw(), other.image.as_raw());
        }
    }

    #[test]
    fn masks_tile_the_picture(level in 1u8..=2, seed in any::<u64>(), index in 0u64..1000) {
        let scene = scene(level, Split::Train, seed, index);
        let (width, height) = scene.image.dimensions();
        let masks: Vec<&Mask> =
            scene.objects.iter().map(|o| &o.mask).chain(scene.stuff.iter().map(|s| &s.mask)).collect();
        for at in 0..(width * height) as usize {
            prop_assert_eq!(masks.iter().filter(|mask| mask.data[at]).count(), 1);
        }
        for (index, object) in scene.objects.iter().enumerate() {
            prop_assert_eq!((object.mask.width, object.mask.height), (width, height));
            prop_assert_eq!((object.area, object.bbox, object.depth), (object.mask.area(), object.mask.bbox(), index));
            prop_assert!(2 * object.area >= object.full_area && object.area <= object.full_area);
            prop_assert!(object.area > 30);
        }
    }

    #[test]
    fn sentences_agree_with_the_masks(level in 1u8..=2, seed in any::<u64>(), index in 0u64..1000) {
        check_texts(&scene(level, Split::Val, seed, index));
    }
}

#[test]
fn sizes_and_counts_follow_the_level() {
    let mut counts = [0; 7];
    let mut copies = 0;
    for index in 0..400 {
        let scene = scene(1, Split::Train, 3, index);
        counts[scene.objects.len()] += 1;
        let kinds: BTreeSet<usize> = scene.objects.iter().map(|object| object.class).collect();
        copies += usize::from(kinds.len() < scene.objects.len());
        let short = f64::from(scene.image.width().min(scene.image.height()));
        for object in &scene.objects {
            let side = f64::from(object.bbox[2].max(object.bbox[3])) / short;
            assert!((0.2..=0.60).contains(&side), "side {side}");
        }
    }
    assert_eq!(counts.iter().sum::<usize>(), counts[1] + counts[2] + counts[3]);
    assert!(counts[1..=3].iter().all(|&n| n > 60), "{counts:?}");
    let share = copies as f64 / (counts[2] + counts[3]) as f64;
    assert!((0.25..0.45).contains(&share), "copies in {share} of the scenes");
}

#[test]
fn the_number_of_objects_can_be_chosen() {
    let counts = |objects| -> BTreeSet<usize> {
        let config = WorldConfig { objects: Some(objects), ..WorldConfig::new(Level::Two) };
        (0..60).map(|index| generate(&config, Split::Train, 1, index).objects.len()).collect()
    };
    assert_eq!(counts([1, 1]), BTreeSet::from([1]));
    assert_eq!(counts([2, 3]), BTreeSet::from([2, 3]));
    assert_eq!(counts([0, 0]), BTreeSet::from([1]));
    assert!(counts([5, 900]).iter().all(|count| (1..=6).contains(count)));
}

#[test]
fn yes_and_no_are_balanced() {
    let (mut exist, mut relation) = ([0; 2], [0; 2]);
    for index in 0..400 {
        for question in &scene(1, Split::Train, 4, index).texts.questions {
            let yes = usize::from(question.answer.starts_with("Yes"));
            match question.kind {
                QuestionKind::Exist => exist[yes] += 1,
                QuestionKind::RelYesNo => relation[yes] += 1,
                _ => {}
            }
        }
    }
    assert_eq!(exist[0], exist[1]);
    let share = f64::from(relation[1]) / f64::from(relation[0] + relation[1]);
    assert!((0.4..0.6).contains(&share), "{relation:?}");
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty())
}

#[test]
fn the_vocabulary_covers_every_text() {
    for (level, most) in [(1, 250), (2, 420)] {
        let texts: Vec<String> = vocabulary_texts(Level::from_number(level).unwrap()).collect();
        let known: BTreeSet<&str> = texts.iter().flat_map(|text| words(text)).collect();
        assert!(known.len() < most, "level {level}: {} words", known.len());
        for index in 0..600 {
            let scene = scene(level, Split::Train, 5, index);
            let mut said: Vec<String> = Vec::new();
            for question in scene.texts.questions.iter().chain(&scene.texts.reasoning) {
                said.extend([question.question.clone(), question.answer.clone()]);
            }
            said.extend(scene.texts.narrations.iter().map(|narration| narration.text()));
            for referring in &scene.texts.referring {
                said.push(referring.text.clone());
                said.extend(referring.alternatives.iter().cloned());
            }
            for text in &said {
                for word in words(text) {
                    assert!(
                        known.contains(word),
                        "level {level}: {word:?} of {text:?} is not in the vocabulary"
                    );
                }
            }
        }
    }
}

#[test]
fn classes_are_consistent() {
    let (one, all) = (classes(Level::One), classes(Level::Two));
    assert!(one.iter().all(|class| class.level == Level::One) && one.len() == 16);
    assert!(all[one.len()..].iter().all(|class| class.level == Level::Two) && all.len() >= 60);
    let names: BTreeSet<&str> = all.iter().map(|class| class.name).collect();
    assert_eq!(names.len(), all.len());
    for class in all {
        assert!(
            class.colours().count() == 0 || class.colours().count() == class.sprites.len(),
            "{}",
            class.name
        );
        assert!(class.name.chars().all(|c| c.is_ascii_lowercase()));
    }
    for affordance in affordances(Level::Two) {
        for name in affordance.yes.iter().chain(affordance.maybe) {
            assert!(names.contains(name), "{name} in {:?}", affordance.question);
        }
    }
}

/// Pins a few scenes: a change of the generator that alters them must raise `WORLD_VERSION` and these numbers.
#[test]
fn scenes_stay_the_same_across_versions_and_platforms() {
    let fnv = |bytes: &[u8]| {
        bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
    };
    let hash = |scene: &Scene| {
        let mut bytes = scene.image.as_raw().clone();
        for question in &scene.texts.questions {
            bytes.extend(question.answer.bytes());
        }
        fnv(&bytes)
    };
    let found: Vec<u64> =
        [(1, 0), (1, 1), (2, 0)].into_iter().map(|(l, i)| hash(&scene(l, Split::Test, 0, i))).collect();
    assert_eq!(found, [8739969122598766108, 557195458566653747, 4024840625071997355]);
}
