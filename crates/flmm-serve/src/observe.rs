//! What operators see: one log line and some numbers per request, and nothing of its content.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use metrics::{counter, gauge, histogram};
use metrics_exporter_prometheus::{BuildError, PrometheusBuilder, PrometheusHandle};
use tracing::Instrument;

use crate::app::App;
use crate::error::Reason;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Seconds: from a cached page to a long answer of a large model.
const BUCKETS: [f64; 13] = [0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0];

/// Name of a request, sent back as `x-request-id`.
#[derive(Debug, Clone)]
pub(crate) struct RequestId(pub(crate) String);

/// Starts counting; of several calls in one process all count together.
///
/// # Errors
/// If another recorder of the `metrics` crate is installed.
pub(crate) fn recorder() -> Result<PrometheusHandle, BuildError> {
    static HANDLE: Mutex<Option<PrometheusHandle>> = Mutex::new(None);
    // Held until the recorder is installed, so that a second call at the same time finds its handle.
    let mut handle = HANDLE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(handle) = &*handle {
        return Ok(handle.clone());
    }
    let installed = PrometheusBuilder::new().set_buckets(&BUCKETS)?.install_recorder()?;
    Ok(handle.insert(installed).clone())
}

/// Gives the request a name, logs it and counts it.
pub(crate) async fn request(mut request: Request, next: Next) -> Response {
    let id = given_id(&request).unwrap_or_else(new_id);
    request.extensions_mut().insert(RequestId(id.clone()));
    let method = request.method().clone();
    // Paths that are no routes are not repeated: they may be long, and metrics would grow with them.
    let path = request.extensions().get::<MatchedPath>().map_or("unknown", MatchedPath::as_str).to_owned();
    let clock = Instant::now();
    let span = tracing::info_span!("request", id);
    let mut response = next.run(request).instrument(span.clone()).await;
    let (status, time) = (response.status(), clock.elapsed());
    let reason = response.extensions().get::<Reason>().map(|reason| reason.0);
    span.in_scope(|| {
        let milliseconds = (time.as_secs_f64() * 1e4).round() / 10.0;
        tracing::info!(%method, path, status = status.as_u16(), milliseconds, reason, "answered");
    });
    let labels = [("path", path), ("status", status.as_str().to_owned())];
    counter!("flmm_requests_total", &labels).increment(1);
    histogram!("flmm_request_seconds", "path" => labels[0].1.clone()).record(time.as_secs_f64());
    if let Some(reason) = reason {
        counter!("flmm_rejected_total", "reason" => reason).increment(1);
    }
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    let nosniff = HeaderValue::from_static("nosniff");
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, nosniff);
    response
}

/// The client's own name of a request, if it is a short word.
fn given_id(request: &Request) -> Option<String> {
    let id = request.headers().get(REQUEST_ID)?.to_str().ok()?;
    let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (!id.is_empty() && id.len() <= 64 && id.chars().all(word)).then(|| id.to_owned())
}

/// A name that no other request of this or another server has.
fn new_id() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    static START: OnceLock<u64> = OnceLock::new();
    let start = START.get_or_init(|| RandomState::new().hash_one(std::process::id()));
    format!("{start:016x}{:08x}", COUNT.fetch_add(1, Ordering::Relaxed))
}

/// `GET /metrics`
#[utoipa::path(get, path = "/metrics", tag = "operations",
    responses((status = 200, description = "Counts and times in Prometheus' text format", content_type = "text/plain")))]
pub(crate) async fn metrics(State(app): State<App>) -> impl IntoResponse {
    if let Some(bytes) = resident_bytes() {
        gauge!("process_resident_memory_bytes").set(bytes as f64);
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], app.metrics().render())
}

/// Memory that the process holds, where the system tells.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
