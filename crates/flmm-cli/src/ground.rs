//! `flmm ground`: masks for the words of a given text.

use flmm::grounder::GroundOptions;
use flmm::phrases::{PhraseChoice, find_phrases};

use crate::args::{GroundArgs, check_text};
use crate::chat::{Show, overlay_place};
use crate::failure::{Failure, Result};
use crate::talk::Talk;
use crate::{model, picture};

pub(crate) fn run(args: &GroundArgs, talk: &Talk) -> Result<()> {
    let choice = choice(&args.text, &args.phrase)?;
    let overlay = overlay_place(&args.image, &args.output)?;
    let image = picture::read(&args.image)?;
    let model = model::open(&args.model, talk)?;
    let answer = {
        let _spinner = talk.during("grounding");
        model.grounder.ground(&image, &args.text, &choice, &GroundOptions::default())?
    };
    let show = Show { model: &model.name, image: &image, number: None, output: &args.output, overlay };
    show.answer(&answer, talk)
}

/// The phrases the user gave, checked against the text; without any, the model chooses.
pub(crate) fn choice(text: &str, phrases: &[String]) -> Result<PhraseChoice> {
    check_text("the text", text)?;
    phrases.iter().try_for_each(|phrase| check_text("the phrase", phrase))?;
    if phrases.is_empty() {
        return Ok(PhraseChoice::Keywords);
    }
    find_phrases(text, phrases).map_err(|e| {
        Failure::usage(e.to_string(), e.hint().unwrap_or("give a part of the text").to_owned())
    })?;
    Ok(PhraseChoice::Given(phrases.to_vec()))
}
