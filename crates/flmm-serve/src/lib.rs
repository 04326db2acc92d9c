//! Grounded chat over HTTP.
//!
//! [`serve`] runs a server; [`app`] is its router: OpenAI's chat interface with masks, grounding of given text, attention
//! read-out, and a page. The model runs on threads of its own behind a bounded queue; nothing here blocks the threads that
//! talk to clients.

mod answer;
pub mod api;
mod app;
mod attention;
mod auth;
mod body;
mod chat;
mod conversation;
mod cors;
mod engine;
mod error;
mod fetch;
mod ground;
mod health;
mod host;
mod masks;
mod model;
mod observe;
mod openapi;
mod page;
mod pictures;
mod prefixes;
mod server;
mod settings;
mod stream;
mod work;

pub use error::{ApiError, ErrorBody, ErrorDetail};
pub use server::{Named, ServeError, app, app_without_model, serve};
pub use settings::{Limits, Settings};
