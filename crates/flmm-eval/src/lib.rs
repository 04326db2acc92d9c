//! The tasks and metrics of the paper's tables (`spec/evaluation.md`), for flmm's models and for anyone's predictions.

pub mod captions;
