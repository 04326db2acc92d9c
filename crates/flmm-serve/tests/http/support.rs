//! A router with the shipped model, and requests to it.

use std::path::Path;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, Request, StatusCode};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use flmm::Grounder;
use flmm::grounder::ModelPaths;
use flmm_serve::{Limits, Named, Settings};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;

pub(crate) const NAME: &str = "flmm-tiny";

pub(crate) fn repository(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

pub(crate) fn grounder() -> Grounder {
    let paths = ModelPaths::bundle(&repository("models/flmm-tiny"));
    Grounder::open(&paths, &candle_core::Device::Cpu, candle_core::DType::F32).unwrap()
}

pub(crate) fn settings() -> Settings {
    Settings { limits: Limits { pictures: 2, phrases: 3, ..Limits::default() }, ..Settings::default() }
}

pub(crate) fn app_with(settings: Settings) -> Router {
    flmm_serve::app(settings, Named { name: NAME.into(), grounder: grounder() }).unwrap()
}

pub(crate) fn app() -> Router {
    app_with(settings())
}

/// A picture of the repository as bytes.
pub(crate) fn picture() -> Vec<u8> {
    std::fs::read(repository("examples/scene.png")).unwrap()
}

/// Bytes as a data URL.
pub(crate) fn data_url(bytes: &[u8]) -> String {
    format!("data:image/png;base64,{}", STANDARD.encode(bytes))
}

/// A question about the picture.
pub(crate) fn question(text: &str) -> Value {
    json!({"messages": [{"role": "user", "content": [
        {"type": "text", "text": text},
        {"type": "image_url", "image_url": {"url": data_url(&picture())}},
    ]}]})
}

/// `value` with the fields of `more`.
pub(crate) fn with(mut value: Value, more: Value) -> Value {
    let fields = more.as_object().unwrap().clone();
    value.as_object_mut().unwrap().extend(fields);
    value
}

pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {:?}", self.body))
    }

    /// The JSON of a success.
    #[track_caller]
    pub(crate) fn ok(&self) -> Value {
        assert_eq!(self.status, StatusCode::OK, "{:?}", self.body);
        self.json()
    }

    /// Status and code of an error, which must be complete.
    #[track_caller]
    pub(crate) fn error(&self) -> (u16, String) {
        let error = self.json()["error"].clone();
        assert!(error["message"].as_str().is_some_and(|message| message.len() > 5), "{error}");
        (self.status.as_u16(), error["code"].as_str().unwrap().to_owned())
    }
}

pub(crate) async fn send(app: &Router, request: Request<Body>) -> Answer {
    let response = app.clone().oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    Answer { status: parts.status, headers: parts.headers, body }
}

pub(crate) async fn get(app: &Router, path: &str) -> Answer {
    send(app, Request::get(path).body(Body::empty()).unwrap()).await
}

pub(crate) async fn post(app: &Router, path: &str, body: &Value) -> Answer {
    post_bytes(app, path, body.to_string().into_bytes()).await
}

pub(crate) async fn post_bytes(app: &Router, path: &str, body: Vec<u8>) -> Answer {
    let request = Request::post(path).header("content-type", "application/json").body(body.into());
    send(app, request.unwrap()).await
}

pub(crate) async fn chat(app: &Router, body: &Value) -> Answer {
    post(app, "/v1/chat/completions", body).await
}

/// Events of a stream: name and data.
pub(crate) fn events(body: &[u8]) -> Vec<(String, String)> {
    let text = std::str::from_utf8(body).unwrap();
    let field = |block: &str, name: &str| {
        let line = block.lines().find_map(|line| line.strip_prefix(name));
        line.map(|value| value.trim().to_owned()).unwrap_or_default()
    };
    let blocks = text.split("\n\n").filter(|block| !block.trim().is_empty() && !block.starts_with(':'));
    blocks.map(|block| (field(block, "event:"), field(block, "data:"))).collect()
}
