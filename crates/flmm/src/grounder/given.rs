//! Grounding of a given text, read as if the model had said it.

use std::time::Instant;

use image::RgbImage;

use super::spans::{self, Chosen, Span};
use super::{Caption, GroundOptions, GroundedAnswer, GroundedPhrase, Grounder, Session, Timings};
use crate::capture::Capture;
use crate::error::{Error, Result};
use crate::lmm::{GROUNDING_INSTRUCTION, Turn};
use crate::phrases::{PhraseChoice, find_phrases, noun_phrases, token_offsets};

impl Grounder {
    /// Grounds phrases of a given `text`, read as if the model had said it about `picture`.
    ///
    /// Given phrases and noun phrases are encoded segment by segment, as in training; with the keyword selector
    /// the text is encoded in one piece.
    pub fn ground(
        &self,
        picture: &RgbImage,
        text: &str,
        choice: &PhraseChoice,
        options: &GroundOptions,
    ) -> Result<GroundedAnswer> {
        self.ground_in(&mut self.start(picture)?.once(), text, choice, options)
    }

    /// As [`Grounder::ground`], for a session: other texts about its picture reuse what is already computed.
    pub fn ground_in(
        &self,
        session: &mut Session,
        text: &str,
        choice: &PhraseChoice,
        options: &GroundOptions,
    ) -> Result<GroundedAnswer> {
        let mut phrases = Vec::new();
        let answer = self.ground_each(session, text, choice, options, &mut |phrase| phrases.push(phrase))?;
        Ok(GroundedAnswer { phrases, ..answer })
    }

    /// As [`Grounder::ground_in`], but gives phrases to `on_phrase`, so that masks of a large picture need not all be
    /// held at once; the answer comes without any.
    pub fn ground_each(
        &self,
        session: &mut Session,
        text: &str,
        choice: &PhraseChoice,
        options: &GroundOptions,
        on_phrase: &mut dyn FnMut(GroundedPhrase),
    ) -> Result<GroundedAnswer> {
        if text.trim().is_empty() {
            return Err(Error::request(
                "the text to ground is empty",
                "give a text that describes the picture",
            ));
        }
        session.input(options.image)?;
        let tokenizer = self.lmm.tokenizer();
        let ranges = match choice {
            PhraseChoice::Keywords if self.head.keyword_selector.is_some() => None,
            PhraseChoice::Keywords | PhraseChoice::NounPhrases => Some(noun_phrases(text)),
            PhraseChoice::Given(phrases) => Some(find_phrases(text, phrases)?),
        };
        // Phrases that share characters cannot be encoded one by one.
        let apart = ranges.filter(|ranges| !spans::overlapping(ranges));
        let mut caption = match &apart {
            Some(ranges) => Caption::from_ranges(tokenizer, text, ranges)?,
            None => Caption::from_segments(tokenizer, [(text, None)])?,
        };
        let clock = Instant::now();
        let prompt = session.prompt(self.lmm(), &[Turn::user(GROUNDING_INSTRUCTION)])?;
        let capture = self.read_caption(session, options.image, prompt, &mut caption)?;
        let timings = Timings { read: clock.elapsed(), ..Timings::default() };

        let positions: Vec<usize> = capture.positions().collect();
        let probs = self.head.keyword_probs(&capture.hidden_rows(&positions)?)?;
        let mut result = GroundedAnswer {
            answer: text.to_owned(),
            token_ids: caption.token_ids.clone(),
            phrases: Vec::new(),
            timings,
        };
        let spans = match &apart {
            Some(ranges) => {
                let phrases = caption.phrases()?;
                let spans = ranges.iter().zip(&phrases).map(|(chars, tokens)| Span {
                    chars: chars.clone(),
                    tokens: tokens[0]..tokens[0] + tokens.len(),
                });
                spans.collect()
            }
            None => {
                let (text, offsets) = token_offsets(tokenizer, &caption.token_ids);
                result.answer = text;
                spans::select(choice, &result.answer, &offsets, probs.as_deref(), options.keyword_threshold)?
            }
        };
        let chosen = Chosen { text: &result.answer, spans: &spans, probs: probs.as_deref() };
        self.ground_spans(session, &capture, &chosen, options, &mut result.timings, on_phrase)?;
        Ok(result)
    }

    /// Reads the ids of a prompt and a caption, whose phrases are sought in picture number `image`; the capture holds the
    /// caption's rows. A caption that is too long for a model that cuts sequences off is cut.
    pub(super) fn read_caption(
        &self,
        session: &mut Session,
        image: usize,
        prompt: Vec<u32>,
        caption: &mut Caption,
    ) -> Result<Capture> {
        if caption.token_ids.is_empty() {
            return Err(Error::request(
                "the text to ground has no tokens",
                "give a text that describes the picture",
            ));
        }
        let mut ids = prompt;
        if let Some(limit) = self.lmm.reads_at_most() {
            caption.cut(limit.saturating_sub(ids.len()))?;
        }
        let mut capture = session.capture(image, ids.len(), caption)?;
        ids.extend_from_slice(&caption.token_ids);
        session.read(self.lmm(), &ids, Some(&mut capture))?;
        Ok(capture)
    }
}
