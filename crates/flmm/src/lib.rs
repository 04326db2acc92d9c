//! Grounded answers from frozen multimodal models: image and conversation in, answer, phrases and masks out.

pub mod clusters;
pub mod error;
pub mod geometry;
pub mod masks;
pub mod nn;
pub mod overlay;
pub mod phrases;
pub mod weights;

pub use error::{Error, Result};
pub use geometry::Geometry;
