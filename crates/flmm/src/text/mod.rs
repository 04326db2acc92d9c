//! Language model: tokens to hidden states and logits.

mod attend;
mod cache;
pub mod chat;
mod config;
mod decoder;
mod generate;
mod rope;
pub mod sampling;
pub mod stop;
pub mod stream;
pub mod template;
pub mod tokenizer;
mod turn;

pub(crate) use attend::round_to;
pub use attend::{attend, scaled_scores};
pub use cache::KvCache;
pub use config::{Activation, DecoderConfig, Norm};
pub use decoder::Decoder;
pub(crate) use decoder::too_long;
pub use generate::{Generation, Limits};
pub use rope::{Rope, Rotation};
