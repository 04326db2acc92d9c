//! Losses, optimiser, schedule and training loop of the grounding head.

pub mod checkpoint;
mod log;
pub mod losses;
pub mod optim;
pub mod samples;
pub mod task;
pub mod trainer;

pub use samples::Samples;
pub use task::{Losses, Metric, Task};
pub use trainer::{RunOptions, Step, TrainConfig, Trainer};
