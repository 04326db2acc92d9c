//! Layers that are safe to train: every function here has a gradient.
//!
//! candle's own fused norms and softmax silently stop gradients and its bilinear resize has no backward, so
//! trainable code uses only this module (a clippy lint forbids the others).

mod cpu;
mod cross_entropy;
mod gated;
mod linear;
mod norm;
mod rotary;
mod softmax;

pub use cross_entropy::cross_entropy;
pub use gated::silu_mul;
pub use linear::Linear;
pub use norm::{LayerNorm, layer_norm, rms_norm};
pub use rotary::{RotaryTable, rotary_heads};
pub use softmax::{PackedMask, packed_softmax, softmax_last_dim};
