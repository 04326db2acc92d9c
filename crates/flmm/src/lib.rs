//! Grounded answers from frozen multimodal models: image and conversation in, answer, phrases and masks out.

pub mod atomic;
pub mod capture;
pub mod clusters;
pub mod config;
pub mod convert;
pub mod device;
pub mod error;
pub mod geometry;
pub mod grounder;
mod hex;
pub mod hub;
pub mod image_input;
pub mod layout;
pub mod lmm;
pub mod mask_head;
pub mod masks;
pub mod nn;
pub mod overlay;
pub mod phrases;
pub mod sam;
pub mod text;
pub mod training_free;
pub mod vision;
pub mod weights;

pub use error::{Error, Result};
pub use geometry::Geometry;
pub use grounder::Grounder;
pub use hex::hex;
