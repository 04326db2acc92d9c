//! Vision towers: pictures to features.

pub mod clip;
