//! What flmm needs of CUDA beyond candle: a device whose operations all run on one stream, and attention that returns
//! the log-sum-exp of its scores.
//!
//! Launching kernels is unsafe, so this is, beside `flmm-kernels`, the crate that may. Without the feature `cuda` it is
//! empty: the workspace builds and passes its tests without a CUDA compiler.

#[cfg(feature = "cuda")]
mod attention;
#[cfg(feature = "cuda")]
mod device;
#[cfg(feature = "nccl")]
pub mod nccl;

#[cfg(feature = "cuda")]
pub use attention::causal_attention;
#[cfg(feature = "cuda")]
pub use device::open;
