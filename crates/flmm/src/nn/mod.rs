//! Layers that are safe to train: every function here has a gradient.
//!
//! candle's own fused norms and softmax silently stop gradients, its bilinear resize has no backward and its
//! max-pool backward is wrong, so trainable code uses only this module (a clippy lint forbids the others).

mod activation;
mod affine;
mod attention;
mod channel_norm;
mod conv;
mod conv3x3;
mod conv_kernels;
mod cross_entropy;
mod depthwise;
mod enlarged;
mod frozen_linear;
mod fused_attention;
mod gated;
#[cfg(test)]
pub(crate) mod gradcheck;
pub mod host;
mod linear;
mod norm;
mod pool;
mod residual;
mod resize;
mod softmax;

pub use activation::{exp, gelu, gelu_tanh, quick_gelu, relu, sigmoid, silu};
pub use attention::attention;
pub use channel_norm::{GroupNorm1, LayerNorm2d};
pub use conv::{Conv2d, ConvTranspose2d};
pub use cross_entropy::cross_entropy;
pub use depthwise::DepthwiseConv2d;
pub(crate) use enlarged::Enlarged;
pub(crate) use frozen_linear::frozen_products;
pub(crate) use fused_attention::fused_attention;
pub use gated::silu_mul;
pub use linear::Linear;
pub use norm::{LayerNorm, layer_norm, rms_norm};
pub use pool::max_pool2x2;
pub use residual::residual;
pub use resize::{bilinear, bilinear_part, bilinear_scaled, nearest};
pub use softmax::softmax_last_dim;
