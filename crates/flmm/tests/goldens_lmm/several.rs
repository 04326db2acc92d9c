//! Conversations about several pictures: no such run was recorded, but its parts were.

use std::path::Path;

use candle_core::{DType, Tensor};
use flmm::Grounder;
use flmm::capture::Capture;
use flmm::grounder::{AnswerOptions, Caption, GroundOptions};
use flmm::image_input::read_image;
use flmm::layout::Merge;
use flmm::lmm::{Entry, Lmm, Prepared, REGISTRY, Turn};
use flmm::phrases::PhraseChoice;
use flmm::text::KvCache;
use image::RgbImage;

use crate::case::{Opened, cases, families, open};
use crate::common::{TestResult, max_abs_diff};

/// The pictures of a family's cases, in the order of their names.
fn pictures(dir: &Path) -> TestResult<Vec<RgbImage>> {
    let pictures = cases(dir, "f32")?.into_iter().map(|case| Ok(read_image(&case.picture)?));
    pictures.collect()
}

/// Runs `check`, which tells whether it could check anything, with every model that takes several pictures and has two;
/// at least one must be checked.
fn with_two(check: impl Fn(&Path, &Opened, [&RgbImage; 2]) -> TestResult<bool>) -> TestResult {
    let mut families = families()?;
    // One folder of each model is enough.
    families.dedup_by_key(|(name, _)| *name);
    let mut checked = families.is_empty();
    for (name, dir) in families {
        let takes_several = |entry: &&Entry| entry.spec.name == name && entry.spec.several_images;
        if !REGISTRY.iter().any(|entry| takes_several(&entry)) {
            continue;
        }
        if let [a, b, ..] = &pictures(&dir)?[..] {
            let opened = open(&dir, DType::F32)?;
            checked |= check(&dir, &opened, [a, b]).map_err(|e| format!("{name}, {}: {e}", dir.display()))?;
        }
    }
    assert!(checked, "no model takes several pictures");
    Ok(())
}

fn with_grounder(check: impl Fn(&Grounder, [&RgbImage; 2]) -> TestResult<bool>) -> TestResult {
    with_two(|_, opened, pictures| match opened {
        Opened::Whole(grounder) => check(grounder, pictures),
        // The fixtures have no head for it.
        Opened::Lmm(_) => Ok(false),
    })
}

/// A question with the second picture first and words between the two.
fn among_words() -> Turn {
    Turn::user("").show(1).say("the part, ").show(0).say("the whole: what is it?")
}

/// The ids are those of the text with every image token written as often as its picture has features, and the
/// features at each picture's place are the recorded ones.
#[test]
fn goldens_lmm_several_pictures_are_put_in_place() -> TestResult {
    with_two(|dir, opened, [a, b]| {
        let lmm = opened.lmm();
        for (turn, order) in [(Turn::user("What is it?"), [0, 1]), (among_words(), [1, 0])] {
            let turns = [Turn::system(""), turn];
            let prepared = lmm.prepare_all(&[a, b], &turns)?;
            let format = lmm.base().format;
            let mut counts = order.iter().map(|&image| prepared.images[image].layout.tokens);
            let mut expanded = String::new();
            for (i, piece) in format.render(&turns, 2)?.split(format.image).enumerate() {
                if i > 0 {
                    expanded += &format.image.repeat(counts.next().ok_or("too many pictures")?);
                }
                expanded += piece;
            }
            assert_eq!(lmm.tokenizer().encode(&expanded, true)?, prepared.token_ids);

            let embeds = lmm.embed(&prepared)?;
            assert_eq!(embeds.dim(0)?, prepared.token_ids.len());
            for (image, case) in prepared.images.iter().zip(cases(dir, "f32")?) {
                let found = embeds.narrow(0, image.layout.start, image.layout.tokens)?;
                // Pictures in crops were recorded in another order; the single pass compares those.
                match case.golden.tensors.get("projector_out") {
                    Some(recorded) if recorded.dim(0)? == 1 => {
                        assert!(max_abs_diff(&found, &recorded.squeeze(0)?)? <= 2e-4);
                    }
                    _ => assert_eq!(max_abs_diff(&found, &lmm.image_features(image)?)?, 0.0),
                }
            }
        }
        Ok(true)
    })
}

/// Maps of `phrase` token rows of `caption` on picture `image`, from one pass without any session.
fn plain_maps(
    lmm: &dyn Lmm,
    pictures: [&RgbImage; 2],
    turns: &[Turn],
    caption: &Caption,
    image: usize,
) -> TestResult<Tensor> {
    let prepared = lmm.prepare_all(&pictures, turns)?;
    let start = prepared.token_ids.len();
    let token_ids = [prepared.token_ids.as_slice(), &caption.token_ids].concat();
    let read = Prepared { token_ids, images: prepared.images };
    let mut cache = KvCache::new(lmm.decoder().config(), 8);
    let mut capture = Capture::from_position(start);
    lmm.decoder().forward(&lmm.embed(&read)?, &mut cache, Some(&mut capture))?;
    let rows: Vec<Vec<usize>> =
        caption.phrases()?.iter().map(|phrase| phrase.iter().map(|token| start + token).collect()).collect();
    Ok(capture.phrase_maps(&cache, &read.images[image].layout, &rows, Merge::Mean)?)
}

/// Each picture has maps of its own, and a session that has read other things gives the same ones.
#[test]
fn goldens_lmm_every_picture_has_its_maps() -> TestResult {
    with_grounder(|grounder, [a, b]| {
        let lmm = grounder.lmm();
        let caption =
            Caption::from_segments(lmm.tokenizer(), [("A ", None), ("red square", Some(0)), (".", None)])?;
        let mut session = grounder.start_with([a, b])?;
        for turns in [[among_words()], [Turn::user("Where?")]] {
            let mut maps = Vec::new();
            for (image, picture) in [a, b].into_iter().enumerate() {
                let observation = grounder.observe_image_in(&mut session, image, &turns, &caption)?;
                let plain = plain_maps(lmm, [a, b], &turns, &caption, image)?;
                assert!(max_abs_diff(&observation.maps, &plain)? <= 2e-5, "maps of picture {image}");
                let (height, width) = (picture.height() as usize, picture.width() as usize);
                assert_eq!(observation.sam_geometry.original, (height, width));
                assert_eq!(grounder.decode(&observation)?.refined.dims()[1..], [height, width]);
                maps.push(observation.maps.flatten_all()?.to_vec1::<f32>()?);
            }
            assert_ne!(maps[0], maps[1]);
            assert!(
                session.tokens_reused() > 0,
                "the second picture's maps need no second reading of the prompt"
            );
        }
        Ok(true)
    })
}

/// What is kept of a conversation never changes an answer: not when pictures change places, whose tokens all have
/// the same id, and not when one is added.
#[test]
fn goldens_lmm_pictures_that_change_places_are_read_again() -> TestResult {
    with_grounder(|grounder, [a, b]| {
        let options = AnswerOptions { max_new_tokens: 6, phrases: None, ..AnswerOptions::default() };
        let mut session = grounder.start_with([a, b])?;
        let swapped = [Turn::user("").show(1).show(0).say("What is it?")];
        for turns in [vec![Turn::user("").show(0).show(1).say("What is it?")], swapped.to_vec()] {
            session.turns = turns.clone();
            let answer = grounder.reply(&mut session, &options, &mut |_| {})?;
            let first = session.layout().start.min(session.layout_of(1)?.start);
            assert!(session.tokens_reused() <= first, "another picture's keys were used");
            let mut fresh = grounder.start_with([a, b])?;
            fresh.turns = turns;
            assert_eq!(grounder.reply(&mut fresh, &options, &mut |_| {})?.token_ids, answer.token_ids);
            session.turns.push(Turn::assistant(answer.answer));
        }
        // The conversation goes on: both pictures are kept.
        let answer = grounder.ask(&mut session, "And where?", &options)?;
        assert!(session.tokens_reused() >= session.layout().end().max(session.layout_of(1)?.end()));
        let mut fresh = grounder.start_with([a, b])?;
        fresh.turns = session.turns[..3].to_vec();
        assert_eq!(grounder.reply(&mut fresh, &options, &mut |_| {})?.token_ids, answer.token_ids);

        // A picture that comes later, in the next question: the first is not read again.
        let mut session = grounder.start(a)?;
        grounder.ask(&mut session, "What is it?", &options)?;
        grounder.add_picture(&mut session, b)?;
        session.turns.push(Turn::user("And this: ").show(1).say("?"));
        let answer = grounder.reply(&mut session, &options, &mut |_| {})?;
        assert!(session.tokens_reused() >= session.layout().end());
        let mut fresh = grounder.start_with([a, b])?;
        fresh.turns = session.turns.clone();
        assert_eq!(grounder.reply(&mut fresh, &options, &mut |_| {})?.token_ids, answer.token_ids);
        Ok(true)
    })
}

/// Which picture is grounded changes neither the text nor the phrases, only where they are looked for.
#[test]
fn goldens_lmm_the_text_does_not_depend_on_the_grounded_picture() -> TestResult {
    with_grounder(|grounder, [a, b]| {
        let ask = |phrases, image| -> TestResult<_> {
            let ground = GroundOptions { image, ..GroundOptions::default() };
            let options = AnswerOptions { max_new_tokens: 8, phrases, ground, ..AnswerOptions::default() };
            Ok(grounder.ask(&mut grounder.start_with([a, b])?, "What is it?", &options)?)
        };
        let plain = ask(None, 0)?;
        // Random models say anything; one of them says a plain word.
        let word = plain.answer.split_whitespace().find(|word| word.is_ascii());
        let Some(word) = word.map(str::to_owned) else { return Ok(false) };
        let given = PhraseChoice::Given(vec![word]);
        for (image, picture) in [a, b].into_iter().enumerate() {
            let grounded = ask(Some(given.clone()), image)?;
            assert_eq!(grounded.token_ids, plain.token_ids);
            let [phrase] = &grounded.phrases[..] else { return Err("one phrase was given".into()) };
            let size = (phrase.mask.width() as u32, phrase.mask.height() as u32);
            assert_eq!(size, picture.dimensions());
            // A given text about the same picture.
            let options = GroundOptions { image, ..GroundOptions::default() };
            let mut session = grounder.start_with([a, b])?;
            let text = grounder.ground_in(&mut session, "A dog.", &PhraseChoice::NounPhrases, &options)?;
            assert!(text.phrases.iter().all(|phrase| phrase.mask.width() as u32 == picture.width()));
        }
        let message = ask(None, 2).map_or_else(|e| e.to_string(), |_| "no error".into());
        assert!(message.contains("no picture 2") && message.contains("has 2"), "{message}");
        Ok(true)
    })
}

/// Models made for one picture say so, and name others.
#[test]
fn goldens_lmm_one_picture_where_the_family_takes_one() -> TestResult {
    for (name, dir) in families()? {
        let opened = open(&dir, DType::F32)?;
        let lmm = opened.lmm();
        let picture = RgbImage::new(8, 8);
        let turns = [Turn::user("What is it?")];
        let none = lmm.prepare_all(&[], &turns).map(drop);
        assert!(none.is_err_and(|e| e.to_string().contains("no picture")), "{name}");
        if lmm.spec().several_images {
            continue;
        }
        let error = match lmm.prepare_all(&[&picture, &picture], &turns) {
            Ok(_) => return Err(format!("{name} took two pictures").into()),
            Err(error) => error,
        };
        assert_eq!(error.to_string(), format!("{name} takes one picture per conversation, 2 were given"));
        assert!(error.hint().is_some_and(|hint| hint.contains("DeepSeekVL-1.3B")));
    }
    Ok(())
}
