//! `flmm chat`: questions in, grounded answers out.

use std::io::BufRead;
use std::path::{Path, PathBuf};

use flmm::grounder::{AnswerOptions, GroundOptions, GroundedAnswer, Sampling};
use flmm::lmm::Turn;
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
    let files: Vec<&PathBuf> = std::iter::once(&args.image).chain(&args.more).collect();
    let Some(grounded) = files.get(args.ground_image - 1) else {
        return Err(Failure::usage(
            format!("--ground-image {}: the conversation has {} picture(s)", args.ground_image, files.len()),
            "1 is IMAGE, 2 the first --image",
        ));
    };
    let overlay = if args.no_ground { None } else { overlay_place(grounded, &args.output)? };
    let images = files.iter().map(|file| picture::read(file)).collect::<Result<Vec<_>>>()?;
    let model = model::open(&args.model, talk)?;
    let mut options = options(&args.generate, !args.no_ground);
    options.ground.image = args.ground_image - 1;
    let mut session = model.grounder.start_with(&images)?;
    let show = Show {
        model: &model.name,
        image: &images[args.ground_image - 1],
        number: (images.len() > 1).then_some(args.ground_image),
        output: &args.output,
        overlay,
    };
    let mut ask = |question: &str| -> Result<()> {
        let question = turn(question, if session.turns.is_empty() { images.len() } else { 1 });
        let answer = {
            let _spinner = talk.during("answering");
            model.grounder.ask_turn(&mut session, question, &options)?
        };
        show.answer(&answer, talk)
    };
    if let Some(prompt) = &args.prompt {
        return ask(prompt);
    }
    let mut lines = std::io::stdin().lock().lines();
    loop {
        talk.ask();
        let Some(line) = lines.next() else { return Ok(()) };
        let question = line.map_err(|e| Failure::other(format!("cannot read the question: {e}")))?;
        if question.trim().is_empty() {
            return Ok(());
        }
        ask(question.trim())?;
    }
}

/// What a user writes where a picture is shown.
const MARK: &str = "<image>";

/// The question, with the pictures where it has [`MARK`]s for several.
fn turn(question: &str, images: usize) -> Turn {
    let mut pieces = question.split(MARK);
    if images == 1 || pieces.clone().count() == 1 {
        return Turn::user(question);
    }
    let first = Turn::user(pieces.next().unwrap_or_default());
    pieces.enumerate().fold(first, |turn, (image, piece)| turn.show(image).say(piece))
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
        stop_words: Vec::new(),
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
    /// Which picture that is, where there are several.
    pub(crate) number: Option<usize>,
    pub(crate) output: &'a OutputArgs,
    pub(crate) overlay: Option<PathBuf>,
}

impl Show<'_> {
    pub(crate) fn answer(&self, answer: &GroundedAnswer, talk: &Talk) -> Result<()> {
        let text = match self.output.json {
            true => report::json(self.model, (self.image, self.number), answer)?,
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
