//! `POST /v1/ground`

use axum::Json;
use axum::extract::State;
use flmm::grounder::{GroundOptions, Session};
use flmm::phrases::{PhraseChoice, find_phrases};

use crate::api::{GroundRequest, GroundResponse, ImageSize, PhraseRule, Phrases};
use crate::app::App;
use crate::body::Received;
use crate::engine::{Context, Wanted};
use crate::error::{ApiError, ErrorBody};
use crate::masks::Form;
use crate::pictures;
use crate::settings::Limits;
use crate::work::{self, Shown, Stop, served, threshold};

/// Grounds phrases of a given text, read as if the model had said it about the picture.
#[utoipa::path(post, path = "/v1/ground", tag = "grounding", request_body = GroundRequest, responses(
    (status = 200, description = "The phrases and their masks", body = GroundResponse),
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
pub(crate) async fn ground(
    State(app): State<App>,
    Received { value: request, room }: Received<GroundRequest>,
) -> Result<Json<GroundResponse>, ApiError> {
    served(&app, request.model.as_deref())?;
    let limits = &app.settings().limits;
    if request.text.len() > limits.text_bytes {
        let message = format!("{} bytes of text; at most {} are read", request.text.len(), limits.text_bytes);
        return Err(ApiError::bad_request("text_too_long", message).param("text"));
    }
    let options =
        GroundOptions { keyword_threshold: threshold(request.threshold)?, ..GroundOptions::default() };
    let choice = choice(request.phrases, &request.text, limits)?;
    let shown = pictures::bring(&app, vec![request.image.url], room).await?;
    let form = Form { image: 0, mask: request.mask, coarse: request.coarse };
    let task = Task { shown, text: request.text, choice, options, form };
    work::run(&app, 1, move |context, wanted| run(context, &task, wanted)).await.map(Json)
}

struct Task {
    shown: Shown,
    text: String,
    choice: PhraseChoice,
    options: GroundOptions,
    form: Form,
}

fn run(context: &Context, task: &Task, wanted: &Wanted) -> Result<GroundResponse, Stop> {
    wanted.check()?;
    task.shown.with_session(context, |session| respond(context, task, session))
}

fn respond(context: &Context, task: &Task, session: &mut Session) -> Result<GroundResponse, Stop> {
    work::look_ahead(context.model, session, 0);
    let mut annotations = Vec::new();
    let mut failed = None;
    let answer = context.model.grounder.ground_each(
        session,
        &task.text,
        &task.choice,
        &task.options,
        &mut |phrase| match task.form.annotation(annotations.len(), &phrase) {
            Ok(annotation) => annotations.push(annotation),
            Err(error) => failed = Some(error),
        },
    )?;
    if let Some(error) = failed {
        return Err(error.into());
    }
    let picture = session.picture(0).map_or((0, 0), image::RgbImage::dimensions);
    Ok(GroundResponse {
        model: context.model.name.clone(),
        image: ImageSize { width: picture.0, height: picture.1 },
        text: answer.answer,
        annotations,
        timings_ms: work::tell_timings(context, &answer.timings),
    })
}

/// How phrases are chosen; given ones are checked before anything is computed.
fn choice(phrases: Option<Phrases>, text: &str, limits: &Limits) -> Result<PhraseChoice, ApiError> {
    match phrases {
        None | Some(Phrases::Rule(PhraseRule::Keywords)) => Ok(PhraseChoice::Keywords),
        Some(Phrases::Rule(PhraseRule::NounPhrases)) => Ok(PhraseChoice::NounPhrases),
        Some(Phrases::Given(phrases)) if phrases.len() > limits.phrases => {
            let message = format!("{} phrases; at most {} are grounded", phrases.len(), limits.phrases);
            Err(ApiError::bad_request("too_many_phrases", message).param("phrases"))
        }
        Some(Phrases::Given(phrases)) => {
            find_phrases(text, &phrases).map_err(|error| ApiError::from(error).param("phrases"))?;
            Ok(PhraseChoice::Given(phrases))
        }
    }
}
