//! `flmm inspect attention`: where the words of an answer look (`spec/evaluation.md` §9).

use std::collections::BTreeMap;

use candle_core::Tensor;
use flmm::Geometry;
use flmm::clusters::{at_logit_size, better_side};
use flmm::grounder::{AnswerOptions, GroundOptions, GroundedPhrase};
use flmm::lmm::Turn;
use flmm::masks::Mask;
use flmm::overlay::{draw_mask, heat_map, panels, save_png};
use flmm::phrases::PhraseChoice;
use image::RgbImage;

use crate::args::{AttentionArgs, check_text};
use crate::failure::Result;
use crate::talk::Talk;
use crate::{ground, model, picture};

pub(crate) fn run(args: &AttentionArgs, talk: &Talk) -> Result<()> {
    if let Some(prompt) = &args.prompt {
        check_text("the question", prompt)?;
    }
    let out = picture::destination(&args.image, args.out.as_deref(), "attention.png")?;
    if let Some(raw) = &args.raw {
        picture::check_place(raw)?;
    }
    let given = args.text.as_deref().map(|text| ground::choice(text, &args.phrase)).transpose()?;
    let image = picture::read(&args.image)?;
    let model = model::open(&args.model, talk)?;
    let ground = GroundOptions { keep_maps: true, ..GroundOptions::default() };
    let answer = {
        let _spinner = talk.during("looking");
        match (&args.text, given) {
            (Some(text), Some(choice)) => model.grounder.ground(&image, text, &choice, &ground)?,
            _ => {
                let phrases = match args.phrase.is_empty() {
                    true => PhraseChoice::Keywords,
                    false => PhraseChoice::Given(args.phrase.clone()),
                };
                let options = AnswerOptions { phrases: Some(phrases), ground, ..AnswerOptions::default() };
                let prompt = args.prompt.clone().unwrap_or_default();
                model.grounder.answer(&image, &[Turn::user(prompt)], &options)?
            }
        }
    };
    let geometry = model.grounder.lmm().prepare_image(&image)?.geometry;
    let mut rows = Vec::new();
    let mut raw: BTreeMap<String, Tensor> = BTreeMap::new();
    let mut lines = vec![answer.answer.clone()];
    for (i, phrase) in answer.phrases.iter().enumerate() {
        let Some(maps) = &phrase.maps else { continue };
        let (row, soft_iou) = draw_phrase(&image, i, phrase, maps, &geometry, args.seed)?;
        lines.push(format!("{}  {}  K-means to mask {:.3}", i + 1, phrase.text, soft_iou));
        rows.push(row);
        raw.insert(format!("phrase.{i}"), maps.contiguous().map_err(flmm::Error::from)?);
    }
    talk.print(&lines.join("\n"))?;
    if rows.is_empty() {
        talk.note("no phrase of the text speaks of something in the picture: nothing written");
        return Ok(());
    }
    save_png(&panels(&rows), &out)?;
    talk.note(format_args!("attention: {}", out.display()));
    if let Some(path) = &args.raw {
        let texts = answer.phrases.iter().enumerate().map(|(i, p)| (format!("phrase.{i}"), p.text.clone()));
        let metadata: BTreeMap<String, String> =
            texts.chain([("text".to_owned(), answer.answer.clone())]).collect();
        flmm::weights::save_safetensors(path, &raw, &metadata)?;
        talk.note(format_args!("maps: {}", path.display()));
    }
    Ok(())
}

/// One phrase's row of panels, and the soft IoU of the better cluster with the refined mask.
fn draw_phrase(
    image: &RgbImage,
    index: usize,
    phrase: &GroundedPhrase,
    maps: &Tensor,
    geometry: &Geometry,
    seed: u64,
) -> Result<(Vec<(String, RgbImage)>, f64)> {
    let maps = at_logit_size(maps, geometry)?;
    let (_, height, width) = maps.dims3().map_err(flmm::Error::from)?;
    let better = better_side(&maps, &phrase.mask, seed)?;
    let mean =
        maps.mean(0).and_then(|mean| mean.flatten_all()?.to_vec1::<f32>()).map_err(flmm::Error::from)?;
    let masked = |mask: &Mask| draw_mask(image, mask, index);
    let row = vec![
        (format!("{} {}", index + 1, phrase.text), image.clone()),
        ("mean attention".to_owned(), heat_map(image, &mean, (height, width))?),
        ("K-means".to_owned(), masked(&better.mask)?),
        ("coarse mask".to_owned(), masked(&phrase.coarse_mask)?),
        ("refined mask".to_owned(), masked(&phrase.mask)?),
    ];
    Ok((row, better.soft_iou))
}
