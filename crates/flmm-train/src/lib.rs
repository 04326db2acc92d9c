//! Losses, optimiser, schedule and training loop of the grounding head, and the datasets it learns from.
//!
//! [`run()`] is a whole training as a [`Config`] describes it. Below it, a [`Trainer`] trains the tensors of a [`Task`]
//! on [`Samples`]; the samples of the real datasets are a [`Mixture`] seen through the frozen models ([`Observed`]).

mod adamw;
pub mod bench;
pub mod cache;
pub mod checkpoint;
pub mod config;
mod digest;
pub mod distributed;
pub mod features;
mod folder;
mod frozen;
pub mod head;
mod log;
pub mod losses;
pub mod mixture;
mod observed;
mod onlook;
pub mod optim;
mod prefetch;
mod run;
pub mod samples;
pub mod selection;
pub mod selector;
mod settings;
mod start;
pub mod task;
pub mod tensorboard;
pub mod text;
mod tolerant;
pub mod trainer;
pub mod validation;
mod watch;

pub use cache::{CacheKey, CacheOptions, CachedSamples, FeatureCache};
pub use config::Config;
pub use frozen::Frozen;
pub use head::{HeadConfig, HeadSample, HeadTask, LossWeights, RefinedTarget};
pub use mixture::{DataConfig, DataRevision, Dataset, Mixture};
pub use observed::{Observed, stacked};
pub use run::{Extras, Models, Outcome, run};
pub use samples::Samples;
pub use selector::{SelectorConfig, SelectorSample, SelectorTask};
pub use settings::{Precision, RunOptions, TrainConfig};
pub use task::{Losses, Metric, Task};
pub use text::LabelledText;
pub use tolerant::{SKIPPED, Tolerance, Tolerant};
pub use trainer::Trainer;
pub use watch::{After, Step, Watch};
