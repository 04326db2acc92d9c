//! Checkpoint files in, named tensors out.

mod element;
mod mmap;
mod params;
mod safetensors;

pub use params::Params;
pub use safetensors::{
    MAX_HEADER, load_safetensors, load_safetensors_bytes, safetensors_metadata, save_safetensors,
    save_safetensors_as,
};
