//! Looking on while a run goes on.

use std::ops::ControlFlow;

use flmm::Result;
use serde_json::{Map, Value};

/// One step that was taken.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// Its number, from 1.
    pub step: u64,
    /// All steps of the run.
    pub total: u64,
    /// Its epoch, from 0.
    pub epoch: u64,
    /// The learning rate it used.
    pub lr: f64,
    /// The loss of its batch.
    pub loss: f64,
    /// The global norm of its gradients before clipping.
    pub grad_norm: f64,
}

/// What an onlooker answers to a step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct After {
    /// Whether to write a checkpoint and end the run here.
    pub stop: bool,
    /// Values for the log, which are written with the step.
    pub values: Vec<(String, f64)>,
}

/// Someone who is told what a run does. Every method may be left out.
pub trait Watch {
    /// What is done when it is not steps: opening models and data, validating.
    fn stage(&mut self, _what: &'static str) {}

    /// The run begins, or goes on from a checkpoint, after `step` of `total` steps; an epoch has `per_epoch`.
    fn begin(&mut self, _step: u64, _total: u64, _per_epoch: u64) {}

    /// A step was taken.
    fn after_step(&mut self, _step: &Step) -> Result<After> {
        Ok(After::default())
    }

    /// A line was added to the log.
    fn line(&mut self, _line: &Map<String, Value>) -> Result<()> {
        Ok(())
    }

    /// A checkpoint was written after `step` steps.
    fn saved(&mut self, _step: u64) {}

    /// Something happened that is worth a line.
    fn note(&mut self, _text: &str) {}
}

/// Watches by a function that may break the run off.
pub(crate) struct EachStep<F>(pub(crate) F);

impl<F: FnMut(&Step) -> ControlFlow<()>> Watch for EachStep<F> {
    fn after_step(&mut self, step: &Step) -> Result<After> {
        Ok(After { stop: (self.0)(step).is_break(), values: Vec::new() })
    }
}
