//! What a run shows on the way: validation and TensorBoard, added to what the caller watches.

use std::path::Path;

use flmm::Result;
use flmm::grounder::GroundingHead;
use serde_json::{Map, Value};

use crate::config::Config;
use crate::tensorboard::EventWriter;
use crate::tolerant::News;
use crate::validation::Validation;
use crate::watch::{After, Step, Watch};

/// Adds validation and TensorBoard to what the caller watches.
pub(crate) struct Watched<'a> {
    inner: &'a mut (dyn Watch + 'a),
    validation: Option<&'a Validation<'a>>,
    head: &'a GroundingHead,
    /// Tells which samples were skipped lately.
    news: &'a dyn News,
    every: u64,
    out: &'a Path,
    events: Option<EventWriter>,
    /// Steps taken before this process.
    began: u64,
    /// What the last validation found.
    values: Vec<(String, f64)>,
}

impl<'a> Watched<'a> {
    pub(crate) fn new(
        inner: &'a mut (dyn Watch + 'a),
        validation: Option<&'a Validation<'a>>,
        head: &'a GroundingHead,
        news: &'a dyn News,
        config: &Config,
        out: &'a Path,
    ) -> Self {
        let every = config.validation.every;
        Self { inner, validation, head, news, every, out, events: None, began: 0, values: Vec::new() }
    }

    /// Steps taken before this process, and what the last validation found.
    pub(crate) fn found(self) -> (u64, Vec<(String, f64)>) {
        (self.began, self.values)
    }
}

impl Watch for Watched<'_> {
    fn stage(&mut self, what: &'static str) {
        self.inner.stage(what);
    }

    fn begin(&mut self, step: u64, total: u64, per_epoch: u64) {
        self.began = step;
        self.inner.begin(step, total, per_epoch);
        // Curves are a courtesy: a run does not fail for want of them.
        match EventWriter::create(&self.out.join("tensorboard"), step) {
            Ok(events) => self.events = Some(events),
            Err(error) => self.inner.note(&format!("no TensorBoard curves: {error}")),
        }
    }

    fn after_step(&mut self, step: &Step) -> Result<After> {
        for news in self.news.news() {
            self.inner.note(&news);
        }
        let mut after = self.inner.after_step(step)?;
        let due = self.every > 0 && (step.step.is_multiple_of(self.every) || step.step == step.total);
        if let (true, Some(validation)) = (due, self.validation) {
            self.inner.stage("validating");
            let found = validation.look(self.head, step.step)?;
            if let Some(events) = &mut self.events {
                for (key, picture) in &found.pictures {
                    events.picture(step.step, key, picture)?;
                }
            }
            self.values.clone_from(&found.values);
            after.values.extend(found.values);
        }
        Ok(after)
    }

    fn line(&mut self, line: &Map<String, Value>) -> Result<()> {
        if let Some(events) = &mut self.events {
            let step = line.get("step").and_then(Value::as_u64).unwrap_or_default();
            let tag = |name: &str| match name.strip_prefix("val_") {
                Some(name) => format!("val/{name}"),
                None => format!("train/{name}"),
            };
            let named: Vec<(String, f64)> = line
                .iter()
                .filter(|(name, _)| *name != "step")
                .filter_map(|(name, value)| Some((tag(name), value.as_f64()?)))
                .collect();
            events.scalars(step, named.iter().map(|(name, value)| (name.as_str(), *value)))?;
        }
        self.inner.line(line)
    }

    fn saved(&mut self, step: u64) {
        self.inner.saved(step);
    }

    fn note(&mut self, text: &str) {
        self.inner.note(text);
    }
}
