//! Greedy answers, and conversations that go on.

use candle_core::{DType, Device, Tensor};
use flmm::capture::{Capture, weighted_hidden};
use flmm::grounder::{AnswerOptions, Observation};
use flmm::image_input::read_image;
use flmm::layout::Merge;
use flmm::lmm::{ImageInput, Turn};
use flmm::nn::bilinear;
use flmm::text::chat::MODELS;
use flmm::text::sampling::Sampler;
use flmm::text::{Generation, KvCache, Limits};

use crate::case::{Case, Opened, unexpanded};
use crate::common::TestResult;

/// Greedy generation with rows of the generated tokens.
pub(crate) fn check_generation(case: &mut Case, opened: &Opened) -> TestResult {
    let lmm = opened.lmm();
    let picture = read_image(&case.picture)?;
    let question: String = case.list("question")?;
    let question = question.strip_prefix("<image>\n").unwrap_or(&question);
    let prepared = lmm.prepare(&picture, &[Turn::user(question)])?;
    let prompt_ids = case.ids("gen_prompt_ids", &prepared)?;
    case.exact("gen_prompt_ids", unexpanded(&prepared.token_ids, &prepared), prompt_ids)?;
    // Where the image's tokens were recorded one by one, the ids tell the length.
    if case.record.get("gen_prompt_ids_rle").is_none() {
        let length = prepared.token_ids.len();
        case.exact("gen_prompt_expanded_length", length, case.list("gen_prompt_expanded_length")?)?;
    } else {
        let layout = &prepared.images[0].layout;
        case.exact("gen_image_positions", [layout.start, layout.end()], case.list("gen_image_positions")?)?;
    }

    let expected: Vec<u32> = case.list("gen_ids")?;
    let mut cache = KvCache::new(lmm.decoder().config(), 8);
    let hidden = lmm.decoder().forward(&lmm.embed(&prepared)?, &mut cache, None)?;
    let last = hidden.narrow(0, hidden.dim(0)? - 1, 1)?;
    let mut capture = Capture::from_position(prepared.token_ids.len());
    let mut steps = Vec::new();
    let limits = Limits { max_new_tokens: expected.len(), stop_ids: &[] };
    let mut generation = Generation::new(last, limits, Sampler::greedy());
    while let Some((_, logits)) = generation.step(lmm.decoder(), &mut cache, Some(&mut capture))? {
        steps.push(logits);
    }
    let ids = generation.ids().to_vec();
    let agreed = ids.iter().zip(&expected).take_while(|(a, b)| a == b).count();
    if let Some(noise) = &case.noise {
        // A step whose margin is within the noise may go either way; nothing later is comparable then.
        let change = noise["max_abs"]["gen.step_logits"].as_f64().unwrap_or(0.0);
        let margins: Vec<f64> = case.list("gen_step_margins")?;
        let sure = margins.iter().take_while(|&&margin| margin >= 4.0 * change).count();
        println!("{}: {agreed} of {} ids agree, {sure} must", case.golden.case, expected.len());
        assert!(agreed >= sure, "{}: ids {ids:?}, expected {expected:?}", case.golden.case);
        if agreed < expected.len() {
            return Ok(());
        }
    } else {
        case.exact("gen_ids", &ids, &expected)?;
    }
    let logits =
        steps.iter().map(|step| Tensor::new(step.as_slice(), &Device::Cpu)).collect::<Result<Vec<_>, _>>()?;
    case.check("gen.step_logits", &Tensor::stack(&logits, 0)?, 1e-3, 0.06)?;
    let positions: Vec<usize> = capture.positions().collect();
    case.exact("rows of generated tokens", positions.len(), expected.len() - 1)?;
    let layers = lmm.spec().layers;
    let rows = (0..layers)
        .map(|layer| capture.image_attention(&cache, layer, &prepared.images[0].layout, &positions));
    case.check("gen.attn_rows", &Tensor::cat(&rows.collect::<Result<Vec<_>, _>>()?, 0)?, 2e-5, 0.12)?;
    let states = capture.hidden_rows(&positions)?;
    case.check("gen.hidden_rows", &states, 2e-4, 0.04)?;
    if case.record.get("ground_token_ranges").is_some() {
        check_generated_phrases(case, opened, &capture, &cache, &prepared.images[0])?;
    }
    let Opened::Whole(grounder) = opened else { return Ok(()) };
    let states = weighted_hidden(&states, &grounder.head().text_layer_weights)?;
    case.check("gen.text_states", &states, 2e-4, 0.04)
}

/// Grounding of ranges of generated tokens.
fn check_generated_phrases(
    case: &mut Case,
    opened: &Opened,
    capture: &Capture,
    cache: &KvCache,
    image: &ImageInput,
) -> TestResult {
    let ranges: Vec<(usize, usize)> = case.list("ground_token_ranges")?;
    let rows = capture.positions();
    let positions: Vec<Vec<usize>> =
        ranges.iter().map(|&(start, end)| (rows.start + start..rows.start + end).collect()).collect();
    let maps = capture.phrase_maps(cache, &image.layout, &positions, Merge::Mean)?;
    case.check("ground.attn_merged", &maps, 2e-5, 0.12)?;
    let Opened::Whole(grounder) = opened else { return Ok(()) };

    let (sam_embedding, sam_geometry) =
        grounder.sam().expect("the case has a SAM").encode_image(&read_image(&case.picture)?)?;
    let observation = Observation {
        maps,
        hidden: capture.hidden_rows(&rows.collect::<Vec<_>>())?,
        phrases: ranges.iter().map(|&(start, end)| (start..end).collect()).collect(),
        geometry: image.geometry,
        sam_embedding,
        sam_geometry,
    };
    let unet = grounder.head().mask_head.forward(&observation.maps)?;
    case.check("ground.unet_logits", &unet, 3e-3, 0.12)?;
    let logits = grounder.decode(&observation)?;
    let (height, width) = observation.sam_geometry.original;
    let full = bilinear(&logits.coarse.unsqueeze(0)?, height, width)?.squeeze(0)?;
    case.check("ground.cnn_logits_full", &full, 3e-3, 0.12)?;
    if case.noise.is_none() {
        case.golden.check("ground.sam_logits", &logits.refined, 1e-2)?;
    }
    // The mask head alone, whatever the LMM's arithmetic.
    let recorded = case.golden.get("ground.attn_merged")?.to_dtype(DType::F32)?;
    case.golden.check("ground.unet_logits", &grounder.head().mask_head.forward(&recorded)?, 1e-3)
}

/// A second question in a session, which re-reads only what is new, is answered as in a session of its own.
pub(crate) fn check_conversation(case: &mut Case, opened: &Opened) -> TestResult {
    let Opened::Whole(grounder) = opened else { return Ok(()) };
    let picture = read_image(&case.picture)?;
    let options = AnswerOptions { max_new_tokens: 6, phrases: None, ..AnswerOptions::default() };
    let mut session = grounder.start(&picture)?;
    grounder.ask(&mut session, "What is shown in this image?", &options)?;
    let second = grounder.ask(&mut session, "And what else?", &options)?;
    assert!(
        session.tokens_reused() >= session.layout().end(),
        "{}: the picture was read again",
        case.golden.case
    );
    let mut fresh = grounder.start(&picture)?;
    fresh.turns = session.turns[..3].to_vec();
    let again = grounder.reply(&mut fresh, &options, &mut |_| {})?;
    case.exact("the second answer", second.token_ids, again.token_ids)?;

    let stops = grounder.lmm().stop_ids();
    assert!(!stops.is_empty(), "{}: nothing ends an answer", case.golden.case);
    let spec = grounder.lmm().spec();
    let format = MODELS.iter().find(|(name, _)| *name == spec.name).map(|(_, format)| format);
    let word =
        format.and_then(|format| format.stop_word).and_then(|word| grounder.lmm().tokenizer().id(word));
    assert!(word.is_none_or(|id| stops.contains(&id)), "{}: {stops:?} without {word:?}", case.golden.case);
    Ok(())
}
