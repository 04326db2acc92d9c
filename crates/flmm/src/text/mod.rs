//! Language model: tokens to hidden states and logits.

pub mod chat;
pub mod sampling;
pub mod stream;
pub mod template;
pub mod tokenizer;
