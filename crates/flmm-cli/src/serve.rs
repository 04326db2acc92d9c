//! `flmm serve`: the model behind HTTP.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use flmm_serve::{Limits, Named, ServeError, Settings};
use tracing_subscriber::filter::LevelFilter;

use crate::args::{ModelArgs, count};
use crate::failure::{Failure, Result};
use crate::model;
use crate::talk::Talk;

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Address and port to listen at; port 0 takes any that is free.
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:8080")]
    addr: SocketAddr,
    /// File with API keys, one per line; every request but for the page and /health must carry one.
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Fetch pictures from http and https addresses, but never from private ones; otherwise they must come with the request.
    #[arg(long)]
    allow_remote_images: bool,
    /// Origin of a web page that may call the server from a browser, may be repeated (the server's own page always may).
    #[arg(long, value_name = "ORIGIN", value_parser = origin)]
    cors_origin: Vec<String>,
    /// Name that the server answers to beside its addresses and localhost, may be repeated; asked for only at a loopback
    /// address without keys, where pages of other names must not get through.
    #[arg(long, value_name = "NAME")]
    allow_host: Vec<String>,
    /// Form of the log on standard error: for people, or one JSON object per line.
    #[arg(long, value_name = "FORM", value_enum, default_value_t)]
    log: LogForm,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    limits: LimitArgs,
    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Engine")]
struct EngineArgs {
    /// Requests that compute at the same time; more share the processor's threads.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count)]
    workers: usize,
    /// Image tokens of requests that may wait for the model; beyond that, 429 is answered [default: those of 64 pictures].
    #[arg(long, value_name = "TOKENS", value_parser = count)]
    queue: Option<usize>,
    /// Memory for pictures that were looked at, in MiB, so that later questions about them need not look again.
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    cache: usize,
    /// Most seconds that a request may take, waiting included.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = seconds)]
    deadline: u64,
    /// Most seconds that accepted requests may go on after SIGTERM or SIGINT.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    grace: u64,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
struct LimitArgs {
    /// Largest body of a request, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 32, value_parser = count)]
    max_body: usize,
    /// Most seconds for the body of a request to arrive.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = seconds)]
    body_time: u64,
    /// Most pixels of a picture, in millions.
    #[arg(long, value_name = "MILLIONS", default_value_t = 25, value_parser = count)]
    max_pixels: usize,
    /// Most pictures of a conversation.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = count)]
    max_images: usize,
    /// Most tokens of an answer; requests for more get so many.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = count)]
    max_tokens: usize,
    /// Most connections at a time; others wait to be accepted.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = count)]
    max_connections: usize,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum LogForm {
    #[default]
    Text,
    Json,
}

pub(crate) fn run(args: &ServeArgs, talk: &Talk) -> Result<()> {
    let api_keys = args.api_key_file.as_deref().map(read_keys).transpose()?.unwrap_or_default();
    if api_keys.is_empty() && !args.addr.ip().is_loopback() {
        talk.note("note: whoever reaches this address may use the server; --api-key-file asks for keys");
    }
    log_to_stderr(args.log, talk)?;
    let settings = settings(args, api_keys);
    let (model, told) = (args.model.clone(), *talk);
    let open = move || {
        let model = model::open(&model, &told)?;
        Ok(Named { name: model.name, grounder: model.grounder })
    };
    flmm_serve::serve::<Failure>(settings, open, |addr| talk.note(format_args!("listening at http://{addr}")))
}

fn settings(args: &ServeArgs, api_keys: Vec<String>) -> Settings {
    let limits = &args.limits;
    let body_bytes = limits.max_body.saturating_mul(1 << 20);
    let default = Limits::default();
    let limits = Limits {
        connections: limits.max_connections,
        body_bytes,
        bodies_bytes: default.bodies_bytes.max(body_bytes),
        body_time: Duration::from_secs(limits.body_time),
        pictures: limits.max_images,
        picture_pixels: (limits.max_pixels as u64).saturating_mul(1_000_000),
        tokens: limits.max_tokens,
        ..default
    };
    Settings {
        addr: args.addr,
        api_keys,
        workers: args.engine.workers,
        prefix_cache_bytes: args.engine.cache.saturating_mul(1 << 20),
        queue_image_tokens: args.engine.queue,
        deadline: Duration::from_secs(args.engine.deadline),
        grace: Duration::from_secs(args.engine.grace),
        remote_images: args.allow_remote_images,
        cors_origins: args.cors_origin.clone(),
        hosts: args.allow_host.clone(),
        limits,
    }
}

/// The keys of a file, one per line; blank lines and lines that begin with `#` do not count.
fn read_keys(path: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path).map_err(|error| flmm::Error::io(path, error))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let keys: Vec<String> = lines.map(str::to_owned).collect();
    match keys.is_empty() {
        // An empty file must not open the server to everyone.
        true => Err(Failure::usage(
            format!("`{}` holds no key", path.display()),
            "write one key per line, or leave --api-key-file out",
        )),
        false => Ok(keys),
    }
}

fn log_to_stderr(form: LogForm, talk: &Talk) -> Result<()> {
    let level = match (talk.quiet(), talk.verbose()) {
        (true, _) => LevelFilter::WARN,
        (_, true) => LevelFilter::DEBUG,
        _ => LevelFilter::INFO,
    };
    let log = tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).with_target(false);
    let started = match form {
        LogForm::Text => log.with_ansi(false).try_init(),
        LogForm::Json => log.json().try_init(),
    };
    started.map_err(|error| Failure::other(format!("cannot log: {error}")))
}

/// Seconds of a time that a clock can be ahead by.
fn seconds(text: &str) -> Result<u64, String> {
    const YEAR: usize = 366 * 24 * 60 * 60;
    match count(text)? {
        seconds if seconds > YEAR => Err(format!("must be at most {YEAR}, a year")),
        seconds => Ok(seconds as u64),
    }
}

/// An origin as browsers send it: scheme, host and port.
fn origin(text: &str) -> Result<String, String> {
    let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let plain = |host: &str| !host.is_empty() && host.chars().all(|c| c.is_ascii_graphic() && c != '/');
    match host {
        Some(host) if plain(host) => Ok(text.to_owned()),
        _ => Err("must be like https://example.org or http://127.0.0.1:3000, without a path".into()),
    }
}

impl From<ServeError> for Failure {
    fn from(error: ServeError) -> Self {
        match error {
            ServeError::Model(error) => Self::Library(error),
            ServeError::Listen { .. } => {
                Self::usage(error.to_string(), "choose another address or port with --addr")
            }
            ServeError::Start(_) => Self::other(error.to_string()),
        }
    }
}
