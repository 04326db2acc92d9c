//! `POST /v1/attention`

use std::collections::HashMap;
use std::io::Cursor;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use candle_core::Tensor;
use flmm::grounder::{AttentionChoice, Session, TokenAttention};
use flmm::layout::maps_in_picture;
use flmm::lmm::{Role, Turn};
use flmm::overlay::heat_map;
use safetensors::tensor::{Dtype, TensorView};

use crate::api::{AttentionFormat, AttentionRequest, Merged};
use crate::app::App;
use crate::body::Received;
use crate::chat::check_pictures;
use crate::engine::{Context, Wanted};
use crate::error::{ApiError, ErrorBody};
use crate::work::{self, Shown, Stop, served};
use crate::{conversation, pictures};

/// Side of a map in the picture's part of it, for drawings.
const DRAWN_SIDE: usize = 64;

/// Reads a conversation and tells where tokens of its last message, an answer, look in a picture: exactly the shares of
/// attention that the decoder computed.
///
/// A safetensors file with one tensor `attention [tokens, planes, layers, heads, rows, columns]`, f32. Its metadata:
/// `text`, what the tokens spell; `offsets`, first character of every token of the text and the one behind its last;
/// `tokens`, `layers`, `heads`, which ones the tensor holds; `picture`, where the picture lies in a map,
/// `[x, y, width, height]` in shares of it. All but `text` are JSON. Planes are views of the picture at several scales,
/// coarse first; most models have one.
#[utoipa::path(post, path = "/v1/attention", tag = "grounding", request_body = AttentionRequest, responses(
    (status = 200, description = "The attention", content(
        (Vec<u8> = "application/octet-stream"), (Vec<u8> = "image/png"))),
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
pub(crate) async fn attention(
    State(app): State<App>,
    Received { value: request, room }: Received<AttentionRequest>,
) -> Result<Response, ApiError> {
    let model = served(&app, request.model.as_deref())?;
    let limits = &app.settings().limits;
    let mut conversation = conversation::read(request.messages, model.image_end(), limits)?;
    check_pictures(model, conversation.urls.len(), request.image)?;
    let Some(Turn { text, .. }) = conversation.turns.pop_if(|turn| turn.role == Role::Assistant) else {
        let message = "the last message is not an answer";
        return Err(ApiError::bad_request("no_answer", message)
            .hint("end the conversation with a message of role `assistant`")
            .param("messages"));
    };
    let shown = pictures::bring(&app, conversation.urls, room).await?;
    let task = Task {
        choice: AttentionChoice {
            tokens: request.tokens,
            layers: request.layers,
            heads: request.heads,
            mean: request.merge == Merged::Mean || request.format == AttentionFormat::Png,
            most_values: limits.attention_values,
        },
        shown,
        turns: conversation.turns,
        text,
        image: request.image,
        format: request.format,
    };
    let pictures = task.shown.count();
    let file = work::run(&app, pictures, move |context, wanted| run(context, &task, wanted)).await?;
    let kind = match request.format {
        AttentionFormat::Safetensors => "application/octet-stream",
        AttentionFormat::Png => "image/png",
    };
    Ok(([(CONTENT_TYPE, kind)], file).into_response())
}

struct Task {
    shown: Shown,
    turns: Vec<Turn>,
    text: String,
    image: usize,
    choice: AttentionChoice,
    format: AttentionFormat,
}

fn run(context: &Context, task: &Task, wanted: &Wanted) -> Result<Vec<u8>, Stop> {
    wanted.check()?;
    let grounder = &context.model.grounder;
    task.shown.with_session(context, |session| {
        let read = grounder.token_attention(session, task.image, &task.turns, &task.text, &task.choice)?;
        Ok(match task.format {
            AttentionFormat::Safetensors => safetensors(&read)?,
            AttentionFormat::Png => drawing(&read, session, task.image)?,
        })
    })
}

fn failed(error: candle_core::Error) -> ApiError {
    flmm::Error::from(error).into()
}

fn safetensors(read: &TokenAttention) -> Result<Vec<u8>, ApiError> {
    let (tokens, planes, layers, heads, _) = read.maps.dims5().map_err(failed)?;
    let values = read.maps.flatten_all().and_then(|maps| maps.to_vec1::<f32>()).map_err(failed)?;
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let shape = vec![tokens, planes, layers, heads, read.size.0, read.size.1];
    let view = TensorView::new(Dtype::F32, shape, &bytes).map_err(|_| ApiError::internal())?;
    let json = |value: serde_json::Value| value.to_string();
    let metadata = HashMap::from([
        ("text".to_owned(), read.text.clone()),
        ("offsets".to_owned(), json(serde_json::json!(read.offsets))),
        ("tokens".to_owned(), json(serde_json::json!(read.tokens))),
        ("layers".to_owned(), json(serde_json::json!(read.layers))),
        ("heads".to_owned(), json(serde_json::json!(read.heads))),
        ("picture".to_owned(), json(serde_json::json!(picture_part(read)))),
    ]);
    ::safetensors::serialize([("attention", view)], Some(metadata)).map_err(|_| ApiError::internal())
}

/// Where the picture lies in a map, `[x, y, width, height]` in shares of it.
fn picture_part(read: &TokenAttention) -> [f64; 4] {
    let g = &read.geometry;
    if !g.crop {
        return [0.0, 0.0, 1.0, 1.0];
    }
    let share = |part: usize, whole: usize| part as f64 / whole.max(1) as f64;
    [
        share(g.before.1, g.padded_shape.1),
        share(g.before.0, g.padded_shape.0),
        share(g.image_shape.1, g.padded_shape.1),
        share(g.image_shape.0, g.padded_shape.0),
    ]
}

/// The picture under the mean of all maps.
fn drawing(read: &TokenAttention, session: &Session, image: usize) -> Result<Vec<u8>, ApiError> {
    let picture = session.picture(image).ok_or_else(ApiError::internal)?;
    let (rows, columns) = read.size;
    let scale = (DRAWN_SIDE as f64 / rows.max(columns).max(1) as f64).max(1.0);
    let side = |cells: usize| (cells as f64 * scale) as usize;
    let mean = |maps: &Tensor| maps.mean((0, 1, 2, 3))?.reshape((1, 1, rows, columns));
    let mean = mean(&read.maps).map_err(failed)?;
    let shown = maps_in_picture(&mean, &read.geometry, side(rows), side(columns))?;
    let (_, _, height, width) = shown.dims4().map_err(failed)?;
    let values = shown.flatten_all().and_then(|map| map.to_vec1::<f32>()).map_err(failed)?;
    let drawn = heat_map(picture, &values, (height, width))?;
    let mut file = Cursor::new(Vec::new());
    drawn.write_to(&mut file, image::ImageFormat::Png).map_err(|_| ApiError::internal())?;
    Ok(file.into_inner())
}
