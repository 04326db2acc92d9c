//! Language model: tokens to hidden states and logits.

mod attend;
mod cache;
mod config;
mod decoder;
mod rope;

pub(crate) use attend::round_to;
pub use attend::{attend, scaled_scores};
pub use cache::KvCache;
pub use config::{Activation, DecoderConfig, Norm};
pub use decoder::Decoder;
pub use rope::Rope;
