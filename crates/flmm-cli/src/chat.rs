//! `flmm chat`: questions in, grounded answers out.

use std::io::BufRead;
use std::path::{Path, PathBuf};

use flmm::grounder::{AnswerOptions, GroundOptions, GroundedAnswer, Sampling};
use flmm::phrases::PhraseChoice;
use image::RgbImage;

use crate::args::{ChatArgs, GenerateArgs, OutputArgs, check_text};
use crate::failure::{Failure, Result};
use crate::talk::Talk;
use crate::{model, picture, report};

pub(crate) fn run(args: &ChatArgs, talk: &Talk) -> Result<()> {
    if let Some(prompt) = &args.prompt {
        check_text("the question", prompt)?;
    }
    let overlay = if args.no_ground { None } else { overlay_place(&args.image, &args.output)? };
    let image = picture::read(&args.image)?;
    let model = model::open(&args.model, talk)?;
    let options = options(&args.generate, !args.no_ground);
    let mut session = model.grounder.start(&image)?;
    let show = Show { model: &model.name, image: &image, output: &args.output, overlay };
    if let Some(prompt) = &args.prompt {
        let answer = {
            let _spinner = talk.during("answering");
            model.grounder.ask(&mut session, prompt, &options)?
        };
        return show.answer(&answer, talk);
    }
    let mut lines = std::io::stdin().lock().lines();
    loop {
        talk.ask();
        let Some(line) = lines.next() else { return Ok(()) };
        let question = line.map_err(|e| Failure::other(format!("cannot read the question: {e}")))?;
        if question.trim().is_empty() {
            return Ok(());
        }
        let answer = {
            let _spinner = talk.during("answering");
            model.grounder.ask(&mut session, question.trim(), &options)?
        };
        show.answer(&answer, talk)?;
    }
}

/// How to answer.
pub(crate) fn options(args: &GenerateArgs, ground: bool) -> AnswerOptions {
    let sampling = match args.temperature {
        0.0 => Sampling::Greedy,
        temperature => Sampling::Seeded { temperature, top_p: args.top_p, seed: args.seed },
    };
    AnswerOptions {
        max_new_tokens: args.max_new_tokens,
        sampling,
        phrases: ground.then_some(PhraseChoice::Keywords),
        ground: GroundOptions::default(),
    }
}

/// Where the overlay goes, if one is wanted.
pub(crate) fn overlay_place(image: &Path, output: &OutputArgs) -> Result<Option<PathBuf>> {
    match output.no_overlay {
        true => Ok(None),
        false => picture::destination(image, output.overlay.as_deref(), "overlay.png").map(Some),
    }
}

/// How answers about one picture are shown.
pub(crate) struct Show<'a> {
    pub(crate) model: &'a str,
    pub(crate) image: &'a RgbImage,
    pub(crate) output: &'a OutputArgs,
    pub(crate) overlay: Option<PathBuf>,
}

impl Show<'_> {
    pub(crate) fn answer(&self, answer: &GroundedAnswer, talk: &Talk) -> Result<()> {
        let text = match self.output.json {
            true => report::json(self.model, self.image, answer)?,
            false => report::text(answer, talk.colour()),
        };
        talk.print(&text)?;
        if answer.answer.trim().is_empty() {
            talk.note("the model said nothing");
        }
        if let Some(path) = &self.overlay {
            // Without a phrase there is nothing to draw, unless the user named the file.
            if answer.phrases.is_empty() && self.output.overlay.is_none() {
                talk.note("no phrase of the text speaks of something in the picture: no overlay written");
            } else {
                flmm::overlay::save_png(&report::overlay(self.image, answer)?, path)?;
                talk.note(format_args!("overlay: {}", path.display()));
            }
        }
        let t = &answer.timings;
        let seconds = |time: std::time::Duration| format!("{:.2} s", time.as_secs_f64());
        talk.detail(format_args!(
            "{} tokens; read {}, generate {}, encode {}, segment {}",
            answer.token_ids.len(),
            seconds(t.read),
            seconds(t.generate),
            seconds(t.encode),
            seconds(t.segment),
        ));
        Ok(())
    }
}
