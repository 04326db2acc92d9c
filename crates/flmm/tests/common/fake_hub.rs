//! A stand-in for the Hugging Face hub on loopback, as far as its way of serving files goes: a list of files, small
//! files behind a redirect on the same host, large ones on another host.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};

use sha2::{Digest, Sha256};

/// What one revision of `org/model` holds, and how the server misbehaves.
#[derive(Default)]
pub(crate) struct Script {
    /// Commit of every revision.
    pub(crate) revisions: BTreeMap<String, String>,
    /// Files of every commit.
    pub(crate) files: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    /// Status and error code instead of an answer to everything.
    pub(crate) refusal: Option<(u16, &'static str)>,
    /// Only requests with this token are answered.
    pub(crate) token: Option<&'static str>,
    /// After so many bytes of a body the connection is cut; as often as numbers are left.
    pub(crate) cuts: Vec<usize>,
    /// Files whose content comes with one bit changed.
    pub(crate) corrupt: BTreeSet<String>,
    /// Whether ranges are ignored.
    pub(crate) no_ranges: bool,
    /// Content name given for every file instead of the right one.
    pub(crate) etag: Option<&'static str>,
    /// Every request: host name (`hub` or `cdn`), method, path, and its headers in lower case.
    pub(crate) log: Vec<(&'static str, String, String, BTreeMap<String, String>)>,
}

pub(crate) struct FakeHub {
    pub(crate) endpoint: String,
    script: Arc<Mutex<Script>>,
}

pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

pub(crate) fn sha256(bytes: &[u8]) -> String {
    flmm::hex(Sha256::digest(bytes))
}

impl FakeHub {
    /// A server with `files` at commit [`COMMIT`], which is `main`.
    pub(crate) fn new(files: &[(&str, &[u8])]) -> Self {
        let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (hub, cdn) = (listen(), listen());
        let address = |of: &TcpListener| format!("http://{}", of.local_addr().unwrap());
        let (endpoint, other) = (address(&hub), address(&cdn));
        let script = Arc::new(Mutex::new(Script::default()));
        for (name, listener) in [("hub", hub), ("cdn", cdn)] {
            let (script, other) = (script.clone(), other.clone());
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let (script, other) = (script.clone(), other.clone());
                    std::thread::spawn(move || answer(name, &other, &script, stream));
                }
            });
        }
        let hub = Self { endpoint, script };
        hub.add("main", COMMIT, files);
        hub
    }

    pub(crate) fn add(&self, revision: &str, commit: &str, files: &[(&str, &[u8])]) {
        let files = files.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec())).collect();
        let mut script = self.script();
        script.revisions.insert(revision.into(), commit.into());
        script.files.insert(commit.into(), files);
    }

    pub(crate) fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap()
    }

    /// Paths of the `GET` requests since the last call, host before them; queries left out.
    pub(crate) fn gets(&self) -> Vec<String> {
        let log = std::mem::take(&mut self.script().log);
        let gets = log.iter().filter(|(_, method, ..)| method == "GET");
        gets.map(|(host, _, path, _)| format!("{host} {}", path.split('?').next().unwrap())).collect()
    }
}

fn answer(host: &'static str, cdn: &str, script: &Mutex<Script>, stream: TcpStream) {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    let mut read = |reader: &mut BufReader<TcpStream>| {
        line.clear();
        reader.read_line(&mut line).unwrap_or(0);
        line.trim_end().to_owned()
    };
    let request = read(&mut reader);
    let mut parts = request.split(' ');
    let (Some(method), Some(path)) = (parts.next(), parts.next()) else { return };
    let mut headers = BTreeMap::new();
    loop {
        let header = read(&mut reader);
        let Some((name, value)) = header.split_once(':') else { break };
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    let mut script = script.lock().unwrap();
    script.log.push((host, method.to_owned(), path.to_owned(), headers.clone()));
    let (status, extra, mut body) = reply(host, cdn, &script, path, &headers);
    let head = method == "HEAD";
    let mut text =
        format!("HTTP/1.1 {status} Status\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
    for (name, value) in extra {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    let content = !head && status < 300 && path.contains("/content/");
    if content && script.cuts.first().is_some_and(|&cut| cut < body.len()) {
        body.truncate(script.cuts.remove(0));
    }
    drop(script);
    let mut stream = reader.into_inner();
    let _ = stream.write_all(format!("{text}\r\n").as_bytes());
    if !head {
        let _ = stream.write_all(&body);
    }
}

type Reply = (u16, Vec<(&'static str, String)>, Vec<u8>);

fn reply(host: &str, cdn: &str, script: &Script, path: &str, headers: &BTreeMap<String, String>) -> Reply {
    let refuse = |status: u16, code: &str| (status, vec![("X-Error-Code", code.to_owned())], b"no".to_vec());
    if let Some((status, code)) = script.refusal {
        return refuse(status, code);
    }
    if host == "hub"
        && let Some(token) = script.token
        && headers.get("authorization").map(String::as_str) != Some(&format!("Bearer {token}"))
    {
        return refuse(401, "");
    }
    let path = path.split('?').next().unwrap_or_default();
    if let Some(rest) = path.strip_prefix("/api/models/") {
        let Some(revision) = rest.strip_prefix("org/model/revision/") else {
            return refuse(404, "RepoNotFound");
        };
        let revision = revision.replace("%2F", "/");
        let commit = script.revisions.get(&revision).cloned().unwrap_or(revision);
        let Some(files) = script.files.get(&commit) else { return refuse(404, "RevisionNotFound") };
        let files: Vec<_> = files
            .iter()
            .map(|(name, bytes)| serde_json::json!({ "rfilename": name, "size": bytes.len() }))
            .collect();
        let body = serde_json::json!({ "id": "org/model", "sha": commit, "siblings": files });
        return (200, Vec::new(), body.to_string().into_bytes());
    }
    let below = path.strip_prefix("/org/model/resolve/").or_else(|| path.strip_prefix("/content/"));
    let Some((commit, name)) = below.and_then(|below| below.split_once('/')) else { return refuse(404, "") };
    let Some(bytes) = script.files.get(commit).and_then(|files| files.get(name)) else {
        return refuse(404, "EntryNotFound");
    };
    let large = !name.ends_with(".json");
    let sum = sha256(bytes);
    let etag = script.etag.unwrap_or(if large { &sum } else { &sum[..40] });
    if !path.starts_with("/content/") {
        let place = format!("/content/{commit}/{name}");
        return match large {
            true => {
                let linked =
                    [("X-Linked-ETag", format!("\"{etag}\"")), ("X-Linked-Size", bytes.len().to_string())];
                (
                    302,
                    [vec![("Location", format!("{cdn}{place}"))], linked.to_vec()].concat(),
                    b"moved".to_vec(),
                )
            }
            false => (307, vec![("Location", place)], b"moved".to_vec()),
        };
    }
    let mut body = bytes.clone();
    if script.corrupt.contains(name)
        && let Some(last) = body.last_mut()
    {
        *last ^= 1;
    }
    let tag = ("ETag", format!("W/\"{etag}\""));
    let from =
        headers.get("range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    match from {
        Some(from) if !script.no_ranges => {
            let from: usize = from;
            if from >= body.len() {
                return (416, vec![tag], Vec::new());
            }
            let range = format!("bytes {from}-{}/{}", body.len() - 1, body.len());
            (206, vec![tag, ("Content-Range", range)], body.split_off(from))
        }
        _ => (200, vec![tag], body),
    }
}
