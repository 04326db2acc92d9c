//! Grounded answers from frozen multimodal models: image and conversation in, answer, phrases and masks out.

pub mod atomic;
pub mod error;
pub mod geometry;
pub mod image_input;
pub mod mask_head;
pub mod nn;
pub mod sam;
pub mod text;
pub mod vision;
pub mod weights;

pub use error::{Error, Result};
pub use geometry::Geometry;
