//! The router, and what all handlers share.

use std::sync::Arc;

use axum::Router;
use axum::middleware;
use axum::response::IntoResponse;
use axum::routing::{get, post};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::Semaphore;
use tower_http::catch_panic::CatchPanicLayer;

use crate::auth::Keys;
use crate::engine::Engine;
use crate::error::ApiError;
use crate::fetch::Fetcher;
use crate::settings::Settings;
use crate::{attention, chat, ground, health, host, observe, page};

/// What handlers share.
#[derive(Clone)]
pub(crate) struct App(Arc<Shared>);

struct Shared {
    settings: Settings,
    engine: Engine,
    keys: Keys,
    fetcher: Option<Fetcher>,
    /// One permit per KiB of request bodies and of pictures fetched for them.
    bodies: Arc<Semaphore>,
    metrics: PrometheusHandle,
}

impl App {
    pub(crate) fn new(settings: Settings, engine: Engine, metrics: PrometheusHandle) -> Self {
        let kib = (settings.limits.bodies_bytes >> 10).min(Semaphore::MAX_PERMITS);
        let fetcher = settings.remote_images.then(|| Fetcher::new(&settings.limits));
        Self(Arc::new(Shared {
            keys: Keys::new(&settings.api_keys),
            bodies: Arc::new(Semaphore::new(kib)),
            settings,
            engine,
            fetcher,
            metrics,
        }))
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.0.settings
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.0.engine
    }

    pub(crate) fn keys(&self) -> &Keys {
        &self.0.keys
    }

    /// What fetches pictures, where that is allowed.
    pub(crate) fn fetcher(&self) -> Option<&Fetcher> {
        self.0.fetcher.as_ref()
    }

    pub(crate) fn bodies(&self) -> &Arc<Semaphore> {
        &self.0.bodies
    }

    pub(crate) fn metrics(&self) -> &PrometheusHandle {
        &self.0.metrics
    }
}

/// The routes; `app` need not have its model yet.
pub(crate) fn router(app: App) -> Router {
    let asked_for_a_key = Router::new()
        .route("/v1/chat/completions", post(chat::complete))
        .route("/v1/ground", post(ground::ground))
        .route("/v1/attention", post(attention::attention))
        .route("/v1/models", get(health::models))
        .route("/ready", get(health::ready))
        .route("/metrics", get(observe::metrics))
        .route("/openapi.json", get(crate::openapi::document))
        .fallback(health::nothing)
        .method_not_allowed_fallback(health::wrong_method)
        .layer(middleware::from_fn_with_state(app.clone(), crate::auth::check));
    let open = Router::new()
        .route("/health", get(health::alive))
        .route("/", get(page::document))
        .route("/page.css", get(page::style))
        .route("/page/{name}", get(page::script))
        .method_not_allowed_fallback(health::wrong_method);
    let cors = crate::cors::layer(&app.settings().cors_origins);
    let router = asked_for_a_key.merge(open);
    let router = match cors {
        Some(cors) => router.layer(cors),
        None => router,
    };
    let router = router.layer(middleware::from_fn_with_state(app.clone(), host::check));
    // A bug must cost one request, not its connection's others.
    let router = router.layer(CatchPanicLayer::custom(|_| ApiError::internal().into_response()));
    router.layer(middleware::from_fn(observe::request)).with_state(app)
}
