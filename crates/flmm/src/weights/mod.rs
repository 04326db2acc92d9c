//! Checkpoint files in, named tensors out.

mod checkpoint;
mod element;
pub mod files;
mod fingerprint;
mod mmap;
mod outline;
mod packed;
mod params;
mod pickle;
mod pth;
mod rehearsal;
mod safetensors;
mod watch;

pub(crate) use checkpoint::{KNOWN, is_weight_file, load_checkpoint_packed};
pub use checkpoint::{
    checkpoint_bytes, checkpoint_files, load_checkpoint, load_checkpoint_some, load_checkpoint_with, outline,
};
pub use fingerprint::fingerprint;
pub use outline::TensorInfo;
pub(crate) use packed::{Packed, metadata as packed_metadata, scales_of};
pub use packed::{WeightFormat, stored_format};
pub(crate) use params::Matrix;
pub use params::{Params, Problem};
pub use pth::{load_pth, load_pth_bytes};
pub(crate) use rehearsal::{CheckpointRead, is_running as is_rehearsed, stand_ins};
pub use rehearsal::{Findings, Packing, rehearse};
pub use safetensors::{
    MAX_HEADER, load_safetensors, load_safetensors_bytes, safetensors_metadata, save_safetensors,
    save_safetensors_as,
};
