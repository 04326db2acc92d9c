//! The page at `/`: files inside the program, which ask for nothing outside it.

use axum::extract::Path;
use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY};
use axum::response::{IntoResponse, Response};

use crate::error::ApiError;

/// Scripts and styles from this server alone, no inline ones; pictures may also be made in the page.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; \
    connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const SCRIPTS: [(&str, &str); 5] = [
    ("main.js", include_str!("../page/main.js")),
    ("api.js", include_str!("../page/api.js")),
    ("masks.js", include_str!("../page/masks.js")),
    ("view.js", include_str!("../page/view.js")),
    ("export.js", include_str!("../page/export.js")),
];

fn file(kind: &'static str, content: &'static str) -> Response {
    let headers = [
        (CONTENT_TYPE, kind),
        (CONTENT_SECURITY_POLICY, POLICY),
        (REFERRER_POLICY, "no-referrer"),
        (CACHE_CONTROL, "no-cache"),
    ];
    (headers, content).into_response()
}

/// `GET /`
pub(crate) async fn document() -> Response {
    file("text/html; charset=utf-8", include_str!("../page/index.html"))
}

/// `GET /page.css`
pub(crate) async fn style() -> Response {
    file("text/css; charset=utf-8", include_str!("../page/page.css"))
}

/// `GET /page/{name}`
pub(crate) async fn script(Path(name): Path<String>) -> Result<Response, ApiError> {
    match SCRIPTS.iter().find(|(known, _)| *known == name) {
        Some((_, content)) => Ok(file("text/javascript; charset=utf-8", content)),
        None => Err(crate::health::nothing().await),
    }
}
