//! Answers to questions, grounded while they are generated.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::time::Instant;

use image::RgbImage;

use super::{AnswerOptions, GroundedAnswer, Grounder, Sampling, Session, Timings, spans};
use crate::capture::Capture;
use crate::error::Result;
use crate::lmm::Turn;
use crate::phrases::token_offsets;
use crate::text::sampling::Sampler;
use crate::text::stop::StopWords;
use crate::text::stream::TextStream;
use crate::text::{Limits, generate};

impl Grounder {
    /// Answers the last of `turns` about `picture`. See [`Grounder::ask`].
    pub fn answer(
        &self,
        picture: &RgbImage,
        turns: &[Turn],
        options: &AnswerOptions,
    ) -> Result<GroundedAnswer> {
        let mut session = self.start(picture)?;
        session.turns = turns.to_vec();
        self.reply(&mut session, options, &mut |_| {})
    }

    /// Asks the next question of a conversation and adds question and answer to it. On an error the
    /// conversation is as before.
    pub fn ask(
        &self,
        session: &mut Session,
        question: &str,
        options: &AnswerOptions,
    ) -> Result<GroundedAnswer> {
        self.ask_turn(session, Turn::user(question), options)
    }

    /// As [`Grounder::ask`], with a question that has places for pictures ([`Turn::show`]).
    pub fn ask_turn(
        &self,
        session: &mut Session,
        question: Turn,
        options: &AnswerOptions,
    ) -> Result<GroundedAnswer> {
        let before = session.turns.len();
        session.turns.push(question);
        let answer = self.reply(session, options, &mut |_| {});
        match &answer {
            Ok(answer) => session.turns.push(Turn::assistant(&answer.answer)),
            Err(_) => session.turns.truncate(before),
        }
        answer
    }

    /// Generates the answer to the session's last turn and grounds its phrases; the turns stay as they are.
    ///
    /// Attention rows are kept while generating, no second pass is made. The last token, normally the stop word,
    /// is dropped from the text: it is never fed back, so it has no row (`spec/models.md` §12). Of a stop word of
    /// several tokens all are dropped. `on_text` receives the text as it grows, piece by piece.
    pub fn reply(
        &self,
        session: &mut Session,
        options: &AnswerOptions,
        on_text: &mut dyn FnMut(&str),
    ) -> Result<GroundedAnswer> {
        // Known to be wrong before anything is computed.
        session.input(options.ground.image)?;
        let mut timings = Timings::default();
        let clock = Instant::now();
        let turns = session.turns.clone();
        let prompt = session.prompt(self.lmm(), &turns)?;
        let mut capture = options.phrases.is_some().then(|| Capture::from_position(prompt.len()));
        let hidden = session.read(self.lmm(), &prompt, capture.as_mut())?;
        timings.read = clock.elapsed();

        let clock = Instant::now();
        let mut sampler = match options.sampling {
            Sampling::Greedy => Sampler::greedy(),
            Sampling::Seeded { temperature, top_p, seed } => Sampler::seeded(temperature, top_p, seed),
        };
        let limits = Limits { max_new_tokens: options.max_new_tokens, stop_ids: self.lmm.stop_ids() };
        let tokenizer = self.lmm.tokenizer();
        let words = options.stop_words.iter().map(String::as_str);
        let mut stop = StopWords::new(tokenizer, self.lmm.base().format.stop_word.into_iter().chain(words));
        // Told late: neither the last token nor a stop word is part of the answer.
        let mut stream = TextStream::new(tokenizer, false);
        let mut held = VecDeque::new();
        let mut stopped = false;
        let mut ids = generate(
            self.lmm.decoder(),
            &hidden,
            &mut session.cache,
            capture.as_mut(),
            limits,
            &mut sampler,
            |id, _| {
                stopped = stop.push(id);
                held.push_back(id);
                while held.len() > stop.held()
                    && let Some(id) = held.pop_front()
                {
                    tell(&stream.push(id), on_text);
                }
                if stopped { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            },
        )?;
        let dropped = if stopped { held.len() } else { 1 };
        for id in held.drain(..held.len().saturating_sub(dropped)) {
            tell(&stream.push(id), on_text);
        }
        tell(&stream.finish(), on_text);
        ids.truncate(ids.len().saturating_sub(dropped));
        if let Some(capture) = &mut capture {
            capture.truncate(prompt.len() + ids.len())?;
        }
        session.continued(&ids);
        timings.generate = clock.elapsed();

        let (answer, offsets) = token_offsets(tokenizer, &ids);
        let mut result = GroundedAnswer { answer, token_ids: ids, phrases: Vec::new(), timings };
        if let (Some(choice), Some(capture)) = (&options.phrases, &capture)
            && !result.token_ids.is_empty()
        {
            let positions: Vec<usize> = capture.positions().collect();
            let probs = self.head.keyword_probs(&capture.hidden_rows(&positions)?)?;
            let lambda = options.ground.keyword_threshold;
            let spans = spans::select(choice, &result.answer, &offsets, probs.as_deref(), lambda)?;
            self.ground_spans(session, capture, &mut result, &spans, probs.as_deref(), &options.ground)?;
        }
        Ok(result)
    }
}

fn tell(text: &str, on_text: &mut dyn FnMut(&str)) {
    if !text.is_empty() {
        on_text(text);
    }
}
