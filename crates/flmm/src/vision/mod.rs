//! Vision towers: pictures to features.

pub mod anyres;
pub mod clip;
pub mod convnext;
pub mod deepseek_hybrid;
pub mod dual;
pub mod preprocess;
pub mod regrid;
pub mod resample;
pub mod siglip;
pub(crate) mod tower;
