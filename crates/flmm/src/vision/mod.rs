//! Vision towers: pictures to features.

pub mod anyres;
pub mod preprocess;
pub mod resample;
