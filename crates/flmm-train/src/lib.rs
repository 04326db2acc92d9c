//! Losses, optimiser, schedule and training loop of the grounding head.

pub mod losses;
pub mod optim;
