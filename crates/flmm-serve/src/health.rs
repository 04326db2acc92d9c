//! Whether the server lives, is ready, and what it serves.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use crate::api::{ModelDetail, ModelList, Status};
use crate::app::App;
use crate::engine::stopping;
use crate::error::{ApiError, ErrorBody};

/// `GET /health`
#[utoipa::path(get, path = "/health", tag = "operations", security(()),
    responses((status = 200, description = "The server lives; whether it has its model is not said", body = Status)))]
pub(crate) async fn alive() -> Json<Status> {
    Json(Status { status: "ok" })
}

/// `GET /ready`
#[utoipa::path(get, path = "/ready", tag = "operations", responses(
    (status = 200, description = "The model is loaded and requests are taken", body = Status),
    (status = 503, description = "Not yet, or not any more", body = ErrorBody)))]
pub(crate) async fn ready(State(app): State<App>) -> Result<Json<Status>, ApiError> {
    app.engine().model()?;
    match app.engine().is_closed() {
        false => Ok(Json(Status { status: "ready" })),
        true => Err(stopping()),
    }
}

/// `GET /v1/models`
#[utoipa::path(get, path = "/v1/models", tag = "models", responses(
    (status = 200, description = "The model that is served", body = ModelList),
    (status = 503, description = "The model is still being loaded", body = ErrorBody)))]
pub(crate) async fn models(State(app): State<App>) -> Result<Json<ModelList>, ApiError> {
    let model = app.engine().model()?;
    let lmm = model.grounder.lmm();
    let spec = lmm.spec();
    let detail = ModelDetail {
        id: model.name.clone(),
        object: "model",
        created: 0,
        owned_by: "flmm",
        family: spec.name,
        layers: spec.layers,
        heads: spec.heads,
        context: lmm.decoder().config().max_positions,
        image_tokens: model.image_tokens,
        several_images: spec.several_images,
        keyword_selector: model.grounder.head().keyword_selector.is_some(),
    };
    Ok(Json(ModelList { object: "list", data: vec![detail] }))
}

/// What answers where there is no route.
pub(crate) async fn nothing() -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "not_found", "there is nothing at this address")
        .hint("/openapi.json lists what there is")
}

/// What answers a wrong method.
pub(crate) async fn wrong_method() -> ApiError {
    let message = "this address does not know this method";
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
        .hint("/openapi.json lists what there is")
}
