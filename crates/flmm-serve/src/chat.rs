//! `POST /v1/chat/completions`

use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use flmm::grounder::{AnswerOptions, GroundOptions, Sampling};
use flmm::phrases::PhraseChoice;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::answer::{self, Event, Question};
use crate::api::{
    ChatCompletion, ChatRequest, Choice, GroundingOptions, PhraseRule, ResponseMessage, StopWords,
};
use crate::app::App;
use crate::body::Received;
use crate::engine::{Waiting, Wanted};
use crate::error::{ApiError, ErrorBody};
use crate::masks::Form;
use crate::model::Model;
use crate::observe::RequestId;
use crate::settings::Limits;
use crate::work::{MARGIN, late, served, threshold};
use crate::{conversation, pictures, stream};

/// Tokens of an answer where nothing else is said, as on the command line.
const MAX_TOKENS: usize = 512;

/// Where an answer goes.
pub(crate) struct Envelope {
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
}

/// Answers the last question of a conversation about pictures.
///
/// With `stream`, the answer is a stream of server-sent events: chunks of text, events named `grounding` as soon as a phrase
/// is complete (chunks as well, with `delta.annotations`), and `data: [DONE]`.
#[utoipa::path(post, path = "/v1/chat/completions", tag = "chat", request_body = ChatRequest, responses(
    (status = 200, description = "The answer", body = ChatCompletion),
    (status = 400, description = "The request is wrong", body = ErrorBody),
    (status = 401, description = "A key is needed", body = ErrorBody),
    (status = 403, description = "A picture's address may not be fetched", body = ErrorBody),
    (status = 404, description = "Another model is served", body = ErrorBody),
    (status = 408, description = "The body did not arrive in time", body = ErrorBody),
    (status = 413, description = "The body is too large", body = ErrorBody),
    (status = 415, description = "The body is not JSON", body = ErrorBody),
    (status = 429, description = "Too much is waiting; Retry-After tells when to try again", body = ErrorBody),
    (status = 502, description = "A picture could not be fetched", body = ErrorBody),
    (status = 503, description = "The model is loading or the server is stopping", body = ErrorBody),
    (status = 504, description = "The deadline has passed", body = ErrorBody)))]
pub(crate) async fn complete(
    State(app): State<App>,
    Extension(id): Extension<RequestId>,
    Received { value: request, room }: Received<ChatRequest>,
) -> Result<Response, ApiError> {
    let model = served(&app, request.model.as_deref())?;
    let limits = &app.settings().limits;
    refuse_unsupported(&request)?;
    let grounding =
        request.grounding.clone().map_or_else(|| Some(GroundingOptions::default()), |g| g.options());
    let options = options(&request, grounding.as_ref(), limits)?;
    let streamed = request.stream.unwrap_or(false);
    let include_usage = request.stream_options.as_ref().and_then(|o| o.include_usage).unwrap_or(false);
    let conversation = conversation::read(request.messages, model.image_end(), limits)?;
    check_pictures(model, conversation.urls.len(), options.ground.image)?;

    let shown = pictures::bring(&app, conversation.urls, room).await?;
    let grounding = grounding.unwrap_or_default();
    let question = Question {
        turns: conversation.turns,
        form: Form { image: grounding.image, mask: grounding.mask, coarse: grounding.coarse },
        shown,
        options,
    };
    let (events, receiver) = unbounded_channel();
    let deadline = app.settings().deadline;
    let (wanted, waiting) = Wanted::within(deadline);
    app.engine().submit(question.shown.count(), wanted.clone(), move |context| {
        answer::answer(context, &question, &wanted, &events);
    })?;
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let envelope = Envelope { id: format!("chatcmpl-{}", id.0), created, model: model.name.clone() };
    let whole = async {
        match streamed {
            true => stream::respond(envelope, receiver, waiting, include_usage).await,
            false => collect(envelope, receiver, waiting).await.map(|answer| Json(answer).into_response()),
        }
    };
    tokio::time::timeout(deadline + MARGIN, whole).await.map_err(|_| late())?
}

/// Waits for the whole answer.
async fn collect(
    envelope: Envelope,
    mut events: UnboundedReceiver<Event>,
    _waiting: Waiting,
) -> Result<ChatCompletion, ApiError> {
    let mut message =
        ResponseMessage { role: "assistant", content: String::new(), refusal: None, annotations: Vec::new() };
    while let Some(event) = events.recv().await {
        match event {
            Event::Begun => {}
            Event::Text(text) => message.content += &text,
            Event::Phrase(annotation) => message.annotations.push(*annotation),
            Event::Failed(error) => return Err(error),
            Event::Done(finish_reason, usage) => {
                let Envelope { id, created, model } = envelope;
                let choices = vec![Choice { index: 0, message, finish_reason, logprobs: None }];
                return Ok(ChatCompletion { id, object: "chat.completion", created, model, choices, usage });
            }
        }
    }
    // The model thread went away without a word: it panicked.
    Err(ApiError::internal())
}

fn refuse_unsupported(request: &ChatRequest) -> Result<(), ApiError> {
    let refuse = |param, what: &str| {
        Err(ApiError::bad_request("unsupported", format!("{what} not supported")).param(param))
    };
    match request {
        ChatRequest { n: Some(n), .. } if *n != 1 => refuse("n", "several answers to one question are"),
        ChatRequest { tools: Some(tools), .. } if !tools.is_empty() => refuse("tools", "tools are"),
        ChatRequest { logprobs: Some(true), .. } => refuse("logprobs", "probabilities of tokens are"),
        _ => Ok(()),
    }
}

fn options(
    request: &ChatRequest,
    grounding: Option<&GroundingOptions>,
    limits: &Limits,
) -> Result<AnswerOptions, ApiError> {
    let wrong = |param, message: &str| ApiError::bad_request("invalid_value", message).param(param);
    let temperature = request.temperature.unwrap_or(0.0);
    if !(0.0..=2.0).contains(&temperature) {
        return Err(wrong("temperature", "the temperature is not between 0 and 2"));
    }
    let top_p = request.top_p.unwrap_or(1.0);
    if !(top_p > 0.0 && top_p <= 1.0) {
        return Err(wrong("top_p", "top_p is not above 0 and at most 1"));
    }
    let tokens = request.max_completion_tokens.or(request.max_tokens).unwrap_or(MAX_TOKENS);
    if tokens == 0 {
        return Err(wrong("max_tokens", "max_tokens is not at least 1"));
    }
    let stop_words = match &request.stop {
        None => Vec::new(),
        Some(StopWords::One(word)) => vec![word.clone()],
        Some(StopWords::Several(words)) => words.clone(),
    };
    if stop_words.len() > limits.stop_words
        || stop_words.iter().any(|word| word.is_empty() || word.len() > limits.stop_word_bytes)
    {
        let message = format!(
            "stop has more than {} texts, or one that is empty or longer than {} bytes",
            limits.stop_words, limits.stop_word_bytes
        );
        return Err(wrong("stop", &message));
    }
    let sampling = match temperature > 0.0 {
        true => Sampling::Seeded { temperature, top_p, seed: request.seed.unwrap_or_else(any_seed) },
        false => Sampling::Greedy,
    };
    let mut ground = GroundOptions::default();
    if let Some(options) = grounding {
        ground.image = options.image;
        ground.keyword_threshold = threshold(options.threshold)?;
    }
    let phrases = grounding.map(|options| match options.phrases {
        PhraseRule::Keywords => PhraseChoice::Keywords,
        PhraseRule::NounPhrases => PhraseChoice::NounPhrases,
    });
    // The library counts the token that ends the answer, clients do not.
    let max_new_tokens = tokens.min(limits.tokens).saturating_add(1);
    Ok(AnswerOptions { max_new_tokens, sampling, stop_words, phrases, ground })
}

/// A seed that nobody chose.
fn any_seed() -> u64 {
    use std::hash::BuildHasher;
    std::collections::hash_map::RandomState::new().hash_one(0)
}

/// Refuses pictures that the model cannot take, and a picture to ground in that there is not.
pub(crate) fn check_pictures(model: &Model, count: usize, ground: usize) -> Result<(), ApiError> {
    model.grounder.lmm().check_images(count)?;
    if ground >= count {
        let message = format!("there is no picture {ground}: the conversation has {count}, counted from 0");
        return Err(ApiError::bad_request("no_such_image", message).param("image"));
    }
    Ok(())
}
