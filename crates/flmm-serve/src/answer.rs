//! Answers on a model thread: events as they come.

use flmm::grounder::{AnswerOptions, Ended, Session};
use flmm::lmm::Turn;
use metrics::counter;
use tokio::sync::mpsc::UnboundedSender;

use crate::api::{Annotation, FinishReason, PromptTokensDetails, Usage};
use crate::engine::{Context, Wanted};
use crate::error::ApiError;
use crate::masks::Form;
use crate::work::{self, Shown, Stop};

/// A question that was checked.
pub(crate) struct Question {
    pub(crate) turns: Vec<Turn>,
    pub(crate) shown: Shown,
    pub(crate) options: AnswerOptions,
    /// How phrases are told.
    pub(crate) form: Form,
}

/// What happens while a question is answered.
#[derive(Debug)]
pub(crate) enum Event {
    /// The prompt has been read.
    Begun,
    /// Text to append.
    Text(String),
    /// A phrase has become complete.
    Phrase(Box<Annotation>),
    /// That was all.
    Done(FinishReason, Usage),
    /// There will be no more.
    Failed(ApiError),
}

/// Answers `question` and tells what happens. The receiver bounds nothing: an answer has a most number of tokens, and a
/// client that reads slowly must not hold up the model.
pub(crate) fn answer(
    context: &Context,
    question: &Question,
    wanted: &Wanted,
    events: &UnboundedSender<Event>,
) {
    match run(context, question, wanted, events) {
        Ok(()) => {}
        Err(Stop::Gone) => work::tell_abandoned(),
        Err(Stop::Failed(error)) => tell(events, Event::Failed(error)),
    }
}

fn run(
    context: &Context,
    question: &Question,
    wanted: &Wanted,
    events: &UnboundedSender<Event>,
) -> Result<(), Stop> {
    wanted.check()?;
    let (reason, usage) =
        question.shown.with_session(context, |session| reply(context, question, wanted, events, session))?;
    tell(events, Event::Done(reason, usage));
    Ok(())
}

fn reply(
    context: &Context,
    question: &Question,
    wanted: &Wanted,
    events: &UnboundedSender<Event>,
    session: &mut Session,
) -> Result<(FinishReason, Usage), Stop> {
    let grounder = &context.model.grounder;
    let options = &question.options;
    session.turns.clone_from(&question.turns);
    if options.phrases.is_some() {
        work::look_ahead(context.model, session, options.ground.image);
    }
    let mut reply = grounder.begin_reply(session, options)?;
    tell(events, Event::Begun);
    let mut told = 0;
    let mut failed = None;
    let mut on_phrase = |phrase: flmm::grounder::GroundedPhrase| match question.form.annotation(told, &phrase)
    {
        Ok(annotation) => {
            told += 1;
            tell(events, Event::Phrase(Box::new(annotation)));
        }
        Err(error) => failed = Some(error),
    };
    while let Some(text) = reply.step()? {
        if !text.is_empty() {
            tell(events, Event::Text(text));
        }
        wanted.check()?;
        // Also where nothing is streamed, so that masks do not depend on streaming.
        reply.complete_phrases(&mut on_phrase)?;
    }
    let reason = match reply.ended() {
        Some(Ended::Length) => FinishReason::Length,
        _ => FinishReason::Stop,
    };
    let (prompt_tokens, cached_tokens) = (reply.prompt_tokens(), reply.tokens_reused());
    let answer = reply.finish(&mut on_phrase)?;
    if let Some(error) = failed {
        return Err(error.into());
    }
    let completion_tokens = answer.token_ids.len();
    let usage = Usage {
        prompt_tokens,
        completion_tokens,
        total_tokens: prompt_tokens + completion_tokens,
        prompt_tokens_details: PromptTokensDetails { cached_tokens },
    };
    work::tell_timings(context, &answer.timings);
    for (kind, count) in
        [("prompt", prompt_tokens), ("cached", cached_tokens), ("completion", completion_tokens)]
    {
        counter!("flmm_tokens_total", "kind" => kind).increment(count as u64);
    }
    counter!("flmm_phrases_total").increment(told as u64);
    Ok((reason, usage))
}

fn tell(events: &UnboundedSender<Event>, event: Event) {
    // A receiver that has gone is noticed by `Wanted`.
    let _ = events.send(event);
}
