//! Datasets in their published file formats, and the synthetic world that writes them.
pub mod world;
