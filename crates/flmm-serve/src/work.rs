//! What model threads do for every kind of request.

use std::time::Duration;

use axum::http::StatusCode;
use flmm::grounder::{Session, Timings};
use flmm::image_input::Limits;
use image::RgbImage;
use metrics::{counter, histogram};
use tokio::sync::oneshot;

use crate::api::TimingsMs;
use crate::app::App;
use crate::body::Room;
use crate::engine::{Context, Halt, Wanted};
use crate::error::ApiError;
use crate::model::Model;
use crate::pictures;
use crate::prefixes;

/// After a deadline, the model threads are given so long to say so themselves.
pub(crate) const MARGIN: Duration = Duration::from_secs(2);

/// Pictures of a request, and the room that they take until the request is done.
pub(crate) struct Shown {
    files: Vec<Vec<u8>>,
    _room: Room,
    limits: Limits,
}

/// Why work ended without a result.
#[derive(Debug)]
pub(crate) enum Stop {
    /// Nobody waits for it.
    Gone,
    /// The client is told.
    Failed(ApiError),
}

impl From<Halt> for Stop {
    fn from(halt: Halt) -> Self {
        match halt {
            Halt::Gone => Self::Gone,
            Halt::Late => Self::Failed(late()),
        }
    }
}

impl<E: Into<ApiError>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// The error of a request whose time is over.
pub(crate) fn late() -> ApiError {
    let message = "the request took longer than the server's deadline";
    ApiError::new(StatusCode::GATEWAY_TIMEOUT, "deadline_exceeded", message)
        .hint("ask for fewer tokens, or try again when the server is less busy")
}

/// Runs `work` about `pictures` pictures on a model thread and waits for its result.
///
/// # Errors
/// [`ApiError`] of the work; 429 or 503 if it is not taken, 504 after the deadline.
pub(crate) async fn run<T: Send + 'static>(
    app: &App,
    pictures: usize,
    work: impl FnOnce(&Context, &Wanted) -> Result<T, Stop> + Send + 'static,
) -> Result<T, ApiError> {
    let (sender, receiver) = oneshot::channel();
    let deadline = app.settings().deadline;
    let (wanted, _waiting) = Wanted::within(deadline);
    app.engine().submit(pictures, wanted.clone(), move |context| {
        // A receiver that has gone needs no answer.
        match work(context, &wanted) {
            Ok(result) => drop(sender.send(Ok(result))),
            Err(Stop::Failed(error)) => drop(sender.send(Err(error))),
            Err(Stop::Gone) => tell_abandoned(),
        }
    })?;
    let result = tokio::time::timeout(deadline + MARGIN, receiver).await.map_err(|_| late())?;
    // A sender that went away without a word panicked.
    result.map_err(|_| ApiError::internal())?
}

/// The model that is served, if it is the one that was asked for.
///
/// # Errors
/// [`ApiError`] 503 while it is loaded, 404 where another one is asked for.
pub(crate) fn served<'a>(app: &'a App, asked: Option<&str>) -> Result<&'a Model, ApiError> {
    let model = app.engine().model()?;
    match asked {
        Some(name) if name != model.name => {
            let name: String = name.chars().take(80).collect();
            let message = format!("the model `{name}` is not served here");
            Err(ApiError::new(StatusCode::NOT_FOUND, "model_not_found", message)
                .hint(format!("ask for `{}`, or leave `model` out", model.name))
                .param("model"))
        }
        _ => Ok(model),
    }
}

/// The server's λ: a share, the published one unless given.
pub(crate) fn threshold(given: Option<f32>) -> Result<f32, ApiError> {
    let threshold = given.unwrap_or(flmm::phrases::LAMBDA);
    match (0.0..=1.0).contains(&threshold) {
        true => Ok(threshold),
        false => Err(ApiError::bad_request("invalid_threshold", "the threshold is not between 0 and 1")
            .param("threshold")),
    }
}

impl Shown {
    /// Files whose headers were checked against `limits`.
    pub(crate) fn new(files: Vec<Vec<u8>>, room: Room, limits: Limits) -> Self {
        Self { files, _room: room, limits }
    }

    /// Number of pictures.
    pub(crate) fn count(&self) -> usize {
        self.files.len()
    }

    /// Works with a session about the pictures: one that has seen them, or a new one. Also when the work fails or is given up,
    /// the session is kept for the next request.
    pub(crate) fn with_session<T>(
        &self,
        context: &Context,
        work: impl FnOnce(&mut Session) -> Result<T, Stop>,
    ) -> Result<T, Stop> {
        let key = prefixes::key(self.files.iter().map(Vec::as_slice));
        let mut session = match context.prefixes.take(&key) {
            Some(session) => session,
            None => context.model.grounder.start_with(&self.decoded()?)?,
        };
        let done = work(&mut session);
        context.prefixes.put(key, session);
        done
    }

    fn decoded(&self) -> Result<Vec<RgbImage>, ApiError> {
        let files = self.files.iter().enumerate();
        files.map(|(number, file)| pictures::decode(file, number, &self.limits)).collect()
    }
}

/// Lets SAM look beside the LMM, where there is a processor for it.
pub(crate) fn look_ahead(model: &Model, session: &mut Session, image: usize) {
    if std::thread::available_parallelism().is_ok_and(|threads| threads.get() > 1) {
        model.grounder.look_ahead(session, image);
    }
}

/// Counts the stages of a request that is done, and gives them in milliseconds.
pub(crate) fn tell_timings(context: &Context, timings: &Timings) -> TimingsMs {
    let stages = [
        ("read", timings.read),
        ("generate", timings.generate),
        ("encode", timings.encode),
        ("segment", timings.segment),
    ];
    for (stage, time) in stages {
        histogram!("flmm_stage_seconds", "stage" => stage).record(time.as_secs_f64());
    }
    let ms = |time: Duration| (time.as_secs_f64() * 1e4).round() / 10.0;
    TimingsMs {
        queue: ms(context.waited),
        read: ms(timings.read),
        generate: ms(timings.generate),
        encode: ms(timings.encode),
        segment: ms(timings.segment),
    }
}

/// Counts a request that was given up.
pub(crate) fn tell_abandoned() {
    counter!("flmm_abandoned_total", "stage" => "model").increment(1);
}
