//! Request bodies: size and time are bounded before memory is taken.

use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, StatusCode, header};
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::app::App;
use crate::error::ApiError;

/// A request's JSON. While it is held, its size counts as taken.
pub(crate) struct Received<T> {
    pub(crate) value: T,
    pub(crate) room: Room,
}

/// Room for a body or for pictures fetched for it; given back when dropped.
#[derive(Debug)]
pub(crate) struct Room {
    permit: OwnedSemaphorePermit,
}

impl Room {
    /// Room for so many bytes in `bodies`, which has a permit per KiB.
    ///
    /// # Errors
    /// [`ApiError`] 503 if there is not so much.
    pub(crate) fn take(bodies: &Arc<Semaphore>, bytes: usize) -> Result<Self, ApiError> {
        let permit = u32::try_from(kib(bytes)).ok();
        match permit.and_then(|kib| bodies.clone().try_acquire_many_owned(kib).ok()) {
            Some(permit) => Ok(Self { permit }),
            None => {
                let message = "too many request bodies are being held";
                Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "too_many_bodies", message)
                    .hint("try again, or send smaller pictures")
                    .retry_after(1))
            }
        }
    }

    /// Gives back what is more than `bytes` need.
    pub(crate) fn shrink_to(&mut self, bytes: usize) {
        let spare = self.permit.num_permits().saturating_sub(kib(bytes));
        drop(self.permit.split(spare));
    }

    /// Takes `other` in, to be given back with this.
    pub(crate) fn join(&mut self, other: Self) {
        self.permit.merge(other.permit);
    }
}

fn kib(bytes: usize) -> usize {
    bytes.div_ceil(1 << 10).max(1)
}

impl<T: DeserializeOwned + Send + 'static> FromRequest<App> for Received<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        check_type(request.headers())?;
        let limits = &app.settings().limits;
        let limit = limits.body_bytes;
        let declared = declared_length(request.headers());
        let asks_first = request.headers().contains_key(header::EXPECT);
        let body = request.into_body();
        let time = limits.body_time;
        if declared.is_some_and(|length| length > limit) {
            if !asks_first {
                let _ = tokio::time::timeout(time, discard(body, limit)).await;
            }
            return Err(too_large(limit));
        }
        let mut room = Room::take(app.bodies(), declared.unwrap_or(limit))?;
        let bytes = tokio::time::timeout(time, collect(body, limit)).await.map_err(|_| {
            let message = format!("the request's body did not arrive within {} s", time.as_secs());
            ApiError::new(StatusCode::REQUEST_TIMEOUT, "body_timeout", message)
        })??;
        room.shrink_to(bytes.len());
        let value = off_the_loop(bytes.len(), move || parse(&bytes)).await?;
        Ok(Self { value, room })
    }
}

/// Bytes that are worked on within less than a millisecond.
const QUICK: usize = 256 << 10;

/// Runs `work` on so many `bytes`: what is large, not on the threads that talk to clients.
pub(crate) async fn off_the_loop<T: Send + 'static>(
    bytes: usize,
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    match bytes <= QUICK {
        true => work(),
        false => tokio::task::spawn_blocking(work).await.map_err(|_| ApiError::internal())?,
    }
}

fn check_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let given = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    let essence = given.split(';').next().unwrap_or("").trim();
    match essence.eq_ignore_ascii_case("application/json") {
        true => Ok(()),
        false => Err(ApiError::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported_media_type",
            "the body must be JSON",
        )
        .hint("send `Content-Type: application/json`")),
    }
}

fn declared_length(headers: &HeaderMap) -> Option<usize> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn too_large(limit: usize) -> ApiError {
    let message = format!("the request's body is larger than {limit} bytes");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
        .hint("make the picture smaller; the models see at most about 1,000 pixels a side anyway")
}

async fn collect(mut body: Body, limit: usize) -> Result<Bytes, ApiError> {
    let mut all = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| ApiError::bad_request("body_cut", "the request's body was cut off"))?;
        let Ok(data) = frame.into_data() else { continue };
        if all.len() + data.len() > limit {
            discard(body, limit).await;
            return Err(too_large(limit));
        }
        all.extend_from_slice(&data);
    }
    Ok(all.into())
}

/// Reads on for a while without keeping anything: a client that is still sending would not see the response.
async fn discard(mut body: Body, limit: usize) {
    let mut left = limit.saturating_mul(4);
    while left > 0
        && let Some(Ok(frame)) = body.frame().await
    {
        left = left.saturating_sub(frame.data_ref().map_or(1, Bytes::len));
    }
}

/// Longest reason that is repeated: serde quotes values, and values may be pictures.
const LONGEST_REASON: usize = 200;

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(bytes).map_err(|error| {
        let reason: String = error.to_string().chars().take(LONGEST_REASON).collect();
        let place = format!("line {} column {}", error.line(), error.column());
        let reason = if reason.contains(&place) { reason } else { format!("{reason}… at {place}") };
        ApiError::bad_request("invalid_json", format!("the body cannot be read: {reason}"))
            .hint("/openapi.json describes what is expected")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::ChatRequest;

    #[test]
    fn room_is_taken_and_given_back() {
        let bodies = Arc::new(Semaphore::new(4));
        let mut room = Room::take(&bodies, 3 << 10).unwrap();
        assert_eq!(Room::take(&bodies, (1 << 10) + 1).unwrap_err().code, "too_many_bodies");
        room.shrink_to(1);
        assert_eq!(bodies.available_permits(), 3);
        room.join(Room::take(&bodies, 2 << 10).unwrap());
        assert_eq!(bodies.available_permits(), 1);
        drop(room);
        assert_eq!(bodies.available_permits(), 4);
    }

    #[test]
    fn reasons_are_short_and_say_where() {
        let long = format!(r#"{{"messages": "{}"}}"#, "A".repeat(1 << 20));
        let error = parse::<ChatRequest>(long.as_bytes()).unwrap_err();
        assert!(error.message.len() < 400 && error.message.contains("line 1 column"), "{}", error.message);
        let error = parse::<ChatRequest>(b"{").unwrap_err();
        assert!(error.message.contains("line 1 column 1"), "{}", error.message);
        let deep = "[".repeat(100_000);
        assert!(parse::<ChatRequest>(deep.as_bytes()).is_err());
        let many = format!(r#"{{"messages": [], "stop": [{}"a"]}}"#, r#""a","#.repeat(5000));
        assert!(
            parse::<ChatRequest>(many.as_bytes()).unwrap_err().message.contains("more than 4096 elements")
        );
    }
}
