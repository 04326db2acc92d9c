//! Checkpoint files in, named tensors out.

mod checkpoint;
mod element;
pub mod files;
mod mmap;
mod params;
mod pickle;
mod pth;
mod safetensors;

pub(crate) use checkpoint::{KNOWN, is_weight_file};
pub use checkpoint::{checkpoint_files, load_checkpoint};
pub use params::Params;
pub use pth::{load_pth, load_pth_bytes};
pub use safetensors::{
    MAX_HEADER, load_safetensors, load_safetensors_bytes, safetensors_metadata, save_safetensors,
    save_safetensors_as,
};
