//! The tasks and metrics of the paper's tables (`spec/evaluation.md`), for flmm's models and for anyone's predictions.
//!
//! A [`task::Task`] names its data, opens them as [`task::Samples`], and turns the samples' scores into metrics.
//! [`run::run`] lets a model predict and appends one line per sample to a file; [`score::score`] reads predictions of
//! any system instead. Both end in [`results`], which knows neither model nor data: metrics are made from the
//! scores stored with every sample, in the order of the samples' ids, so that they depend neither on the order in which
//! samples were computed nor on the number of shards.

pub mod atlas;
pub mod captions;
pub mod gcg;
pub mod grefcoco;
pub mod identity;
pub mod judge;
pub mod keywords;
mod lines;
pub mod marks;
pub mod panels;
pub mod png;
pub mod qa;
pub mod ranks;
pub mod reasonseg;
pub mod record;
pub mod registry;
pub mod report;
pub mod res;
pub mod results;
pub mod run;
pub mod runs;
pub mod score;
pub mod table;
pub mod task;
pub mod viscot;

pub use record::{Metrics, Phrase, Prediction, Record};
pub use registry::{find, registry};
pub use task::{Aggregate, Need, Predicted, Rows, Samples, Settings, Task};
