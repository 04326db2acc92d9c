//! A stand-in for a server that speaks OpenAI's chat protocol, on loopback.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

/// What the server does with a request.
pub(crate) enum Act {
    /// Replies with this text as a chat completion.
    Say(&'static str),
    /// Answers with this status, further header lines and body.
    Status(u16, &'static str, &'static str),
    /// Waits, then says something.
    Wait(Duration),
    /// Closes the connection without an answer.
    HangUp,
    /// Sends half of what it announces.
    BreakOff,
}

type Log = Arc<Mutex<Vec<(String, Value)>>>;

/// What is said to a request when the script is at its end.
type Otherwise = fn(&Value) -> &'static str;

pub(crate) struct FakeJudge {
    pub(crate) url: String,
    script: Arc<Mutex<VecDeque<Act>>>,
    log: Log,
}

impl FakeJudge {
    /// Does `acts` one after the other, then says "score: 1" for ever.
    pub(crate) fn new(acts: impl IntoIterator<Item = Act>) -> Self {
        Self::saying(acts, |_| "score: 1")
    }

    /// Does `acts` one after the other, then says what `otherwise` makes of a request.
    pub(crate) fn saying(acts: impl IntoIterator<Item = Act>, otherwise: Otherwise) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let script: Arc<Mutex<VecDeque<Act>>> = Arc::new(Mutex::new(acts.into_iter().collect()));
        let log = Log::default();
        let (acts, requests) = (script.clone(), log.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (acts, requests) = (acts.clone(), requests.clone());
                std::thread::spawn(move || serve(stream, &acts, &requests, otherwise));
            }
        });
        Self { url, script, log }
    }

    /// What will be done next.
    pub(crate) fn then(&self, act: Act) {
        self.script.lock().unwrap().push_back(act);
    }

    /// Head and body of the requests since the last call.
    pub(crate) fn requests(&self) -> Vec<(String, Value)> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

fn serve(stream: TcpStream, acts: &Mutex<VecDeque<Act>>, log: &Log, otherwise: Otherwise) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
        head = head + line + "\n";
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let asked: Value = serde_json::from_slice(&body).ok()?;
    let act = acts.lock().unwrap().pop_front().unwrap_or_else(|| Act::Say(otherwise(&asked)));
    log.lock().unwrap().push((head, asked));
    let mut stream = reader.into_inner();
    let completion =
        |text: &str| json!({ "choices": [{ "message": { "role": "assistant", "content": text } }] });
    let (status, headers, text) = match act {
        Act::Say(text) => (200, "", completion(text).to_string()),
        Act::Status(status, headers, text) => (status, headers, text.to_owned()),
        Act::Wait(time) => {
            std::thread::sleep(time);
            (200, "", completion("too late").to_string())
        }
        Act::HangUp => return None,
        Act::BreakOff => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{\"choices\"").ok()?;
            return None;
        }
    };
    let length = text.len();
    let answer = format!(
        "HTTP/1.1 {status} Status\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{text}"
    );
    stream.write_all(answer.as_bytes()).ok()
}
