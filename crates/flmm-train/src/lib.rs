//! Losses, optimiser, schedule and training loop of the grounding head.

pub mod bench;
pub mod cache;
pub mod checkpoint;
pub mod distributed;
pub mod head;
mod log;
pub mod losses;
pub mod optim;
pub mod samples;
pub mod selector;
pub mod task;
pub mod trainer;

pub use cache::{CacheKey, CacheOptions, CachedSamples, FeatureCache};
pub use head::{HeadConfig, HeadSample, HeadTask, LossWeights, RefinedTarget};
pub use samples::Samples;
pub use selector::{SelectorConfig, SelectorSample, SelectorTask};
pub use task::{Losses, Metric, Task};
pub use trainer::{RunOptions, Step, TrainConfig, Trainer};
