//! What a server may be told, with defaults that are safe on a shared network.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

/// How to serve.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where to listen.
    pub addr: SocketAddr,
    /// Keys of which every request must carry one, but for the page and `/health`; none: no key is asked for.
    pub api_keys: Vec<String>,
    /// Requests that compute at the same time.
    pub workers: usize,
    /// Memory in bytes for pictures that have been looked at.
    pub prefix_cache_bytes: usize,
    /// Image tokens of requests that may wait; `None`: those of 64 pictures.
    pub queue_image_tokens: Option<usize>,
    /// How long a request may take, waiting included.
    pub deadline: Duration,
    /// How long accepted requests may go on after a signal to stop.
    pub grace: Duration,
    /// Whether pictures are fetched from http and https addresses, never from private ones.
    pub remote_images: bool,
    /// Origins of web pages that may call the server from a browser, beside its own page.
    pub cors_origins: Vec<String>,
    /// Names that the server answers to beside its addresses and `localhost`, where it listens at loopback and asks for no key.
    pub hosts: Vec<String>,
    /// What is refused before memory is taken for it.
    pub limits: Limits,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            addr: SocketAddr::from((Ipv4Addr::LOCALHOST, 8080)),
            api_keys: Vec::new(),
            workers: 1,
            prefix_cache_bytes: 1 << 30,
            queue_image_tokens: None,
            deadline: Duration::from_secs(600),
            grace: Duration::from_secs(60),
            remote_images: false,
            cors_origins: Vec::new(),
            hosts: Vec::new(),
            limits: Limits::default(),
        }
    }
}

/// The largest of everything that a client may send or ask for.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections at a time.
    pub connections: usize,
    /// Size of a request's body in bytes.
    pub body_bytes: usize,
    /// Size in bytes of all bodies, and of pictures fetched for them, that are held at a time.
    pub bodies_bytes: usize,
    /// Time for a body to arrive.
    pub body_time: Duration,
    /// Number of headers.
    pub headers: usize,
    /// Size of a request's head in bytes.
    pub head_bytes: usize,
    /// Time for a request's head to arrive.
    pub head_time: Duration,
    /// Time for which a client may take nothing of what is sent to it (on Linux).
    pub deaf_time: Duration,
    /// Pictures in a conversation.
    pub pictures: usize,
    /// Longest side of a picture in pixels.
    pub picture_side: u32,
    /// Pixels of a picture.
    pub picture_pixels: u64,
    /// Time for a picture to be fetched, redirects included.
    pub fetch_time: Duration,
    /// Messages of a conversation.
    pub messages: usize,
    /// Size in bytes of all text of a request.
    pub text_bytes: usize,
    /// Tokens to generate; requests for more get so many.
    pub tokens: usize,
    /// Given phrases of a text.
    pub phrases: usize,
    /// Texts that end an answer.
    pub stop_words: usize,
    /// Size of one of these in bytes.
    pub stop_word_bytes: usize,
    /// Numbers of attention in one response.
    pub attention_values: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 512,
            body_bytes: 32 << 20,
            bodies_bytes: 512 << 20,
            body_time: Duration::from_secs(30),
            headers: 64,
            head_bytes: 32 << 10,
            head_time: Duration::from_secs(10),
            deaf_time: Duration::from_secs(60),
            pictures: 8,
            picture_side: 16_384,
            picture_pixels: 25_000_000,
            fetch_time: Duration::from_secs(10),
            messages: 256,
            text_bytes: 256 << 10,
            tokens: 4096,
            phrases: 64,
            stop_words: 4,
            stop_word_bytes: 128,
            attention_values: 16 << 20,
        }
    }
}

impl Limits {
    /// What is checked of a picture's header.
    pub(crate) fn picture(&self) -> flmm::image_input::Limits {
        let bytes = self.body_bytes as u64;
        flmm::image_input::Limits { side: self.picture_side, pixels: self.picture_pixels, bytes }
    }
}
