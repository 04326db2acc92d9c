//! Requests to the hub. Redirects are followed by hand: the token must not leave the hub's own server.

use std::time::Duration;

use ureq::Agent;
use ureq::http::{Response, StatusCode, header};

use super::repo::RepoId;
use super::settings::HubSettings;
use crate::error::{Error, Result};

type Answer = Response<ureq::Body>;

/// Most redirects that are followed for one request.
const MAX_REDIRECTS: usize = 8;

/// Longest list of files that is read, in bytes.
const MAX_LISTING: u64 = 32 << 20;

/// Why a request brought nothing.
pub(super) enum Fault {
    /// The connection failed or was cut, or the server is busy: worth another attempt.
    Passing(String),
    /// The server cannot be reached at all.
    Unreachable(String),
    /// The hub refuses, or answers what no hub would answer.
    Final(Error),
}

impl Fault {
    /// For requests after a first success: a server that was there may come back.
    pub(super) fn passing(self) -> Self {
        match self {
            Self::Unreachable(what) => Self::Passing(what),
            other => other,
        }
    }
}

/// What the hub says about a file before it is downloaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Metadata {
    /// Name of its content: the SHA-256 of large files, the git id of small ones.
    pub(super) etag: String,
    /// Length in bytes.
    pub(super) size: Option<u64>,
}

/// A client of one hub.
#[derive(Debug)]
pub(super) struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
}

impl Client {
    pub(super) fn new(settings: &HubSettings) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("flmm/", env!("CARGO_PKG_VERSION")))
            // Compressed content would fit neither sizes nor ranges.
            .accept_encoding("identity")
            .timeout_connect(Some(settings.silence.min(Duration::from_secs(10))))
            .timeout_recv_response(Some(settings.silence))
            .timeout_per_read(Some(settings.silence));
        Self {
            agent: config.build().into(),
            endpoint: settings.endpoint.clone(),
            token: settings.token.clone(),
        }
    }

    /// The repository's description at its revision: `{"sha": …, "siblings": [{"rfilename": …, "size": …}]}`.
    pub(super) fn describe(&self, repo: &RepoId) -> Result<serde_json::Value, Fault> {
        let revision = encode(repo.revision(), false);
        let url = format!("{}/api/models/{}/revision/{revision}?blobs=true", self.endpoint, repo.id());
        let mut answer = self.follow("GET", &url, None, |_| false)?;
        self.check(repo, None, &answer)?;
        let text = answer.body_mut().with_config().limit(MAX_LISTING).read_to_string().map_err(transport)?;
        serde_json::from_str(&text)
            .map_err(|e| Fault::Final(self.no_hub(&format!("its description of {repo} is not JSON: {e}"))))
    }

    /// Content name and size of `file` at `commit`.
    pub(super) fn metadata(&self, repo: &RepoId, commit: &str, file: &str) -> Result<Metadata, Fault> {
        // Only the hub itself knows; where it sends large files to is not asked.
        let leaves = |answer: &Answer| text(answer, "x-linked-etag").is_some();
        let answer = self.follow("HEAD", &self.file_url(repo, commit, file), None, leaves)?;
        if !answer.status().is_redirection() {
            self.check(repo, Some(file), &answer)?;
        }
        let etag = text(&answer, "x-linked-etag").or_else(|| text(&answer, "etag"));
        let etag = etag.map(|etag| etag.trim_start_matches("W/").trim_matches('"').to_owned());
        // It becomes the name of a file.
        let etag = etag.filter(|etag| super::repo::is_plain(etag)).ok_or_else(|| {
            Fault::Final(self.no_hub(&format!("it gives no usable ETag for `{file}` of {repo}")))
        })?;
        let size = text(&answer, "x-linked-size").or_else(|| text(&answer, "content-length"));
        Ok(Metadata { etag, size: size.and_then(|size| size.parse().ok()) })
    }

    /// The content of `file` from byte `from` on: the answer's status is 200 (whole file) or 206 (the rest), or 416
    /// if there is nothing at `from`.
    pub(super) fn content(
        &self,
        repo: &RepoId,
        commit: &str,
        file: &str,
        from: u64,
    ) -> Result<Answer, Fault> {
        let range = (from > 0).then(|| format!("bytes={from}-"));
        let answer = self.follow("GET", &self.file_url(repo, commit, file), range.as_deref(), |_| false)?;
        if answer.status() != StatusCode::RANGE_NOT_SATISFIABLE {
            self.check(repo, Some(file), &answer)?;
        }
        Ok(answer)
    }

    fn file_url(&self, repo: &RepoId, commit: &str, file: &str) -> String {
        format!("{}/{}/resolve/{}/{}", self.endpoint, repo.id(), encode(commit, false), encode(file, true))
    }

    /// Requests `url` and follows redirects until `stop` says that the answer is enough.
    fn follow(
        &self,
        method: &str,
        url: &str,
        range: Option<&str>,
        stop: impl Fn(&Answer) -> bool,
    ) -> Result<Answer, Fault> {
        let mut url = url.to_owned();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = match method {
                "HEAD" => self.agent.head(&url),
                _ => self.agent.get(&url),
            };
            if let Some(token) = self.token.as_ref().filter(|_| origin(&url) == origin(&self.endpoint)) {
                request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
            }
            if let Some(range) = range {
                request = request.header(header::RANGE, range);
            }
            let answer = request.call().map_err(transport)?;
            if !answer.status().is_redirection() || stop(&answer) {
                return Ok(answer);
            }
            let place = text(&answer, "location").and_then(|place| absolute(&url, place));
            // What was asked for over a secure connection is not read over another.
            let secure = |place: &String| !url.starts_with("https://") || place.starts_with("https://");
            url = place.filter(secure).ok_or_else(|| {
                Fault::Final(self.no_hub(&format!("it redirects {url} to no usable address")))
            })?;
        }
        Err(Fault::Final(
            self.no_hub(&format!("it redirects more than {MAX_REDIRECTS} times, at last to {url}")),
        ))
    }

    /// Turns an answer other than success into the fault that it means.
    fn check(&self, repo: &RepoId, file: Option<&str>, answer: &Answer) -> Result<(), Fault> {
        let status = answer.status();
        if status.is_success() {
            return Ok(());
        }
        let code = text(answer, "x-error-code").unwrap_or_default();
        let (id, revision) = (repo.id(), repo.revision());
        let page = format!("{}/{id}", self.endpoint);
        let (what, hint) = match (status.as_u16(), code) {
            (_, "GatedRepo") | (403, _) => (
                format!(
                    "{id}: the hub allows these files only to those who have accepted its licence (status {status})"
                ),
                format!("accept the conditions at {page}, then give a token: HF_TOKEN, or `hf auth login`"),
            ),
            // To strangers the hub does not tell a private repository from one that does not exist.
            (401, _) if self.token.is_none() => (
                format!("{id}: there is no such repository on the hub, or it is private and needs a token"),
                format!(
                    "check the name at {page}; if it is private or gated, set HF_TOKEN or use `hf auth login`"
                ),
            ),
            (401, _) => (
                format!("{id}: there is no such repository on the hub, or your token gives no access to it"),
                format!("check the name at {page} and the token in HF_TOKEN"),
            ),
            (404, "RevisionNotFound") => (
                format!("{id}: there is no revision `{revision}`"),
                format!("leave the revision out, or choose one from {page}/tree/main"),
            ),
            (404, _) if file.is_some() => (
                format!("{id}: there is no file `{}` in revision `{revision}`", file.unwrap_or_default()),
                format!("the repository may have changed: look at {page}/tree/{revision}"),
            ),
            (404, "RepoNotFound") => {
                (format!("{id}: there is no such repository on the hub"), format!("check the name at {page}"))
            }
            (404, _) => (
                format!("{id}: the hub has no such repository, or it has no revision `{revision}`"),
                format!("check both at {page}"),
            ),
            (429 | 500..=599, _) => {
                return Err(Fault::Passing(format!("{} answers with status {status}", self.endpoint)));
            }
            _ => (
                format!("{id}: {} answers with status {status}", self.endpoint),
                "check HF_ENDPOINT, or try later".to_owned(),
            ),
        };
        Err(Fault::Final(Error::hub(what, hint)))
    }

    fn no_hub(&self, what: &str) -> Error {
        Error::hub(
            format!("{} does not answer as a Hugging Face hub does: {what}", self.endpoint),
            "check HF_ENDPOINT and whether a proxy is in the way",
        )
    }
}

/// The fault behind a failed request or a body that broke off.
pub(super) fn transport(error: ureq::Error) -> Fault {
    let what = error.to_string();
    match error {
        ureq::Error::HostNotFound | ureq::Error::ConnectionFailed => Fault::Unreachable(what),
        ureq::Error::Io(source) if source.kind() == std::io::ErrorKind::ConnectionRefused => {
            Fault::Unreachable(source.to_string())
        }
        _ => Fault::Passing(what),
    }
}

/// A header as text.
pub(super) fn text<'a>(answer: &'a Answer, name: &str) -> Option<&'a str> {
    answer.headers().get(name)?.to_str().ok()
}

/// Scheme, host and port of an address; `None` if it has none.
fn origin(url: &str) -> Option<(String, String)> {
    let (scheme, rest) = url.split_once("://")?;
    let host = rest.split(['/', '?', '#']).next()?;
    Some((scheme.to_ascii_lowercase(), host.to_ascii_lowercase()))
}

/// Where `place`, the target of a redirect, leads from `url`.
fn absolute(url: &str, place: &str) -> Option<String> {
    if place.starts_with("https://") || place.starts_with("http://") {
        return Some(place.to_owned());
    }
    let (scheme, host) = origin(url)?;
    if let Some(other) = place.strip_prefix("//") {
        return Some(format!("{scheme}://{other}"));
    }
    place.starts_with('/').then(|| format!("{scheme}://{host}{place}"))
}

/// Percent-encodes what is not plain in an address; `/` stays if it separates.
fn encode(text: &str, separates: bool) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(char::from(byte)),
            b'/' if separates => out.push('/'),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_joined_compared_and_encoded() {
        assert_eq!(absolute("https://a/b", "/c?d").as_deref(), Some("https://a/c?d"));
        assert_eq!(absolute("https://a/b", "http://x/c").as_deref(), Some("http://x/c"));
        assert_eq!(absolute("https://a/b", "//x/c").as_deref(), Some("https://x/c"));
        assert_eq!(absolute("https://a/b", "c"), None);
        assert_eq!(origin("https://HOST/x"), origin("https://host"));
        for other in ["http://host", "https://host:8080", "https://host.evil.org", "https://host@evil.org/"] {
            assert_ne!(origin(other), origin("https://host"), "{other}");
        }
        assert_eq!(encode("refs/pr/1", false), "refs%2Fpr%2F1");
        assert_eq!(encode("llm/a+b c.json", true), "llm/a%2Bb%20c.json");
    }
}
