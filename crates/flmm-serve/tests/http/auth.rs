//! Keys, other origins, and what is open.

use axum::body::Body;
use axum::http::{Method, Request, StatusCode};
use flmm_serve::Settings;
use serde_json::json;

use crate::support::{app_with, get, question, send, settings};

const GUARDED: [(&str, &str); 7] = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/ground"),
    ("POST", "/v1/attention"),
    ("GET", "/v1/models"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
];

#[tokio::test]
async fn every_endpoint_but_health_and_the_page_asks_for_a_key() {
    let app = app_with(Settings { api_keys: vec!["first".into(), "second".into()], ..settings() });
    let request = |method: &str, path: &str, key: Option<&str>| {
        let mut request =
            Request::builder().method(method).uri(path).header("content-type", "application/json");
        if let Some(key) = key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        request.body(Body::from(question("What?").to_string())).unwrap()
    };
    for (method, path) in GUARDED.into_iter().chain([("GET", "/nothing")]) {
        for key in [None, Some("third"), Some("")] {
            let answer = send(&app, request(method, path, key)).await;
            assert_eq!(answer.error(), (401, "invalid_api_key".to_owned()), "{method} {path} {key:?}");
            assert_eq!(answer.headers["www-authenticate"], "Bearer");
        }
        let answer = send(&app, request(method, path, Some("second"))).await;
        assert_ne!(answer.status, StatusCode::UNAUTHORIZED, "{method} {path}");
    }
    for path in ["/health", "/", "/page.css", "/page/main.js"] {
        assert_eq!(get(&app, path).await.status, StatusCode::OK, "{path}");
    }
}

#[tokio::test]
async fn other_origins_are_let_in_only_where_named() {
    let preflight = |origin: &str| {
        let request = Request::builder().method(Method::OPTIONS).uri("/v1/models").header("origin", origin);
        request.header("access-control-request-method", "POST").body(Body::empty()).unwrap()
    };
    let closed = app_with(settings());
    let answer = send(&closed, preflight("https://example.org")).await;
    assert!(!answer.headers.contains_key("access-control-allow-origin"));
    let open = app_with(Settings { cors_origins: vec!["https://example.org".into()], ..settings() });
    let answer = send(&open, preflight("https://example.org")).await;
    assert_eq!(answer.headers["access-control-allow-origin"], "https://example.org");
    let answer = send(&open, preflight("https://example.com")).await;
    assert!(!answer.headers.contains_key("access-control-allow-origin"));
}

#[tokio::test]
async fn the_server_says_how_it_is() {
    let app = app_with(settings());
    assert_eq!(get(&app, "/health").await.ok(), json!({"status": "ok"}));
    assert_eq!(get(&app, "/ready").await.ok(), json!({"status": "ready"}));
    let models = get(&app, "/v1/models").await.ok();
    assert_eq!((&models["object"], &models["data"][0]["image_tokens"]), (&json!("list"), &json!(144)));
    assert!(get(&app, "/openapi.json").await.ok()["paths"]["/v1/chat/completions"].is_object());
    crate::support::chat(&app, &question("What?")).await.ok();
    let metrics = String::from_utf8(get(&app, "/metrics").await.body.to_vec()).unwrap();
    for name in [
        r#"flmm_requests_total{path="/v1/chat/completions",status="200"}"#,
        r#"flmm_stage_seconds_count{stage="generate"}"#,
        "flmm_queue_image_tokens",
        r#"flmm_tokens_total{kind="completion"}"#,
        "flmm_prefix_cache_bytes",
    ] {
        assert!(metrics.contains(name), "{name} is missing in {metrics}");
    }
    let page = get(&app, "/").await;
    let policy = page.headers["content-security-policy"].to_str().unwrap();
    assert!(policy.starts_with("default-src 'none'") && !policy.contains("unsafe"));
    let html = String::from_utf8(page.body.to_vec()).unwrap();
    assert!(!html.contains("http://") && !html.contains("https://") && !html.contains("style="));
}

#[tokio::test]
async fn without_its_model_the_server_lives_and_is_not_ready() {
    let app = flmm_serve::app_without_model(settings()).unwrap();
    assert_eq!(get(&app, "/health").await.status, StatusCode::OK);
    for answer in [get(&app, "/ready").await, crate::support::chat(&app, &question("What?")).await] {
        assert_eq!(answer.error(), (503, "model_loading".to_owned()));
        assert!(answer.headers.contains_key("retry-after"));
    }
}

#[tokio::test]
async fn foreign_names_are_refused_at_loopback() {
    let app = app_with(settings());
    let asked = |host: &str| Request::get("/").header("host", host).body(Body::empty()).unwrap();
    assert_eq!(send(&app, asked("127.0.0.1:8080")).await.status, StatusCode::OK);
    assert_eq!(send(&app, asked("evil.example")).await.error(), (421, "unknown_host".to_owned()));
}
