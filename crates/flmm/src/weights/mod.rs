//! Checkpoint files in, named tensors out.

mod params;

pub use params::Params;
