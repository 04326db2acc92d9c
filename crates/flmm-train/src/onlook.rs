//! What a run shows on the way: validation and TensorBoard, added to what the caller watches.

use std::path::Path;

use flmm::Result;
use flmm::grounder::GroundingHead;
use serde_json::{Map, Value};

use crate::tensorboard::EventWriter;
use crate::tolerant::News;
use crate::validation::Validation;
use crate::watch::{After, Step, Watch};

/// Adds validation and TensorBoard to what the caller watches. Both are courtesies: a run does not end for want of
/// them.
pub(crate) struct Watched<'a> {
    inner: &'a mut (dyn Watch + 'a),
    /// Steps between validations, if there are any.
    validation: Option<(&'a Validation<'a>, u64)>,
    /// Whether the last validation has failed, which was told then.
    failing: bool,
    head: &'a GroundingHead,
    /// Tells which samples were skipped lately.
    news: &'a dyn News,
    /// The folder for curves.
    curves: Option<&'a Path>,
    events: Option<EventWriter>,
    found: Found,
}

/// What a run tells besides its result.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Found {
    /// Steps taken before this process.
    pub(crate) began: u64,
    /// Steps of the whole run.
    pub(crate) total: u64,
    /// What the last validation found.
    pub(crate) values: Vec<(String, f64)>,
}

impl<'a> Watched<'a> {
    pub(crate) fn new(
        inner: &'a mut (dyn Watch + 'a),
        validation: Option<(&'a Validation<'a>, u64)>,
        head: &'a GroundingHead,
        news: &'a dyn News,
        curves: Option<&'a Path>,
    ) -> Self {
        let found = Found::default();
        Self { inner, validation, failing: false, head, news, curves, events: None, found }
    }

    pub(crate) fn found(self) -> Found {
        self.found
    }

    /// Does something with the curves; they end, and that is told, when it fails.
    fn draw(&mut self, draw: impl FnOnce(&mut EventWriter) -> Result<()>) {
        let Some(events) = &mut self.events else { return };
        if let Err(error) = draw(events) {
            self.events = None;
            self.inner.note(&format!("no more TensorBoard curves: {error}"));
        }
    }
}

impl Watch for Watched<'_> {
    fn stage(&mut self, what: &'static str) {
        self.inner.stage(what);
    }

    fn begin(&mut self, step: u64, total: u64, per_epoch: u64) {
        (self.found.began, self.found.total) = (step, total);
        self.inner.begin(step, total, per_epoch);
        match self.curves.map(|folder| EventWriter::create(folder, step)).transpose() {
            Ok(events) => self.events = events,
            Err(error) => self.inner.note(&format!("no TensorBoard curves: {error}")),
        }
    }

    fn after_step(&mut self, step: &Step) -> Result<After> {
        for news in self.news.news() {
            self.inner.note(&news);
        }
        let mut after = self.inner.after_step(step)?;
        let due = |every: u64| step.step.is_multiple_of(every) || step.step == step.total;
        if let Some((validation, _)) = self.validation.filter(|(_, every)| due(*every)) {
            self.inner.stage("validating");
            match validation.look(self.head, step.step) {
                Ok(found) => {
                    self.failing = false;
                    for (key, picture) in &found.pictures {
                        self.draw(|events| events.picture(step.step, key, picture));
                    }
                    self.found.values.clone_from(&found.values);
                    after.values.extend(found.values);
                }
                Err(error) => {
                    if !std::mem::replace(&mut self.failing, true) {
                        self.inner.note(&format!("no validation: {error}"));
                    }
                }
            }
        }
        Ok(after)
    }

    fn line(&mut self, line: &Map<String, Value>) -> Result<()> {
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
        self.draw(|events| events.scalars(step, named.iter().map(|(name, value)| (name.as_str(), *value))));
        self.inner.line(line)
    }

    fn saved(&mut self, step: u64) {
        self.inner.saved(step);
    }

    fn note(&mut self, text: &str) {
        self.inner.note(text);
    }
}

#[cfg(test)]
mod tests {
    use flmm::grounder::HeadSizes;
    use flmm::sam::SamConfig;

    use super::*;

    #[derive(Default)]
    struct Notes(Vec<String>);

    impl Watch for Notes {
        fn note(&mut self, text: &str) {
            self.0.push(text.to_owned());
        }
    }

    struct NoNews;

    impl News for NoNews {
        fn news(&self) -> Vec<String> {
            Vec::new()
        }
    }

    #[test]
    fn curves_that_cannot_be_written_are_told_once() {
        let dir = tempfile::tempdir().unwrap();
        let sizes = HeadSizes { channels: 2, layers: 1, hidden_size: 4, sam: SamConfig::vit_l() };
        let head = GroundingHead::blank(&sizes, &candle_core::Device::Cpu).unwrap();
        // A file lies where the folder should be.
        let curves = dir.path().join("tensorboard");
        std::fs::write(&curves, b"").unwrap();
        let mut notes = Notes::default();
        let mut watched = Watched::new(&mut notes, None, &head, &NoNews, Some(&curves));
        watched.begin(3, 9, 2);
        for _ in 0..2 {
            watched
                .line(&Map::from_iter([("step".to_owned(), 4.into()), ("loss".to_owned(), 0.5.into())]))
                .unwrap();
        }
        assert_eq!(watched.found(), Found { began: 3, total: 9, values: Vec::new() });
        assert_eq!(notes.0.len(), 1, "{:?}", notes.0);
        assert!(notes.0[0].starts_with("no TensorBoard curves: "), "{:?}", notes.0);
    }
}
