//! Answers to questions, grounded while they are generated.

use std::collections::VecDeque;
use std::time::Instant;

use image::RgbImage;

use super::spans::{self, Chosen, Span};
use super::{AnswerOptions, GroundedAnswer, GroundedPhrase, Grounder, Sampling, Session, Timings};
use crate::capture::Capture;
use crate::error::Result;
use crate::lmm::Turn;
use crate::phrases::{PhraseChoice, token_offsets};
use crate::text::sampling::Sampler;
use crate::text::stop::StopWords;
use crate::text::stream::TextStream;
use crate::text::{Generation, Limits};

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
    /// `on_text` receives the text as it grows, piece by piece. See [`Grounder::begin_reply`].
    pub fn reply(
        &self,
        session: &mut Session,
        options: &AnswerOptions,
        on_text: &mut dyn FnMut(&str),
    ) -> Result<GroundedAnswer> {
        let mut reply = self.begin_reply(session, options)?;
        while let Some(text) = reply.step()? {
            if !text.is_empty() {
                on_text(&text);
            }
        }
        let mut phrases = Vec::new();
        let answer = reply.finish(&mut |phrase| phrases.push(phrase))?;
        Ok(GroundedAnswer { phrases, ..answer })
    }

    /// Reads the session's conversation and makes ready to answer its last turn, token by token.
    ///
    /// Attention rows are kept while generating, no second pass is made.
    pub fn begin_reply<'a>(
        &'a self,
        session: &'a mut Session,
        options: &'a AnswerOptions,
    ) -> Result<Reply<'a>> {
        // Known to be wrong before anything is computed.
        session.input(options.ground.image)?;
        let clock = Instant::now();
        let turns = session.turns.clone();
        let prompt = session.prompt(self.lmm(), &turns)?;
        let mut capture = options.phrases.is_some().then(|| Capture::from_position(prompt.len()));
        let hidden = session.read(self.lmm(), &prompt, capture.as_mut())?;
        let sampler = match options.sampling {
            Sampling::Greedy => Sampler::greedy(),
            Sampling::Seeded { temperature, top_p, seed } => Sampler::seeded(temperature, top_p, seed),
        };
        let limits = Limits { max_new_tokens: options.max_new_tokens, stop_ids: self.lmm.stop_ids() };
        let tokenizer = self.lmm.tokenizer();
        let words = options.stop_words.iter().map(String::as_str);
        let words = self.lmm.base().format.stop_word.into_iter().chain(words);
        Ok(Reply {
            grounder: self,
            session,
            options,
            prompt: prompt.len(),
            generation: Generation::new(hidden, limits, sampler),
            capture,
            stop: StopWords::new(tokenizer, words),
            stopped: false,
            stream: Some(TextStream::new(tokenizer, false)),
            held: VecDeque::new(),
            probs: Vec::new(),
            searched: 0,
            timings: Timings { read: clock.elapsed(), ..Timings::default() },
        })
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// With a token or a text that ends answers.
    Stop,
    /// With the most tokens, or a full context.
    Length,
}

/// An answer while it is generated. To give it up, drop it: the session can be used on.
///
/// The last token, normally the stop word, is dropped from the text: it is never fed back, so it has no row
/// (`spec/models.md` §12). Of a stop word of several tokens all are dropped.
pub struct Reply<'a> {
    grounder: &'a Grounder,
    session: &'a mut Session,
    options: &'a AnswerOptions,
    /// Tokens of the prompt.
    prompt: usize,
    generation: Generation<'a>,
    capture: Option<Capture>,
    stop: StopWords<'a>,
    stopped: bool,
    /// `None` when the answer has ended.
    stream: Option<TextStream<'a>>,
    /// Tokens not told yet: neither the last token nor a stop word is part of the answer.
    held: VecDeque<u32>,
    /// Keyword probabilities of the first tokens.
    probs: Vec<f32>,
    /// Number of tokens in which complete phrases have been looked for.
    searched: usize,
    timings: Timings,
}

impl Reply<'_> {
    /// Generates a token and returns the text that became certain with it, often a word, sometimes nothing; `None` when
    /// the answer has ended.
    pub fn step(&mut self) -> Result<Option<String>> {
        let Some(stream) = &mut self.stream else { return Ok(None) };
        let clock = Instant::now();
        let decoder = self.grounder.lmm.decoder();
        let next = match self.stopped {
            true => None,
            false => self.generation.step(decoder, &mut self.session.cache, self.capture.as_mut())?,
        };
        let mut text = String::new();
        match next {
            Some((id, _)) => {
                self.stopped = self.stop.push(id);
                self.held.push_back(id);
                while self.held.len() > self.stop.held()
                    && let Some(id) = self.held.pop_front()
                {
                    text += &stream.push(id);
                }
            }
            None => {
                let dropped = if self.stopped { self.held.len() } else { 1 };
                for id in self.held.drain(..self.held.len().saturating_sub(dropped)) {
                    text += &stream.push(id);
                }
                text += &self.stream.take().map(TextStream::finish).unwrap_or_default();
                let ids = self.told();
                if let Some(capture) = &mut self.capture {
                    capture.truncate(self.prompt + ids)?;
                }
                self.session.continued(&self.generation.ids()[..ids]);
            }
        }
        self.timings.generate += clock.elapsed();
        Ok(Some(text))
    }

    /// Number of tokens in the prompt, image tokens included.
    pub fn prompt_tokens(&self) -> usize {
        self.prompt
    }

    /// How many of the prompt's tokens the session had read before.
    pub fn tokens_reused(&self) -> usize {
        self.session.tokens_reused()
    }

    /// Why the answer ended, once it has.
    pub fn ended(&self) -> Option<Ended> {
        let stopped = self.stopped || self.generation.stopped();
        self.stream.is_none().then_some(if stopped { Ended::Stop } else { Ended::Length })
    }

    /// Grounds the phrases that have become complete since the last call, in order of the text.
    ///
    /// Keywords are complete at the next token that is none. Phrases of other choices are not known before the answer
    /// has ended, and without a trained head a mask depends on all phrases: those are left to [`Reply::finish`].
    pub fn complete_phrases(&mut self, on_phrase: &mut dyn FnMut(GroundedPhrase)) -> Result<()> {
        let by_keywords = self.options.phrases == Some(PhraseChoice::Keywords);
        if !by_keywords || self.grounder.training_free.is_some() {
            return Ok(());
        }
        let clock = Instant::now();
        let told = self.told();
        let lambda = self.options.ground.keyword_threshold;
        if !self.score(told)? {
            return Ok(());
        }
        // The run that the last token is part of may go on.
        let Some(end) = self.probs.iter().rposition(|&prob| prob <= lambda || prob.is_nan()) else {
            return Ok(());
        };
        let from = std::mem::replace(&mut self.searched, end);
        if !self.probs[from..end].iter().any(|&prob| prob > lambda) {
            return Ok(());
        }
        let tokenizer = self.grounder.lmm.tokenizer();
        let (text, offsets) = token_offsets(tokenizer, &self.generation.ids()[..=end]);
        let probs = &self.probs[..=end];
        let mut spans = spans::select(&PhraseChoice::Keywords, &text, &offsets, Some(probs), lambda)?;
        spans.retain(|span| span.tokens.start >= from);
        self.timings.segment += clock.elapsed();
        self.ground(&text, &spans, on_phrase)
    }

    /// Ends generating, if that has not happened, and grounds the phrases that [`Reply::complete_phrases`] has not given
    /// out; the answer comes without any.
    pub fn finish(mut self, on_phrase: &mut dyn FnMut(GroundedPhrase)) -> Result<GroundedAnswer> {
        while self.step()?.is_some() {}
        let ids = self.generation.ids()[..self.told()].to_vec();
        let (answer, offsets) = token_offsets(self.grounder.lmm.tokenizer(), &ids);
        if let Some(choice) = &self.options.phrases
            && !ids.is_empty()
        {
            let selector = self.score(ids.len())?;
            let lambda = self.options.ground.keyword_threshold;
            let probs = selector.then_some(self.probs.as_slice());
            let mut spans = spans::select(choice, &answer, &offsets, probs, lambda)?;
            spans.retain(|span| span.tokens.start >= self.searched);
            self.ground(&answer, &spans, on_phrase)?;
        }
        Ok(GroundedAnswer { answer, token_ids: ids, phrases: Vec::new(), timings: self.timings })
    }

    /// Number of tokens that are part of the answer for certain and have been fed to the decoder.
    fn told(&self) -> usize {
        self.generation.ids().len() - self.held.len()
    }

    /// Brings keyword probabilities up to the first `tokens`; false without a selector.
    fn score(&mut self, tokens: usize) -> Result<bool> {
        let head = &self.grounder.head;
        let Some(capture) = self.capture.as_ref().filter(|_| head.keyword_selector.is_some()) else {
            return Ok(false);
        };
        let known = self.probs.len();
        if known < tokens {
            let new: Vec<usize> = (self.prompt + known..self.prompt + tokens).collect();
            self.probs.extend(head.keyword_probs(&capture.hidden_rows(&new)?)?.unwrap_or_default());
        }
        Ok(true)
    }

    fn ground(
        &mut self,
        text: &str,
        spans: &[Span],
        on_phrase: &mut dyn FnMut(GroundedPhrase),
    ) -> Result<()> {
        let Some(capture) = &self.capture else { return Ok(()) };
        let selector = self.grounder.head.keyword_selector.is_some();
        let probs = selector.then_some(self.probs.as_slice());
        let options = &self.options.ground;
        let timings = &mut self.timings;
        let chosen = Chosen { text, spans, probs };
        self.grounder.ground_spans(self.session, capture, &chosen, options, timings, on_phrase)
    }
}
