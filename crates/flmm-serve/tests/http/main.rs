//! The interface, request by request, with the embedded model's files.

mod auth;
mod chat;
mod faults;
mod grounding;
mod support;
