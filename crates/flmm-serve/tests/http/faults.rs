//! What goes wrong, and what is answered then.

use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use flmm_serve::{Limits, Settings};
use serde_json::{Value, json};

use crate::support::{
    app, app_with, chat, data_url, get, picture, post_bytes, question, send, settings, with,
};

/// A question about a picture at `url`.
fn about(url: &str) -> Value {
    json!({"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]}]})
}

/// A PNG whose header says `width × height`, with no pixels behind it.
fn png_header(width: u32, height: u32) -> Vec<u8> {
    let mut bytes = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR".to_vec();
    bytes.extend(width.to_be_bytes());
    bytes.extend(height.to_be_bytes());
    bytes.extend([8, 2, 0, 0, 0]);
    let crc = crc32(&bytes[12..]);
    bytes.extend(crc.to_be_bytes());
    bytes.extend(b"\0\0\0\0IDAT");
    bytes.extend(crc32(b"IDAT").to_be_bytes());
    bytes
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(
            crc ^ u32::from(*byte),
            |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 },
        )
    };
    !bytes.iter().fold(!0, step)
}

#[tokio::test]
async fn every_wrong_request_has_its_status_and_code() {
    let app = app();
    let image = || json!({"type": "image_url", "image_url": {"url": data_url(&picture())}});
    let long = "zebra ".repeat(3000);
    let wrong = [
        (json!({}), 400, "invalid_json"),
        (json!({"messages": []}), 400, "no_image"),
        (json!({"messages": [{"role": "user", "content": "What?"}]}), 400, "no_image"),
        (json!({"messages": [{"role": "robot", "content": "What?"}]}), 400, "invalid_json"),
        (json!({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}), 400, "invalid_part"),
        (
            json!({"messages": [{"role": "user", "content": [image(), image(), image()]}]}),
            400,
            "too_many_images",
        ),
        (json!({"messages": [{"role": "user", "content": [image(), image()]}]}), 400, "invalid_request"),
        (json!({"messages": [{"role": "user", "content": [image()]}]}), 400, "invalid_request"),
        (about("file:///etc/passwd"), 400, "unsupported_url"),
        (about("/etc/passwd"), 400, "unsupported_url"),
        (about("http://127.0.0.1/a.png"), 403, "remote_images_off"),
        (about("data:image/png,abc"), 400, "invalid_data_url"),
        (about("data:image/png;base64,???"), 400, "invalid_data_url"),
        (about(&data_url(b"not a picture")), 400, "invalid_image"),
        (about(&data_url(&png_header(60_000, 60_000))), 400, "invalid_image"),
        (about(&data_url(&png_header(16_000, 16_000))), 400, "invalid_image"),
        (about(&data_url(&png_header(10, 10))), 400, "invalid_image"),
        (about(&data_url(&picture()[..200])), 400, "invalid_image"),
        (question(" "), 400, "invalid_request"),
        (question(&long), 400, "invalid_request"),
        (question("<image>"), 400, "invalid_request"),
        (with(question("What?"), json!({"model": "../../etc/passwd"})), 404, "model_not_found"),
        (with(question("What?"), json!({"temperature": -1})), 400, "invalid_value"),
        (with(question("What?"), json!({"top_p": 0})), 400, "invalid_value"),
        (with(question("What?"), json!({"max_tokens": 0})), 400, "invalid_value"),
        (with(question("What?"), json!({"max_tokens": -1})), 400, "invalid_json"),
        (with(question("What?"), json!({"stop": ["a", "b", "c", "d", "e"]})), 400, "invalid_value"),
        (with(question("What?"), json!({"stop": ""})), 400, "invalid_value"),
        (with(question("What?"), json!({"n": 2})), 400, "unsupported"),
        (with(question("What?"), json!({"tools": [{}]})), 400, "unsupported"),
        (with(question("What?"), json!({"logprobs": true})), 400, "unsupported"),
        (with(question("What?"), json!({"grounding": "yes"})), 400, "invalid_json"),
        (with(question("What?"), json!({"grounding": {"image": 1}})), 400, "no_such_image"),
        (with(question("What?"), json!({"grounding": {"threshold": -1}})), 400, "invalid_threshold"),
    ];
    for (body, status, code) in wrong {
        for stream in [false, true] {
            let body = with(body.clone(), json!({"stream": stream}));
            let answer = chat(&app, &body).await;
            let found = answer.error();
            let shown: String = body.to_string().chars().take(300).collect();
            assert_eq!(found, (status, code.to_owned()), "{shown}: {:?}", answer.body);
        }
    }
    // The server lives.
    chat(&app, &question("What?")).await.ok();
}

#[tokio::test]
async fn bodies_are_bounded() {
    let limits = Limits { body_bytes: 200_000, body_time: Duration::from_millis(300), ..Limits::default() };
    let app = app_with(Settings { limits, ..settings() });
    let path = "/v1/chat/completions";
    let error = async |body: Vec<u8>| post_bytes(&app, path, body).await.error();
    assert_eq!(error(vec![b' '; 300_000]).await, (413, "body_too_large".to_owned()));
    assert_eq!(error(b"{".to_vec()).await, (400, "invalid_json".to_owned()));
    assert_eq!(error(vec![b'['; 100_000]).await, (400, "invalid_json".to_owned()));
    assert_eq!(error(Vec::new()).await, (400, "invalid_json".to_owned()));
    let plain = Request::post(path).body(Body::from("{}")).unwrap();
    assert_eq!(send(&app, plain).await.error(), (415, "unsupported_media_type".to_owned()));

    // A client that asks first is told before it sends anything.
    let asks =
        Request::post(path).header("content-type", "application/json").header("expect", "100-continue");
    let silent = Body::from_stream(tokio_stream::pending::<Result<Vec<u8>, std::io::Error>>());
    let asks = asks.header("content-length", "300000").body(silent).unwrap();
    let answer = tokio::time::timeout(Duration::from_millis(200), send(&app, asks)).await.expect("no answer");
    assert_eq!(answer.error(), (413, "body_too_large".to_owned()));

    let json = |body| Request::post(path).header("content-type", "application/json").body(body).unwrap();
    // A length that is not declared, and a body that stalls.
    let endless = tokio_stream::iter((0..10).map(|_| Ok::<_, std::io::Error>(vec![b' '; 50_000])));
    let answer = send(&app, json(Body::from_stream(endless))).await;
    assert_eq!(answer.error(), (413, "body_too_large".to_owned()));
    let stalled = Body::from_stream(tokio_stream::pending::<Result<Vec<u8>, std::io::Error>>());
    assert_eq!(send(&app, json(stalled)).await.error(), (408, "body_timeout".to_owned()));
}

#[tokio::test]
async fn all_bodies_together_are_bounded() {
    let limits = Limits { bodies_bytes: 4 << 10, ..Limits::default() };
    let app = app_with(Settings { limits, ..settings() });
    let answer = chat(&app, &question("What?")).await;
    assert_eq!(answer.error(), (503, "too_many_bodies".to_owned()));
    assert!(answer.headers.contains_key("retry-after"));
}

#[tokio::test]
async fn wrong_addresses_and_methods_are_told() {
    let app = app();
    assert_eq!(get(&app, "/v1/engines").await.error(), (404, "not_found".to_owned()));
    assert_eq!(get(&app, "/page/../Cargo.toml").await.error(), (404, "not_found".to_owned()));
    assert_eq!(get(&app, "/page/secret.js").await.error(), (404, "not_found".to_owned()));
    assert_eq!(get(&app, "/v1/ground").await.error(), (405, "method_not_allowed".to_owned()));
}

#[tokio::test]
async fn a_full_queue_refuses_with_a_time_to_try_again() {
    let app = app_with(Settings { queue_image_tokens: Some(2 * 144), ..settings() });
    let requests: Vec<_> = (0..24)
        .map(|_| {
            let app = app.clone();
            tokio::spawn(
                async move { chat(&app, &question("Please give me a description of the image.")).await },
            )
        })
        .collect();
    let (mut served, mut refused) = (0, 0);
    for request in requests {
        let answer = request.await.unwrap();
        match answer.status.as_u16() {
            200 => served += 1,
            _ => {
                assert_eq!(answer.error(), (429, "queue_full".to_owned()));
                let seconds: u64 = answer.headers["retry-after"].to_str().unwrap().parse().unwrap();
                assert!((1..=60).contains(&seconds));
                refused += 1;
            }
        }
    }
    // Two may wait, whether the model has begun or not.
    assert!(served >= 2 && refused > 0, "{served} served, {refused} refused");
}

#[tokio::test]
async fn a_deadline_ends_what_takes_too_long() {
    let app = app_with(Settings { deadline: Duration::ZERO, ..settings() });
    assert_eq!(chat(&app, &question("What?")).await.error(), (504, "deadline_exceeded".to_owned()));
}
