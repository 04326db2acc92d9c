//! What is trained: the interface between the training loop and a model.

use candle_core::Tensor;
use flmm::Result;

/// A model with a loss. The training loop owns the tensors; the task only reads them.
///
/// The loss of a batch is `Σ_t (Σ_b w_tb · l_tb) / (Σ_b w_tb)` over the terms `t` of the samples `b`. A mask loss
/// weighs a picture by its number of masks, a selector loss weighs every sample alike (`spec/training.md` §4, §8).
pub trait Task: Sync {
    /// One training sample.
    type Sample: Send + Sync;

    /// The weight of every term for `sample`; 0 leaves the sample out of that term. The number of terms is fixed.
    fn weights(&self, sample: &Self::Sample) -> Vec<f64>;

    /// The value of every term, scalars with gradients, and what is to be logged. Terms of weight 0 may hold
    /// anything.
    fn losses(&self, sample: &Self::Sample) -> Result<Losses>;

    /// The same in parts: terms of all parts summed up are those of [`Task::losses`]. The trainer differentiates
    /// each part and frees its graph before the next is computed, so that large samples fit into memory.
    fn in_parts(&self, sample: &Self::Sample, each: &mut dyn FnMut(Losses) -> Result<()>) -> Result<()> {
        each(self.losses(sample)?)
    }
}

/// What one sample costs.
#[derive(Debug, Clone)]
pub struct Losses {
    /// One scalar per term.
    pub terms: Vec<Tensor>,
    /// Values for the log, averaged by weight over samples.
    pub metrics: Vec<Metric>,
}

/// A logged value of one sample.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Metric {
    /// Its name in `metrics.jsonl`.
    pub name: &'static str,
    /// Its value.
    pub value: f64,
    /// Its weight in averages.
    pub weight: f64,
}
