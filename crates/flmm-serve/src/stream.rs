//! Answers as server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio_stream::Stream;

use crate::answer::Event;
use crate::api::{Chunk, ChunkChoice, Delta, FinishReason, Usage};
use crate::chat::Envelope;
use crate::engine::Waiting;
use crate::error::ApiError;

/// Name of events that tell a phrase.
const GROUNDING: &str = "grounding";
/// A comment is sent so often while nothing happens, so that proxies keep the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Waits for the first event, so that what is refused has a status of its own, and streams the rest.
pub(crate) async fn respond(
    envelope: Envelope,
    mut events: UnboundedReceiver<Event>,
    waiting: Waiting,
    include_usage: bool,
) -> Result<Response, ApiError> {
    match events.recv().await {
        Some(Event::Failed(error)) => Err(error),
        None => Err(ApiError::internal()),
        Some(first) => {
            let mut chunks = Chunks {
                envelope,
                events,
                include_usage,
                ready: VecDeque::new(),
                ended: false,
                _waiting: waiting,
            };
            let role = Delta { role: Some("assistant"), content: Some(String::new()), ..Delta::default() };
            chunks.push(None, Some((role, None)), None);
            chunks.take(first);
            let keep_alive = KeepAlive::new().interval(KEEP_ALIVE);
            Ok(Sse::new(chunks).keep_alive(keep_alive).into_response())
        }
    }
}

/// Events of the model as events of the stream. When the client goes, this is dropped, and the model stops.
struct Chunks {
    envelope: Envelope,
    events: UnboundedReceiver<Event>,
    include_usage: bool,
    ready: VecDeque<sse::Event>,
    ended: bool,
    _waiting: Waiting,
}

impl Chunks {
    fn take(&mut self, event: Event) {
        match event {
            Event::Begun => {}
            Event::Text(text) => {
                let delta = Delta { content: Some(text), ..Delta::default() };
                self.push(None, Some((delta, None)), None);
            }
            Event::Phrase(annotation) => {
                let delta = Delta { annotations: vec![*annotation], ..Delta::default() };
                self.push(Some(GROUNDING), Some((delta, None)), None);
            }
            Event::Done(reason, usage) => {
                self.push(None, Some((Delta::default(), Some(reason))), None);
                if self.include_usage {
                    self.push(None, None, Some(usage));
                }
                self.end();
            }
            Event::Failed(error) => self.fail(&error),
        }
    }

    /// A chunk, as an event of its own name or of none.
    fn push(
        &mut self,
        name: Option<&str>,
        choice: Option<(Delta, Option<FinishReason>)>,
        usage: Option<Usage>,
    ) {
        let choice = choice.map(|(delta, finish_reason)| ChunkChoice { index: 0, delta, finish_reason });
        let chunk = Chunk {
            id: self.envelope.id.clone(),
            object: "chat.completion.chunk",
            created: self.envelope.created,
            model: self.envelope.model.clone(),
            choices: choice.into_iter().collect(),
            usage,
        };
        let event = name.map_or_else(sse::Event::default, |name| sse::Event::default().event(name));
        match event.json_data(&chunk) {
            Ok(event) => self.ready.push_back(event),
            Err(error) => {
                tracing::error!(%error, "a chunk cannot be written");
                self.fail(&ApiError::internal());
            }
        }
    }

    /// Official clients raise what comes as `error`.
    fn fail(&mut self, error: &ApiError) {
        self.ready.extend(sse::Event::default().json_data(error.body()));
        self.end();
    }

    fn end(&mut self) {
        self.ready.push_back(sse::Event::default().data("[DONE]"));
        self.ended = true;
    }
}

impl Stream for Chunks {
    type Item = Result<sse::Event, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(event)));
            }
            if self.ended {
                return Poll::Ready(None);
            }
            match self.events.poll_recv(context) {
                Poll::Ready(Some(event)) => self.take(event),
                // The model thread went away without a word: it panicked.
                Poll::Ready(None) => self.fail(&ApiError::internal()),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}
