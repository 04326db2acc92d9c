//! Layers that are safe to train: every function here has a gradient.
//!
//! candle's own fused norms and softmax silently stop gradients and its bilinear resize has no backward, so
//! trainable code uses only this module (a clippy lint forbids the others).

mod linear;
mod norm;
mod softmax;

pub use linear::Linear;
pub use norm::{LayerNorm, layer_norm, rms_norm};
pub use softmax::softmax_last_dim;
