//! Answers pulled token by token, with the shipped model, whose keyword selector is trained.

mod common;

use std::path::Path;

use candle_core::{DType, Device};
use common::TestResult;
use flmm::Grounder;
use flmm::grounder::{AnswerOptions, AttentionChoice, Caption, Ended, ModelPaths};
use flmm::image_input::read_image;
use flmm::lmm::{GROUNDING_INSTRUCTION, Turn};
use image::RgbImage;

fn repository(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

fn grounder() -> flmm::Result<Grounder> {
    Grounder::open(&ModelPaths::bundle(&repository("models/flmm-tiny")), &Device::Cpu, DType::F32)
}

fn picture() -> flmm::Result<RgbImage> {
    read_image(repository("examples/scene.png"))
}

#[test]
fn phrases_told_early_are_those_of_the_whole_answer() -> TestResult {
    let (grounder, picture, options) = (grounder()?, picture()?, AnswerOptions::default());
    let whole = grounder.answer(&picture, &[Turn::user(GROUNDING_INSTRUCTION)], &options)?;
    assert!(whole.phrases.len() > 2, "{}", whole.answer);

    let mut session = grounder.start(&picture)?;
    session.turns.push(Turn::user(GROUNDING_INSTRUCTION));
    // SAM looks beside the LMM.
    grounder.look_ahead(&mut session, 0);
    let mut reply = grounder.begin_reply(&mut session, &options)?;
    let (mut text, mut told, mut early) = (String::new(), Vec::new(), 0);
    while let Some(piece) = reply.step()? {
        text += &piece;
        reply.complete_phrases(&mut |phrase| told.push(phrase))?;
        if reply.ended().is_none() {
            early = told.len();
        }
        assert!(told.iter().all(|phrase| phrase.end <= text.chars().count()), "a phrase before its text");
    }
    assert_eq!(reply.ended(), Some(Ended::Stop));
    let answer = reply.finish(&mut |phrase| told.push(phrase))?;
    assert!(early > 1, "phrases came at the end");
    assert_eq!((&text, &answer.answer, &answer.token_ids), (&whole.answer, &whole.answer, &whole.token_ids));
    assert!(answer.phrases.is_empty());
    assert_eq!(told.len(), whole.phrases.len());
    for (a, b) in told.iter().zip(&whole.phrases) {
        assert_eq!((&a.text, a.start, a.end, a.tokens), (&b.text, b.start, b.end, b.tokens));
        assert!((a.score - b.score).abs() < 1e-5);
        assert!(a.mask == b.mask && a.coarse_mask == b.coarse_mask, "mask of `{}`", a.text);
    }
    Ok(())
}

#[test]
fn an_answer_that_is_given_up_leaves_the_session_as_it_was() -> TestResult {
    let (grounder, picture) = (grounder()?, picture()?);
    let options = AnswerOptions { max_new_tokens: 4, ..AnswerOptions::default() };
    let mut session = grounder.start(&picture)?;
    session.turns.push(Turn::user(GROUNDING_INSTRUCTION));
    let mut reply = grounder.begin_reply(&mut session, &options)?;
    for _ in 0..3 {
        reply.step()?;
    }
    drop(reply);
    let again = grounder.reply(&mut session, &options, &mut |_| {})?;
    assert!(session.tokens_reused() >= session.layout().end());
    let fresh = grounder.answer(&picture, &session.turns, &options)?;
    assert_eq!(again.token_ids, fresh.token_ids);
    assert_eq!(again.token_ids.len(), 3, "the last token is dropped");

    let mut reply = grounder.begin_reply(&mut session, &options)?;
    while reply.step()?.is_some() {}
    assert_eq!(reply.ended(), Some(Ended::Length));
    Ok(())
}

#[test]
fn a_token_s_attention_is_that_of_a_phrase_of_one_token() -> TestResult {
    let (grounder, picture, text) = (grounder()?, picture()?, "A dog and a ball.");
    let mut caption = Caption::from_segments(grounder.lmm().tokenizer(), [(text, None)])?;
    let tokens = caption.token_ids.len();
    caption.mask_ids = (0..tokens as i32).collect();
    let phrases = grounder.attention(&picture, &caption)?.maps;

    let turns = [Turn::user(GROUNDING_INSTRUCTION)];
    let choice = |layers: &[usize], mean, most_values| AttentionChoice {
        tokens: Vec::new(),
        layers: layers.to_vec(),
        heads: Vec::new(),
        mean,
        most_values,
    };
    let read = |choice: &AttentionChoice| {
        grounder.token_attention(&mut grounder.start(&picture)?, 0, &turns, text, choice)
    };
    let all = read(&choice(&[], false, 1 << 20))?;
    assert_eq!((all.text.as_str(), all.offsets.len(), all.maps.dim(0)?), (text, tokens, tokens));
    let spec = grounder.lmm().spec();
    let shape = (tokens, 1, spec.layers, spec.heads, 144);
    // Several rows in one product are summed in another order than each alone.
    assert!(common::max_abs_diff(&all.maps, &phrases.reshape(shape)?)? < 1e-5);
    let mean = read(&choice(&[2, 5], true, 1 << 20))?.maps;
    let expected = all.maps.index_select(&candle_core::Tensor::new(&[2u32, 5], &Device::Cpu)?, 2)?;
    assert!(common::max_abs_diff(&mean, &expected.mean_keepdim((2, 3))?)? < 1e-6);
    let refused = read(&choice(&[], false, 1000)).err().map(|error| error.to_string()).unwrap_or_default();
    assert!(refused.contains("more than 1000 values"), "{refused}");
    Ok(())
}
