//! The facade: capture observes only, all paths give the same masks, conversations continue, bad input is refused.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use common::{TestResult, golden_dir, tiny_sam};
use flmm::capture::Capture;
use flmm::grounder::{
    AnswerOptions, Caption, GroundOptions, GroundedAnswer, GroundingHead, HeadSizes, ModelPaths, Sampling,
    overlay,
};
use flmm::image_input::read_image;
use flmm::lmm::{self, GROUNDING_INSTRUCTION, Turn};
use flmm::masks::Mask;
use flmm::phrases::PhraseChoice;
use flmm::sam::{Sam, SamConfig};
use flmm::text::sampling::Sampler;
use flmm::text::{Generation, KvCache, Limits};
use flmm::weights::{Params, load_checkpoint, save_safetensors};
use flmm::{Error, Grounder};
use image::RgbImage;

const CPU: &Device = &Device::Cpu;
const TEXT: &str = "A red square is near the blue circle on the left side.";

fn fixture() -> Option<(PathBuf, PathBuf)> {
    Some((golden_dir("lmm/llava15")?, golden_dir("lmm/_sam")?))
}

fn paths() -> Option<ModelPaths> {
    let (family, sam) = fixture()?;
    Some(ModelPaths {
        model: family.join("model"),
        sam: tiny_sam(&sam).ok()?,
        head: Some(family.join("heads.pth")),
    })
}

fn picture() -> TestResult<RgbImage> {
    let (family, _) = fixture().ok_or("no fixture")?;
    Ok(read_image(family.join("images/a.png"))?)
}

/// The fixture with a keyword selector that scores every token `bias`.
fn with_selector(dtype: DType, bias: f32) -> TestResult<Option<Grounder>> {
    let Some(paths) = paths() else { return Ok(None) };
    let lmm = lmm::open(&paths.model, dtype, CPU)?;
    let sam_tensors = load_checkpoint(&paths.sam, Some(DType::F32), CPU)?;
    let sizes =
        HeadSizes::of(lmm.as_ref(), SamConfig::from_file(&paths.sam.with_file_name("sam_config.json"))?);
    let file = paths.head.as_deref().ok_or("no head")?;
    let mut head = load_checkpoint(file, Some(DType::F32), CPU)?;
    head.insert("keyword_selector.weight".into(), Tensor::zeros((1, sizes.hidden_size), DType::F32, CPU)?);
    head.insert("keyword_selector.bias".into(), Tensor::new(&[bias], CPU)?);
    let params = Params::new(file, overlay(file, &sam_tensors, head)?);
    let head = GroundingHead::from_params(&sizes, &params)?;
    let sam = Sam::load(&sizes.sam, &params.pp("sam.model"))?;
    params.finish("")?;
    Ok(Some(Grounder::from_parts(lmm, sam, head)))
}

fn message<T>(result: flmm::Result<T>) -> String {
    match result {
        Ok(_) => "no error".into(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn capture_changes_neither_ids_nor_logits() -> TestResult {
    let Some(paths) = paths() else { return Ok(()) };
    for dtype in [DType::F32, DType::BF16] {
        let lmm = lmm::open(&paths.model, dtype, CPU)?;
        let prepared = lmm.prepare(&picture()?, &[Turn::user("What is shown in this image?")])?;
        let embeds = lmm.embed(&prepared)?;
        for sampler in [Sampler::greedy(), Sampler::seeded(1.5, 0.95, 7), Sampler::seeded(0.7, 1.0, 8)] {
            let run = |mut capture: Option<Capture>| -> TestResult<(Vec<u32>, Vec<u32>)> {
                let mut cache = KvCache::new(lmm.decoder().config(), 1);
                let hidden = lmm.decoder().forward(&embeds, &mut cache, capture.as_mut())?;
                let last = hidden.narrow(0, hidden.dim(0)? - 1, 1)?;
                let mut bits = Vec::new();
                let limits = Limits { max_new_tokens: 20, stop_ids: &[] };
                let mut generation = Generation::new(last, limits, sampler.clone());
                while let Some((_, logits)) = generation.step(lmm.decoder(), &mut cache, capture.as_mut())? {
                    bits.extend(logits.iter().map(|logit| logit.to_bits()));
                }
                let ids = generation.ids().to_vec();
                Ok((ids, bits))
            };
            let plain = run(None)?;
            assert_eq!(plain.0.len(), 20);
            for first in [0, prepared.token_ids.len()] {
                let captured = run(Some(Capture::from_position(first)))?;
                assert_eq!(plain.0, captured.0, "ids, {dtype:?}, rows from {first}");
                assert!(plain.1 == captured.1, "logits, {dtype:?}, rows from {first}");
            }
        }
    }
    Ok(())
}

/// Rows that nobody asks for are left out of the last layer; what is asked for is the same.
#[test]
fn reading_gives_what_a_whole_pass_gives() -> TestResult {
    let Some(paths) = paths() else { return Ok(()) };
    // Products of few rows sum in another order.
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 1.0 / 64.0)] {
        let lmm = lmm::open(&paths.model, dtype, CPU)?;
        let prepared = lmm.prepare(&picture()?, &[Turn::user("What is shown in this image?")])?;
        let (embeds, tokens) = (lmm.embed(&prepared)?, prepared.token_ids.len());
        let layers = lmm.decoder().config().num_layers;
        let image = &prepared.images[0].layout;
        for first in [0, tokens - 5, tokens - 1, tokens] {
            let new = || (KvCache::new(lmm.decoder().config(), 1), Capture::from_position(first));
            let (mut cache, mut capture) = new();
            let whole = lmm.decoder().forward(&embeds, &mut cache, Some(&mut capture))?;
            let (mut read_cache, mut read_capture) = new();
            let last = lmm.decoder().read(&embeds, &mut read_cache, Some(&mut read_capture))?;
            close(&last, &whole.narrow(0, tokens - 1, 1)?, tolerance)?;
            assert_eq!(read_capture.positions(), first..tokens);
            assert_eq!(read_cache.len(), tokens);
            let positions: Vec<usize> = (first..tokens).collect();
            if positions.is_empty() {
                continue;
            }
            close(&read_capture.hidden_rows(&positions)?, &capture.hidden_rows(&positions)?, tolerance)?;
            for layer in [0, layers - 1] {
                let maps = |cache: &KvCache, capture: &Capture| {
                    capture.image_attention(cache, layer, image, &positions)
                };
                close(&maps(&read_cache, &read_capture)?, &maps(&cache, &capture)?, tolerance)?;
            }
        }
    }
    Ok(())
}

fn close(found: &Tensor, expected: &Tensor, tolerance: f32) -> TestResult {
    assert_eq!(found.dims(), expected.dims());
    let [found, expected] = [found, expected].map(|tensor| tensor.to_dtype(DType::F32));
    let (found, expected) = (found?, expected?);
    let scale = expected.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
    let difference = (found - expected)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
    assert!(difference <= tolerance * scale, "{difference} off, of {scale}");
    Ok(())
}

#[test]
fn the_answer_does_not_depend_on_grounding() -> TestResult {
    let Some(grounder) = with_selector(DType::F32, 5.0)? else { return Ok(()) };
    for sampling in [Sampling::Greedy, Sampling::Seeded { temperature: 1.2, top_p: 0.9, seed: 3 }] {
        let ask = |phrases| -> TestResult<(GroundedAnswer, String)> {
            let options = AnswerOptions { max_new_tokens: 16, sampling, phrases, ..AnswerOptions::default() };
            let mut session = grounder.start(&picture()?)?;
            session.turns.push(Turn::user("What is shown?"));
            let mut streamed = String::new();
            let answer = grounder.reply(&mut session, &options, &mut |text| streamed.push_str(text))?;
            Ok((answer, streamed))
        };
        let (plain, streamed) = ask(None)?;
        let (grounded, streamed_grounded) = ask(Some(PhraseChoice::Keywords))?;
        assert_eq!(plain.answer.as_bytes(), grounded.answer.as_bytes());
        assert_eq!(plain.token_ids, grounded.token_ids);
        assert_eq!(streamed, streamed_grounded);
        assert!(!streamed.is_empty());
        assert_eq!(plain.token_ids.len(), 15, "the last token is dropped");
        assert!(plain.phrases.is_empty());
        assert!(!grounded.phrases.is_empty());
        for phrase in &grounded.phrases {
            let chars: Vec<char> = grounded.answer.chars().collect();
            assert_eq!(chars[phrase.start..phrase.end].iter().collect::<String>(), phrase.text);
            assert!((phrase.score - 1.0 / (1.0 + (-5f32).exp())).abs() < 1e-5);
            assert_eq!((phrase.mask.height(), phrase.mask.width()), (60, 80));
            assert_eq!((phrase.coarse_mask.height(), phrase.coarse_mask.width()), (60, 80));
        }
    }
    Ok(())
}

/// How many pixels of two masks differ.
fn differing(a: &Mask, b: &Mask) -> usize {
    a.bits().iter().zip(b.bits()).filter(|(a, b)| a != b).count()
}

#[test]
fn answering_grounding_and_training_give_the_same_masks() -> TestResult {
    let Some(grounder) = with_selector(DType::F32, 5.0)? else { return Ok(()) };
    let picture = picture()?;

    // A generated answer, and the same tokens read back as a caption: the trainer's path.
    let options = AnswerOptions { max_new_tokens: 16, ..AnswerOptions::default() };
    let answer = grounder.answer(&picture, &[Turn::user(GROUNDING_INSTRUCTION)], &options)?;
    assert!(!answer.phrases.is_empty());
    let mut caption =
        Caption { mask_ids: vec![-1; answer.token_ids.len()], token_ids: answer.token_ids.clone() };
    for (number, phrase) in answer.phrases.iter().enumerate() {
        caption.mask_ids[phrase.tokens.0..phrase.tokens.1].fill(number as i32);
    }
    let observation = grounder.observe(&picture, &caption)?;
    let logits = grounder.decode(&observation)?;
    for (number, (phrase, (mask, coarse))) in
        answer.phrases.iter().zip(grounder.segment(&observation)?).enumerate()
    {
        assert_eq!(Mask::from_logits(&logits.refined.get(number)?)?, mask);
        // Cached and uncached rows differ by rounding, which may move a pixel that lies on the border.
        assert!(differing(&phrase.mask, &mask) <= 2, "refined mask of phrase {number}");
        assert!(differing(&phrase.coarse_mask, &coarse) <= 2, "coarse mask of phrase {number}");
    }

    // A given text and given phrases, against the same segments as the trainer builds them.
    let given = PhraseChoice::Given(vec!["the blue circle".into(), "A red square".into()]);
    let keep = GroundOptions { keep_maps: true, ..GroundOptions::default() };
    let grounded = grounder.ground(&picture, TEXT, &given, &keep)?;
    let segments = [
        ("A red square", Some(1)),
        ("is near", None),
        ("the blue circle", Some(0)),
        ("on the left side.", None),
    ];
    let caption = Caption::from_segments(grounder.lmm().tokenizer(), segments)?;
    assert_eq!(grounded.token_ids, caption.token_ids);
    let observation = grounder.observe(&picture, &caption)?;
    for (number, (phrase, (mask, coarse))) in
        grounded.phrases.iter().zip(grounder.segment(&observation)?).enumerate()
    {
        assert_eq!(phrase.text, ["the blue circle", "A red square"][number]);
        assert_eq!((phrase.mask.clone(), phrase.coarse_mask.clone()), (mask, coarse));
        let maps = phrase.maps.as_ref().ok_or("no maps")?;
        assert_eq!(common::max_abs_diff(maps, &observation.maps.get(number)?)?, 0.0);
    }

    // A text that is read once leaves no keys and values behind, and is seen the same.
    let turns = [Turn::user(GROUNDING_INSTRUCTION)];
    let (mut kept, mut once) = (grounder.start(&picture)?, grounder.start(&picture)?.once());
    let seen = grounder.observe_in(&mut kept, &turns, &caption)?;
    let seen_once = grounder.observe_in(&mut once, &turns, &caption)?;
    assert_eq!(common::max_abs_diff(&seen_once.maps, &seen.maps)?, 0.0);
    assert_eq!(common::max_abs_diff(&seen_once.hidden, &seen.hidden)?, 0.0);
    let config = grounder.lmm().decoder().config();
    let keys_and_values = 2 * config.num_layers * config.num_kv_heads * config.head_dim * size_of::<f32>();
    assert!(once.bytes() + seen.hidden.dim(1)? * keys_and_values < kept.bytes());
    // Of a text whose phrases only the selector finds, they are needed.
    grounder.ground_in(&mut once, TEXT, &PhraseChoice::Keywords, &keep)?;
    assert!(once.bytes() > once.layout().tokens * keys_and_values);

    // The same from a session that has already read other texts about the picture.
    let mut session = grounder.start(&picture)?;
    grounder.ground_in(&mut session, "Sky.", &PhraseChoice::Keywords, &keep)?;
    assert_eq!(session.tokens_reused(), 0);
    let again = grounder.ground_in(&mut session, TEXT, &given, &keep)?;
    assert!(session.tokens_reused() >= session.layout().end());
    for (a, b) in grounded.phrases.iter().zip(&again.phrases) {
        assert!(differing(&a.mask, &b.mask) <= 2);
    }
    Ok(())
}

#[test]
fn a_conversation_keeps_the_picture() -> TestResult {
    let Some(grounder) = with_selector(DType::F32, 5.0)? else { return Ok(()) };
    let options = AnswerOptions { max_new_tokens: 6, ..AnswerOptions::default() };
    let mut session = grounder.start(&picture()?)?;
    let first = grounder.ask(&mut session, "What is shown?", &options)?;
    assert_eq!(session.tokens_reused(), 0);
    assert!(!first.timings.encode.is_zero());
    let second = grounder.ask(&mut session, "And where?", &options)?;
    assert!(session.tokens_reused() >= session.layout().end(), "the picture was read again");
    assert_eq!(session.turns.len(), 4);
    let turns = &session.turns[..3];
    let fresh = grounder.answer(&picture()?, turns, &options)?;
    assert_eq!(fresh.token_ids, second.token_ids);
    for (a, b) in fresh.phrases.iter().zip(&second.phrases) {
        assert!(differing(&a.mask, &b.mask) <= 2);
    }

    // A refused question leaves the conversation as it was.
    assert!(grounder.ask(&mut session, " ", &options).is_err());
    assert_eq!(session.turns.len(), 4);
    Ok(())
}

#[test]
fn an_answer_may_begin_with_given_words() -> TestResult {
    let Some(paths) = paths() else { return Ok(()) };
    let lmm = lmm::open(&paths.model, DType::F32, CPU)?;
    let open = lmm.prompt(&[Turn::user("Where?"), Turn::assistant("It is")], 1)?;
    let question = lmm.prompt(&[Turn::user("Where?")], 1)?;
    assert_eq!(open[..question.len()], question);
    assert!(open.len() > question.len());
    Ok(())
}

#[test]
fn requests_that_cannot_be_served_are_refused() -> TestResult {
    let Some(grounder) = with_selector(DType::F32, -5.0)? else { return Ok(()) };
    let picture = picture()?;
    let options = AnswerOptions { max_new_tokens: 3, ..AnswerOptions::default() };
    let answer = |turns: &[Turn]| message(grounder.answer(&picture, turns, &options));
    assert!(answer(&[]).contains("no question"), "{}", answer(&[]));
    assert!(answer(&[Turn::user("\n ")]).contains("question is empty"));
    let long = answer(&[Turn::user("zebra ".repeat(4000))]);
    let limit = grounder.lmm().decoder().config().max_positions;
    assert!(long.contains(&format!("the model's context holds {limit}")), "{long}");

    let ground = |text: &str, choice: &PhraseChoice| {
        message(grounder.ground(&picture, text, choice, &GroundOptions::default()))
    };
    let given = |phrase: &str| PhraseChoice::Given(vec![phrase.into()]);
    assert!(ground(TEXT, &given("a green cat")).contains("`a green cat`"));
    assert!(ground(" ", &given("a")).contains("empty"));
    assert!(ground(&"zebra ".repeat(4000), &PhraseChoice::Keywords).contains("context holds"));

    // Nothing to ground is not an error: the selector scores everything below the threshold.
    let nothing = grounder.ground(&picture, TEXT, &PhraseChoice::Keywords, &GroundOptions::default())?;
    assert!(nothing.phrases.is_empty());
    assert_eq!(nothing.answer, TEXT);
    let one = AnswerOptions { max_new_tokens: 1, ..AnswerOptions::default() };
    let short = grounder.answer(&picture, &[Turn::user("What?")], &one)?;
    assert!(short.answer.is_empty() && short.phrases.is_empty());
    Ok(())
}

#[test]
fn every_wrong_tensor_is_in_one_error() -> TestResult {
    let Some(paths) = paths() else { return Ok(()) };
    let folder = tempfile::tempdir()?;
    for entry in std::fs::read_dir(&paths.model)? {
        let file = entry?.path();
        if file.extension().is_some_and(|extension| extension == "json") {
            std::fs::copy(&file, folder.path().join(file.file_name().unwrap_or_default()))?;
        }
    }
    let mut tensors: BTreeMap<String, Tensor> =
        load_checkpoint(&paths.model, None, CPU)?.into_iter().collect();
    let (missing, misshapen) = ("language_model.model.norm.weight", "multi_modal_projector.linear_1.bias");
    assert!(tensors.remove(missing).is_some());
    tensors.insert(misshapen.into(), Tensor::zeros(3, DType::F32, CPU)?);
    save_safetensors(folder.path().join("model.safetensors"), &tensors, &Default::default())?;
    let Err(error) = lmm::open(folder.path(), DType::F32, CPU) else { return Err("opened".into()) };
    let text = error.to_string();
    assert!(matches!(error, Error::Weights { .. }));
    assert!(text.contains(missing) && text.contains(misshapen) && text.contains("found [3]"), "{text}");

    // Newer uploads name the same tensors otherwise.
    let newer = load_checkpoint(&paths.model, None, CPU)?.into_iter().map(|(name, tensor)| {
        let name = match name.strip_prefix("language_model.model.") {
            Some(rest) => format!("model.language_model.{rest}"),
            None if name.starts_with("language_model.") => name.replace("language_model.", ""),
            None => format!("model.{name}"),
        };
        (name, tensor)
    });
    save_safetensors(folder.path().join("model.safetensors"), &newer.collect(), &Default::default())?;
    lmm::open(folder.path(), DType::F32, CPU)?;

    // A head with a stranger and a gap.
    let mut head: HashMap<String, Tensor> =
        load_checkpoint(paths.head.as_deref().ok_or("no head")?, None, CPU)?;
    let stranger = Tensor::zeros(1, DType::F32, CPU)?;
    head.insert("optimizer.step".into(), stranger);
    let file = folder.path().join("head.safetensors");
    let save = |head: &HashMap<String, Tensor>| {
        save_safetensors(&file, &head.clone().into_iter().collect(), &Default::default())
    };
    save(&head)?;
    let open = || {
        message(Grounder::open(&ModelPaths { head: Some(file.clone()), ..paths.clone() }, CPU, DType::F32))
    };
    assert!(open().contains("unexpected tensor `optimizer.step`"), "{}", open());
    head.remove("optimizer.step");
    head.remove("text_proj.bias");
    head.remove("mask_head.conv_seg.bias");
    save(&head)?;
    let text = open();
    assert!(text.contains("text_proj.bias") && text.contains("mask_head.conv_seg.bias"), "{text}");

    // A model of an unknown kind.
    let config = folder.path().join("config.json");
    let text = std::fs::read_to_string(&config)?.replace("\"llava\"", "\"blip\"");
    std::fs::write(&config, text)?;
    let Err(error) = lmm::open(folder.path(), DType::F32, CPU) else { return Err("opened".into()) };
    assert!(error.to_string().contains("unknown model type `blip`; known types: llava"), "{error}");
    Ok(())
}

#[test]
fn masks_are_made_without_a_head() -> TestResult {
    let Some(paths) = paths() else { return Ok(()) };
    let grounder = Grounder::open(&ModelPaths { head: None, ..paths }, CPU, DType::F32)?;
    let picture = picture()?;
    let given = PhraseChoice::Given(vec!["a dog".into(), "a cat".into()]);
    let options = GroundOptions::default();
    let answer = grounder.ground(&picture, "There is a dog and a cat.", &given, &options)?;
    assert_eq!(answer.phrases.len(), 2);
    for phrase in &answer.phrases {
        let size = (phrase.coarse_mask.width() as u32, phrase.coarse_mask.height() as u32);
        assert_eq!(size, picture.dimensions());
        let area = phrase.coarse_mask.area();
        assert!(area > 0 && area < (size.0 * size.1) as usize, "{} of {size:?}", phrase.text);
    }
    // Without a keyword selector noun phrases are chosen.
    let chosen = grounder.ground(&picture, "There is a dog.", &PhraseChoice::Keywords, &options)?;
    assert_eq!(chosen.phrases.iter().map(|phrase| phrase.text.as_str()).collect::<Vec<_>>(), ["a dog"]);
    Ok(())
}

#[test]
fn a_session_that_wants_coarse_masks_alone_does_not_ask_sam() -> TestResult {
    let Some(paths) = paths() else { return Ok(()) };
    let grounder = Grounder::open(&paths, CPU, DType::F32)?;
    let (picture, turns) = (picture()?, [Turn::user("What is shown?")]);
    let caption = Caption::from_segments(grounder.lmm().tokenizer(), [("A ", None), ("dog", Some(0))])?;
    let whole = grounder.observe_in(&mut grounder.start(&picture)?, &turns, &caption)?;
    let coarse = grounder.observe_in(&mut grounder.start(&picture)?.coarse_only(), &turns, &caption)?;
    assert_eq!(coarse.sam_embedding.elem_count(), 0);
    assert_eq!(coarse.sam_geometry.original, whole.sam_geometry.original);
    let values = |x: Tensor| x.flatten_all()?.to_vec1::<f32>();
    assert_eq!(values(grounder.coarse(&coarse)?)?, values(grounder.coarse(&whole)?)?);
    assert!(grounder.decode(&coarse).is_err(), "there is nothing to refine with");
    Ok(())
}

#[test]
fn stop_words_of_several_tokens_are_no_part_of_the_answer() -> TestResult {
    let Some(grounder) = with_selector(DType::F32, 5.0)? else { return Ok(()) };
    let ask = |stop_words: Vec<String>, phrases| -> TestResult<(GroundedAnswer, String)> {
        let options = AnswerOptions { max_new_tokens: 16, stop_words, phrases, ..AnswerOptions::default() };
        let mut session = grounder.start(&picture()?)?;
        session.turns.push(Turn::user("What is shown?"));
        let mut streamed = String::new();
        let answer = grounder.reply(&mut session, &options, &mut |text| streamed.push_str(text))?;
        // The conversation goes on as if the stop word had never been read.
        session.turns.push(Turn::assistant(&answer.answer));
        session.turns.push(Turn::user("And where?"));
        let next = grounder.reply(&mut session, &options, &mut |_| {})?;
        let fresh = grounder.answer(&picture()?, &session.turns, &options)?;
        assert_eq!(next.token_ids, fresh.token_ids);
        Ok((answer, streamed))
    };
    let (whole, _) = ask(Vec::new(), None)?;
    let decode = |ids: &[u32]| grounder.lmm().tokenizer().decode(ids, false);
    // Three tokens in the middle, as text that does not come earlier.
    let word_at = |from: usize| {
        let before = decode(&whole.token_ids[..from]);
        let word = decode(&whole.token_ids[..from + 3]).strip_prefix(before.as_str())?.to_owned();
        let plain = !word.is_empty() && word.trim() == word && !word.contains('\u{fffd}');
        (plain && whole.answer.find(&word) == Some(before.len())).then_some((from, before, word))
    };
    let found = (2..whole.token_ids.len() - 3).find_map(word_at);
    let (from, before, word) = found.ok_or_else(|| format!("no such word in {:?}", whole.answer))?;
    for phrases in [None, Some(PhraseChoice::Keywords)] {
        let (short, streamed) = ask(vec![word.clone()], phrases)?;
        assert_eq!((&short.token_ids[..], &short.answer), (&whole.token_ids[..from], &before));
        // Bytes that never become characters are streamed as they look at first.
        match short.answer.split_once('\u{fffd}') {
            Some((certain, _)) => assert!(streamed.starts_with(certain) && !streamed.contains(&word)),
            None => assert_eq!(streamed, short.answer),
        }
        assert!(short.phrases.iter().all(|phrase| phrase.tokens.1 <= from));
    }
    Ok(())
}
