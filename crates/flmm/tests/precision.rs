//! What fewer bits cost: the trained flmm-tiny answers and draws nearly as it does in f32.

mod common;

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use common::models::{models, tiny_options};
use common::{TestResult, max_abs_diff, rel_l2};
use flmm::Grounder;
use flmm::grounder::{AnswerOptions, GroundOptions, ModelPaths};
use flmm::image_input::read_image;
use flmm::lmm::{self, OpenOptions, Turn};
use flmm::masks::Mask;
use flmm::phrases::PhraseChoice;
use flmm::sam::Numbers;
use flmm::text::KvCache;
use flmm::weights::WeightFormat;

const QUESTIONS: [&str; 3] = ["What is in the picture?", "Where is the dog?", "How many dogs are there?"];
const PICTURES: [&str; 3] = ["scene.png", "book-and-dog.png", "colours.png"];

/// Answers to all questions, and the masks of a given text's phrases: refined and coarse ones.
struct Outcome {
    answers: Vec<String>,
    masks: Vec<(Mask, Mask)>,
}

fn outcome(options: &OpenOptions) -> TestResult<Outcome> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let grounder = Grounder::open_with(&ModelPaths::bundle(&root.join("models/flmm-tiny")), options)?;
    let (mut answers, mut masks) = (Vec::new(), Vec::new());
    for name in PICTURES {
        let picture = read_image(root.join("examples").join(name))?;
        for question in QUESTIONS {
            let options = AnswerOptions { max_new_tokens: 40, phrases: None, ..AnswerOptions::default() };
            answers.push(grounder.ask(&mut grounder.start(&picture)?, question, &options)?.answer);
        }
        // The same text for every setting, so that masks can be compared.
        let text = "There are a dog, a ball, a book and an apple.";
        let given = ["a dog", "a ball", "a book", "an apple"].map(str::to_owned).to_vec();
        let grounded =
            grounder.ground(&picture, text, &PhraseChoice::Given(given), &GroundOptions::default())?;
        masks.extend(grounded.phrases.into_iter().map(|phrase| (phrase.mask, phrase.coarse_mask)));
    }
    Ok(Outcome { answers, masks })
}

/// The part of pixels that two masks have in common, over all pairs.
fn agreement<'a>(pairs: impl Iterator<Item = (&'a Mask, &'a Mask)>) -> f64 {
    let (mut same, mut all) = (0, 0);
    for (a, b) in pairs {
        assert_eq!((a.width(), a.height()), (b.width(), b.height()));
        same += a.bits().iter().zip(b.bits()).filter(|(a, b)| a == b).count();
        all += a.bits().len();
    }
    same as f64 / all as f64
}

#[test]
fn fewer_bits_change_little() -> TestResult {
    let f32 = OpenOptions::new(DType::F32, &Device::Cpu);
    let bf16 = OpenOptions::new(DType::BF16, &Device::Cpu);
    let [int8, int4] =
        [WeightFormat::Int8, WeightFormat::Int4].map(|weights| OpenOptions { weights, ..bf16.clone() });
    let expected = outcome(&f32)?;
    assert!(expected.masks.iter().filter(|(mask, _)| mask.area() > 0).count() >= 3);
    // (name, settings, answers that may differ, pixels that must agree)
    for (name, options, answers, pixels) in [
        ("SAM bf16", OpenOptions { sam_dtype: Numbers::Bf16, ..f32.clone() }, 0, 0.995),
        ("SAM int8", OpenOptions { sam_dtype: Numbers::Int8, ..f32.clone() }, 0, 0.995),
        ("LMM bf16", bf16.clone(), 1, 0.99),
        ("LMM int8", int8.clone(), 1, 0.985),
        ("LMM int4", int4.clone(), 3, 0.95),
        ("all bf16", OpenOptions { sam_dtype: Numbers::Bf16, ..bf16 }, 1, 0.99),
        ("int8, SAM bf16", OpenOptions { sam_dtype: Numbers::Bf16, ..int8.clone() }, 1, 0.985),
        ("all int8", OpenOptions { sam_dtype: Numbers::Int8, ..int8 }, 1, 0.985),
        ("int4, SAM bf16", OpenOptions { sam_dtype: Numbers::Bf16, ..int4 }, 3, 0.95),
    ] {
        let found = outcome(&options)?;
        let differing = found.answers.iter().zip(&expected.answers).filter(|(a, b)| a != b).count();
        assert_eq!(found.masks.len(), expected.masks.len());
        let pairs = || found.masks.iter().zip(&expected.masks);
        let refined = agreement(pairs().map(|(a, b)| (&a.0, &b.0)));
        let coarse = agreement(pairs().map(|(a, b)| (&a.1, &b.1)));
        println!(
            "{name}: {differing} of {} answers differ, {:.3} % of refined and {:.3} % of coarse pixels agree",
            expected.answers.len(),
            100.0 * refined,
            100.0 * coarse
        );
        assert!(differing <= answers, "{name}: {:?} instead of {:?}", found.answers, expected.answers);
        assert!(refined >= pixels && coarse >= pixels, "{name}: {refined} and {coarse} of the pixels agree");
    }
    Ok(())
}

/// Logits of every position of a conversation, `[tokens, vocabulary]`.
fn logits(model: &Path, options: &OpenOptions) -> TestResult<Tensor> {
    let lmm = lmm::open_with(model, options)?;
    let picture = image::RgbImage::from_fn(64, 48, |x, y| image::Rgb([x as u8 * 4, y as u8 * 5, 99]));
    let turns = [Turn::user("What is this?")];
    let prepared = lmm.prepare(&picture, &turns)?;
    let mut cache = KvCache::new(lmm.decoder().config(), prepared.token_ids.len());
    let hidden = lmm.decoder().forward(&lmm.embed(&prepared)?, &mut cache, None)?;
    Ok(lmm.decoder().logits(&hidden)?)
}

#[test]
fn errors_of_tiny_checkpoints_are_small() -> TestResult {
    println!(
        "| model | relative error of logits, bf16 / int8 / int4 | largest, of the largest logit |\n|---|---|---|"
    );
    for (name, folder) in models()? {
        let f32 = tiny_options(&folder, DType::F32)?;
        let model = folder.join("model");
        let expected = logits(&model, &f32)?;
        let largest = max_abs_diff(&expected, &expected.zeros_like()?)?;
        let (mut means, mut most) = (Vec::new(), Vec::new());
        for (weights, limit) in
            [(WeightFormat::AsLoaded, 0.045), (WeightFormat::Int8, 0.065), (WeightFormat::Int4, 0.35)]
        {
            let options = OpenOptions { dtype: DType::BF16, weights, ..f32.clone() };
            let found = logits(&model, &options)?;
            let mean = rel_l2(&found, &expected)?;
            assert!(mean < limit, "{name}: {weights:?} is {mean} off");
            means.push(format!("{:.2} %", 100.0 * mean));
            most.push(format!("{:.1} %", 100.0 * max_abs_diff(&found, &expected)? / largest));
        }
        println!("| {name} | {} | {} |", means.join(" / "), most.join(" / "));
    }
    Ok(())
}
