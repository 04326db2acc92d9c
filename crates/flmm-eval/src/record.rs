//! One line of a samples file or of a predictions file.

use std::collections::BTreeMap;

use flmm_data::coco::RunLengths;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

/// What a system says and marks for one sample. The format is documented in `docs/evaluation.md`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// Which sample; a number counts as its digits.
    #[serde(deserialize_with = "text_or_number")]
    pub id: String,
    /// The picture it belongs to; if given it must be the sample's.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "optional_text_or_number")]
    pub image_id: Option<String>,
    /// What was asked.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub prompt: String,
    /// What was answered.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub answer: String,
    /// Phrases with their masks, in the order of the sample's phrases where it has some.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub phrases: Vec<Phrase>,
    /// Whatever else a task wants to know.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub extra: Map<String, Value>,
}

/// A phrase and its mask.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Phrase {
    /// Its words.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub text: String,
    /// Its mask at the picture's own size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub segmentation: Option<RunLengths>,
    /// How sure the system is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
}

/// One line of a samples file: a prediction and its scores.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Record {
    /// The prediction.
    #[serde(flatten)]
    pub prediction: Prediction,
    /// Which run it belongs to ([`crate::results::Header::key`]).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
    /// What metrics are made from.
    pub scores: Value,
    /// Other masks for the same phrases, by the name of their row in the table.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rows: BTreeMap<String, Row>,
}

/// Other masks for the phrases of a prediction.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// One mask per phrase.
    pub segmentations: Vec<RunLengths>,
    /// What metrics are made from.
    pub scores: Value,
}

/// Named numbers in a fixed order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metrics(pub Vec<(String, f64)>);

impl Metrics {
    /// Adds a number.
    pub fn push(&mut self, name: impl Into<String>, value: f64) {
        self.0.push((name.into(), value));
    }

    /// The number of that name.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| *value)
    }
}

impl<S: Into<String>, const N: usize> From<[(S, f64); N]> for Metrics {
    fn from(pairs: [(S, f64); N]) -> Self {
        Self(pairs.into_iter().map(|(name, value)| (name.into(), value)).collect())
    }
}

impl Serialize for Metrics {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

fn text_or_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    match Value::deserialize(deserializer)? {
        Value::String(text) => Ok(text),
        Value::Number(number) => Ok(number.to_string()),
        other => Err(serde::de::Error::custom(format!("`{other}` is not an id: expected text or a number"))),
    }
}

fn optional_text_or_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    text_or_number(deserializer).map(Some)
}
