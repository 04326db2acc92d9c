//! A server process, and a client that says exactly what it is told to.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Server {
    child: Child,
    addr: String,
    key: Option<String>,
    log: Arc<Mutex<String>>,
}

pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: String,
}

impl Server {
    /// A server with the embedded model that is ready.
    pub(crate) fn start(args: &[&str]) -> Self {
        Self::launch(args, None)
    }

    /// The same, asked with a key.
    pub(crate) fn start_with_key(args: &[&str], key: &str) -> Self {
        Self::launch(args, Some(key.to_owned()))
    }

    fn launch(args: &[&str], key: Option<String>) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_flmm"));
        command.args(["serve", "--addr", "127.0.0.1:0"]).args(args);
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let log = Arc::new(Mutex::new(String::new()));
        let addr = loop {
            let line = lines.next().expect("the server ended").unwrap();
            if let Some(addr) = line.strip_prefix("listening at http://") {
                break addr.to_owned();
            }
        };
        let kept = log.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                *kept.lock().unwrap() += &(line + "\n");
            }
        });
        let server = Self { child, addr, key, log };
        let clock = Instant::now();
        while server.get("/ready").status != 200 {
            assert!(clock.elapsed() < PATIENCE, "never ready");
            sleep(Duration::from_millis(20));
        }
        server
    }

    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.addr).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Sends a request and does not wait for the answer.
    pub(crate) fn send(&self, path: &str, body: &[u8]) -> TcpStream {
        let mut stream = self.connect();
        let key = self.key_header();
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n{key}Content-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        // A server that refuses may stop reading.
        let _ = stream.write_all(body);
        stream
    }

    fn key_header(&self) -> String {
        self.key.as_ref().map(|key| format!("Authorization: Bearer {key}\r\n")).unwrap_or_default()
    }

    pub(crate) fn post(&self, path: &str, body: &[u8]) -> Answer {
        read(self.send(path, body))
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        let mut stream = self.connect();
        let key = self.key_header();
        let head = format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{key}Connection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        read(stream)
    }

    /// Waits until the metrics are as wanted.
    pub(crate) fn until(&self, wanted: impl Fn(&str) -> bool) {
        let clock = Instant::now();
        loop {
            let metrics = self.get("/metrics").body;
            if wanted(&metrics) {
                return;
            }
            assert!(clock.elapsed() < PATIENCE, "{metrics}");
        }
    }

    pub(crate) fn resident_bytes(&self) -> f64 {
        let metrics = self.get("/metrics").body;
        let line = metrics.lines().find(|line| line.starts_with("process_resident_memory_bytes"));
        assert!(line.is_some() || !cfg!(target_os = "linux"), "{metrics}");
        line.and_then(|line| line.split(' ').next_back()?.parse().ok()).unwrap_or(0.0)
    }

    /// What was logged so far.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    pub(crate) fn terminate(&self) {
        let sent = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        let clock = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(clock.elapsed() < PATIENCE, "the server does not end");
            sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Status and body of what comes; chunks are not taken apart.
pub(crate) fn read(mut stream: TcpStream) -> Answer {
    let mut bytes = Vec::new();
    let mut buffer = [0; 65536];
    loop {
        match stream.read(&mut buffer) {
            Ok(count) if count > 0 => bytes.extend(&buffer[..count]),
            _ => break,
        }
        // Without `Connection: close`, the answer to a short request is over when its length has come.
        let text = String::from_utf8_lossy(&bytes);
        if let Some((head, body)) = text.split_once("\r\n\r\n")
            && let Some(length) = head.to_lowercase().split("content-length: ").nth(1)
            && length.lines().next().is_some_and(|length| length.trim().parse() == Ok(body.len()))
        {
            break;
        }
    }
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let status = text.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    let body = text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default();
    Answer { status, body }
}

/// A question about an example picture.
pub(crate) fn request(stream: bool) -> Vec<u8> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/scene.png");
    let url = format!("data:image/png;base64,{}", STANDARD.encode(std::fs::read(file).unwrap()));
    let content = json!([
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "Please give me a description of the image."},
    ]);
    json!({"messages": [{"role": "user", "content": content}], "stream": stream}).to_string().into_bytes()
}
