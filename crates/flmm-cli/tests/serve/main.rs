//! `flmm serve` as a process: connections that break, stall and pile up, and signals.
#![cfg(unix)]

mod server;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread::sleep;
use std::time::{Duration, Instant};

use server::{Server, request};

const CHAT: &str = "/v1/chat/completions";

#[test]
fn an_answer_of_the_embedded_model_comes_over_the_wire() {
    let server = Server::start(&[]);
    let answer = server.post(CHAT, &request(false));
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert!(answer.body.contains(r#""type":"grounding""#) && answer.body.contains(r#""counts":"#));
    let streamed = server.post(CHAT, &request(true));
    assert!(streamed.body.contains("event: grounding") && streamed.body.contains("data: [DONE]"));
}

#[test]
fn work_for_clients_that_went_away_is_dropped() {
    let server = Server::start(&["--cache", "0"]);
    let gone: Vec<TcpStream> = (0..12).map(|_| server.send(CHAT, &request(true))).collect();
    server.until(|metrics| metrics.contains("flmm_queue_requests") && queued(metrics) > 2.0);
    drop(gone);
    server.until(|metrics| queued(metrics) == 0.0);
    let metrics = server.get("/metrics").body;
    let dropped: f64 = values(&metrics, "flmm_abandoned_total").sum();
    assert!(dropped >= 3.0, "{metrics}");
    assert_eq!(server.post(CHAT, &request(false)).status, 200);
}

#[test]
fn a_slow_upload_is_cut_off_and_harms_nobody() {
    let server = Server::start(&["--body-time", "2"]);
    let clock = Instant::now();
    let mut slow = server.connect();
    slow.write_all(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n",
    )
    .unwrap();
    slow.write_all(b"Content-Length: 100000\r\n\r\n").unwrap();
    assert_eq!(server.post(CHAT, &request(false)).status, 200);
    slow.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
    let mut answer = Vec::new();
    while answer.is_empty() && clock.elapsed() < Duration::from_secs(20) {
        // The server may have closed its half already; what it said is still there.
        let _ = slow.write_all(b" ");
        sleep(Duration::from_millis(200));
        let mut buffer = [0; 1024];
        if let Ok(count) = slow.read(&mut buffer) {
            answer.extend(&buffer[..count]);
        }
    }
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
}

#[test]
fn what_is_too_large_is_refused() {
    let server = Server::start(&["--max-body", "1"]);
    let large = vec![b' '; 50 << 20];
    let answer = server.post(CHAT, &large);
    assert_eq!(answer.status, 413, "{}", answer.body);
    assert!(answer.body.contains("body_too_large"));
    let head = |lines: String| {
        let mut stream = server.connect();
        stream
            .write_all(format!("GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n{lines}\r\n").as_bytes())
            .unwrap();
        server::read(stream).status
    };
    assert_eq!(head(String::new()), 200);
    assert_eq!(head((0..200).map(|i| format!("x-{i}: 1\r\n")).collect()), 431);
    assert_eq!(head(format!("x-long: {}\r\n", "a".repeat(100_000))), 431);
    assert!(server.resident_bytes() < 400e6, "{}", server.resident_bytes());
}

#[test]
fn ten_thousand_tiny_requests_are_answered() {
    let server = Server::start(&[]);
    let ask = |count: usize| {
        let mut stream = server.connect();
        for _ in 0..count {
            stream.write_all(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").unwrap();
            let mut answer = Vec::new();
            let mut buffer = [0; 1024];
            while !answer.ends_with(br#"{"status":"ok"}"#) {
                let count = stream.read(&mut buffer).unwrap();
                assert!(count > 0, "the connection was closed");
                answer.extend(&buffer[..count]);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..10 {
            scope.spawn(|| ask(1000));
        }
    });
    let broken: Vec<u16> = (0..200).map(|_| server.post(CHAT, b"{").status).collect();
    assert!(broken.iter().all(|&status| status == 400));
    assert_eq!(server.post(CHAT, &request(false)).status, 200);
}

#[test]
fn what_was_accepted_is_finished_after_sigterm() {
    let mut server = Server::start(&[]);
    let sent: Vec<TcpStream> = (0..8).map(|number| server.send(CHAT, &request(number % 2 == 0))).collect();
    // All are accepted, and not all have begun.
    let begun = r#"flmm_stage_seconds_count{stage="queue"}"#;
    server.until(|metrics| {
        queued(metrics) >= 1.0 && queued(metrics) + values(metrics, begun).sum::<f64>() == 8.0
    });
    server.terminate();
    for stream in sent {
        let answer = server::read(stream);
        assert_eq!(answer.status, 200, "{}", answer.body);
        assert!(answer.body.contains("[DONE]") || answer.body.contains(r#""usage""#), "{}", answer.body);
    }
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn keys_come_from_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys");
    std::fs::write(&file, "# for tests\nsecret\n").unwrap();
    let server = Server::start_with_key(&["--api-key-file", file.to_str().unwrap()], "secret");
    assert_eq!(server.get("/v1/models").status, 200);
    let mut stream = server.connect();
    stream.write_all(b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n").unwrap();
    assert_eq!(server::read(stream).status, 401);
    assert!(!server.log().contains("secret"));
}

fn queued(metrics: &str) -> f64 {
    values(metrics, "flmm_queue_requests").sum()
}

/// Values of a metric, of all its labels.
fn values<'a>(metrics: &'a str, name: &'a str) -> impl Iterator<Item = f64> + 'a {
    metrics
        .lines()
        .filter(move |line| line.starts_with(name))
        .filter_map(|line| line.split(' ').next_back()?.parse().ok())
}

#[test]
fn what_cannot_be_served_ends_with_a_reason() {
    let ran = |args: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_flmm"));
        let output = command.args(["serve", "--quiet"]).args(args).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap().to_string();
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().join("keys");
    std::fs::write(&empty, "\n# none\n").unwrap();
    let cases: [(&[&str], &str); 5] = [
        (&["--addr", &addr], "cannot listen at"),
        (&["--addr", "127.0.0.1:0", "--model", "no/such/folder"], "no/such/folder"),
        (&["--addr", "127.0.0.1:0", "--api-key-file", empty.to_str().unwrap()], "holds no key"),
        (&["--cors-origin", "https://example.org/page"], "without a path"),
        (&["--deadline", "18446744073709551615"], "a year"),
    ];
    for (args, reason) in cases {
        let (status, told) = ran(args);
        assert_eq!(status, Some(2), "{told}");
        assert!(told.contains(reason), "{told}");
    }
}
