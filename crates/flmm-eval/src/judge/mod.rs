//! Language models that grade answers, through any endpoint that speaks OpenAI's chat protocol
//! (`spec/evaluation.md` §5.4, §6).

mod cache;
pub mod offline;
pub mod parse;
pub mod prompt;

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use flmm::{Error, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use ureq::Agent;
use ureq::http::{StatusCode, header};

use cache::Cache;
pub use prompt::{Prompt, Question, Role};

/// Longest pause between two attempts, also where the server asks for a longer one.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Longest reply that is read, bytes.
const LONGEST_REPLY: u64 = 4 << 20;
/// Asked once per judge before anything is computed.
const CHECK: &str = "Write the word ready and nothing else.";
/// So many questions without a reply, one after the other, and the judge is not asked any more.
const MOST_FAILURES: usize = 3;

/// How often a judge is asked for a reply that can be read.
pub(crate) const READINGS: usize = 3;

/// Which judge, and how patiently it is asked.
#[derive(Clone)]
pub struct JudgeSettings {
    /// Base address, for example `https://api.openai.com/v1`; `/chat/completions` is added unless it is there.
    pub url: String,
    /// The model's name there.
    pub model: String,
    /// The key that is sent, if any.
    pub key: Option<String>,
    /// Folder for replies; without one nothing is kept.
    pub cache: Option<PathBuf>,
    /// Folder with prompt files of the user's own.
    pub prompts: Option<PathBuf>,
    /// How often a question is sent before it counts as failed.
    pub attempts: u32,
    /// Pause before the second attempt; doubled for every further one.
    pub pause: Duration,
    /// How long one attempt may take.
    pub timeout: Duration,
}

impl JudgeSettings {
    /// Five attempts of a minute, pauses from 2 seconds on; no key, no cache.
    pub fn new(url: impl Into<String>, model: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            model: model.into(),
            key: None,
            cache: None,
            prompts: None,
            attempts: 5,
            pause: Duration::from_secs(2),
            timeout: Duration::from_secs(60),
        }
    }
}

/// A judge. Several threads may ask it.
pub struct Judge {
    agent: Agent,
    settings: JudgeSettings,
    endpoint: String,
    cache: Option<Cache>,
    prompts: [Prompt; 4],
    failures: Mutex<Failures>,
}

/// Questions without a reply since the last one that had one, and why the last of them had none.
#[derive(Default)]
struct Failures {
    count: usize,
    last: Option<(String, String)>,
}

impl std::fmt::Debug for Judge {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Judge")
            .field("endpoint", &self.endpoint)
            .field("model", &self.settings.model)
            .finish()
    }
}

/// What a judge says, or why it says nothing.
pub type Reply = std::result::Result<String, String>;

/// Why an attempt brought nothing.
enum Fault {
    /// Worth another attempt, after this pause if the server names one.
    Passing(String, Option<Duration>),
    /// Would be refused again; what is wrong, and a hint.
    Final(String, String),
}

impl Judge {
    /// Reads the prompts and opens the cache; nothing is sent.
    ///
    /// # Errors
    /// If the address is not one, a prompt file is wrong, or the cache's folder cannot be made.
    pub fn new(settings: JudgeSettings) -> Result<Self> {
        let url = settings.url.trim_end_matches('/');
        if !url.starts_with("https://") && !url.starts_with("http://") {
            return Err(Error::request(
                format!("the judge's address is {url:?}"),
                "expected one that begins with https:// or http://, for example https://api.openai.com/v1",
            ));
        }
        const PATH: &str = "/chat/completions";
        let endpoint = if url.ends_with(PATH) { url.to_owned() } else { format!("{url}{PATH}") };
        let load = |role| Prompt::load(role, settings.prompts.as_deref());
        let [viscot, mmvet, llavabench, mmbench] = Role::ALL.map(load);
        let prompts = [viscot?, mmvet?, llavabench?, mmbench?];
        let cache = settings.cache.as_deref().map(Cache::open).transpose()?;
        let agent: Agent = Agent::config_builder()
            .http_status_as_error(false)
            .user_agent(concat!("flmm/", env!("CARGO_PKG_VERSION")))
            .timeout_global(Some(settings.timeout))
            .build()
            .into();
        Ok(Self { agent, settings, endpoint, cache, prompts, failures: Mutex::default() })
    }

    /// Sends something trivial once, so that a wrong address, key or model is known before anything is computed. The cache
    /// has no part in it.
    ///
    /// # Errors
    /// If the judge refuses, or gives no reply.
    pub fn check(&self) -> Result<()> {
        let question =
            Question { temperature: 0.0, max_tokens: 8, system: String::new(), user: CHECK.into() };
        match self.send(&self.body(&question)) {
            Ok(_) => Ok(()),
            Err(Fault::Final(what, hint)) => Err(Error::request(what, hint)),
            Err(Fault::Passing(reason, _)) => {
                Err(Error::request(self.silent(&reason), "check --judge-url and whether the server is up"))
            }
        }
    }

    /// Why the judge is not asked any more, if so: it gave no reply to several questions, one after the other.
    pub fn halted(&self) -> Option<Error> {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let (what, hint) = failures.last.as_ref().filter(|_| failures.count >= MOST_FAILURES)?;
        Some(Error::request(
            format!(
                "the judge is not asked any more after {MOST_FAILURES} questions without a reply: {what}"
            ),
            format!(
                "{hint}; answers that are kept can be judged later: flmm eval score --predictions SAMPLES"
            ),
        ))
    }

    /// What results depend on: kept with them.
    pub fn describe(&self, role: Role) -> Value {
        let prompt = &self.prompts[role as usize];
        let hash = Sha256::digest(format!("{prompt:?}"));
        let hash = flmm::hex(&hash[..8]);
        json!({ "model": self.settings.model, "prompt": hash })
    }

    /// Asks in `role`, with `values` in the places of its prompt: the judge's reply, or why there is none: it refuses, or
    /// all attempts at sending failed, or it is not asked any more ([`Judge::halted`]). Another `attempt` (from 0) is
    /// another question to the cache.
    ///
    /// # Errors
    /// If a reply cannot be kept.
    pub fn grade(&self, role: Role, values: &[(&str, &str)], attempt: usize) -> Result<Reply> {
        self.ask(&self.prompts[role as usize].fill(values), attempt)
    }

    /// A chat request.
    fn body(&self, question: &Question) -> Value {
        let mut messages = Vec::new();
        if !question.system.is_empty() {
            messages.push(json!({ "role": "system", "content": question.system }));
        }
        messages.push(json!({ "role": "user", "content": question.user }));
        json!({
            "model": self.settings.model,
            "messages": messages,
            "temperature": question.temperature,
            "max_tokens": question.max_tokens,
        })
    }

    fn ask(&self, question: &Question, attempt: usize) -> Result<Reply> {
        let body = self.body(question);
        let request = json!({ "url": self.endpoint, "attempt": attempt, "body": body });
        if let Some(reply) = self.cache.as_ref().and_then(|cache| cache.get(&request)) {
            return Ok(Ok(reply));
        }
        if let Some(error) = self.halted() {
            return Ok(Err(error.to_string()));
        }
        let mut reason = String::new();
        let mut pause = self.settings.pause;
        for left in (0..self.settings.attempts.max(1)).rev() {
            match self.send(&body) {
                Ok(reply) => {
                    self.replied();
                    if let Some(cache) = &self.cache {
                        cache.put(&request, &reply)?;
                    }
                    return Ok(Ok(reply));
                }
                Err(Fault::Final(what, hint)) => return Ok(Err(self.failed(what, hint))),
                Err(Fault::Passing(why, wait)) => {
                    reason = why;
                    if left > 0 {
                        std::thread::sleep(wait.unwrap_or(pause).min(LONGEST_PAUSE));
                        pause *= 2;
                    }
                }
            }
        }
        self.failed(self.silent(&reason), "check whether the server is up".to_owned());
        Ok(Err(reason))
    }

    fn silent(&self, reason: &str) -> String {
        format!("the judge at {} gives no reply: {reason}", self.endpoint)
    }

    /// Counts anew from here, unless the judge is not asked any more: other threads have had questions refused for that, so
    /// a late reply must not undo it.
    fn replied(&self) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        if failures.count < MOST_FAILURES {
            *failures = Failures::default();
        }
    }

    /// Counts a question without a reply, and gives the reason back.
    fn failed(&self, what: String, hint: String) -> String {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.count += 1;
        failures.last = Some((what.clone(), hint));
        what
    }

    fn send(&self, body: &Value) -> Result<String, Fault> {
        let passing = |error: ureq::Error| Fault::Passing(error.to_string(), None);
        let mut request = self.agent.post(&self.endpoint).header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = &self.settings.key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        let mut answer = request.send(body.to_string()).map_err(passing)?;
        let status = answer.status();
        let wait =
            answer.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        let text = answer.body_mut().with_config().limit(LONGEST_REPLY).read_to_string().map_err(passing)?;
        if !status.is_success() {
            return Err(self.refused(status, &text, wait.map(Duration::from_secs)));
        }
        let reply: Option<Value> = serde_json::from_str(&text).ok();
        let content = reply.as_ref().and_then(|reply| reply["choices"][0]["message"]["content"].as_str());
        match content {
            Some(content) => Ok(content.to_owned()),
            None => Err(Fault::Passing("the reply is not a chat completion".into(), None)),
        }
    }

    fn refused(&self, status: StatusCode, text: &str, wait: Option<Duration>) -> Fault {
        if matches!(status.as_u16(), 408 | 409 | 425 | 429 | 500..=599) {
            return Fault::Passing(format!("status {}", status.as_u16()), wait);
        }
        let said: Option<Value> = serde_json::from_str(text).ok();
        let said = said.as_ref().and_then(|said| said["error"]["message"].as_str()).map(|m| format!(": {m}"));
        let hint = match status.as_u16() {
            401 | 403 => "give a key that the server knows in the environment variable OPENAI_API_KEY",
            404 => "check --judge-url and --judge-model",
            _ => "check --judge-url and --judge-model, and the prompt files if you have your own",
        };
        let what = format!(
            "the judge at {} answers with status {}{}",
            self.endpoint,
            status.as_u16(),
            said.unwrap_or_default()
        );
        Fault::Final(what, hint.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_reply_does_not_undo_the_halt() {
        let judge = Judge::new(JudgeSettings::new("http://127.0.0.1:9/v1", "any")).unwrap();
        let fail = || judge.failed("no".to_owned(), "wait".to_owned());
        for _ in 1..MOST_FAILURES {
            fail();
        }
        judge.replied();
        for _ in 1..MOST_FAILURES {
            fail();
        }
        assert!(judge.halted().is_none());
        fail();
        judge.replied();
        assert!(judge.halted().is_some());
    }
}
