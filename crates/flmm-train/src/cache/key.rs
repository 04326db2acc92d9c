//! What a cache's numbers depend on: a cache made under another key is refused.

use std::collections::BTreeMap;

use flmm::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// How numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Values {
    /// As they are: training with and without the cache is the same, bit for bit.
    F32,
    /// 8 significant bits; exact for maps and hidden states of an LMM that computes in bf16.
    Bf16,
    /// 11 significant bits; maps have a power of two each, so that small attention does not underflow.
    #[default]
    F16,
}

/// How attention maps are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MapValues {
    /// As everything else.
    #[default]
    Same,
    /// One byte per value, in 255ths of the map's largest value.
    Int8,
}

/// Which hidden states are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rows {
    /// Those of tokens that belong to a phrase: all that masks need.
    #[default]
    Phrases,
    /// Those of every token, and the tokens' labels: what the keyword selector needs.
    All,
}

/// Everything the numbers of a cache depend on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheKey {
    /// The LMM's name.
    pub lmm: String,
    /// [`flmm::weights::fingerprint`] of the LMM's folder.
    pub lmm_revision: String,
    /// Numbers the LMM is kept in, as [`flmm::lmm::OpenOptions::numbers`] has them.
    pub lmm_dtype: String,
    /// [`flmm::weights::fingerprint`] of SAM's checkpoint.
    pub sam_revision: String,
    /// [`flmm::vision::preprocess::VERSION`].
    pub preprocessing: u32,
    /// [`flmm::capture::VERSION`].
    pub capture: u32,
    /// What the LMM was asked, in the words of the configuration.
    pub prompt: String,
    /// Digests of the annotation files, by dataset. Caches of other datasets join; one of the same must agree.
    pub annotations: BTreeMap<String, String>,
    /// Everything else that decides what a sample of a given name is: how sentences are chosen, the picture's size.
    pub data: Value,
    /// How numbers are stored.
    pub values: Values,
    /// How maps are stored.
    pub maps: MapValues,
    /// Which hidden states are stored.
    pub rows: Rows,
}

impl CacheKey {
    /// One line per field of `found` that cannot stand for this key: `prompt: "a" in the cache, "b" wanted`.
    ///
    /// Hidden states of all tokens serve where those of phrases are wanted, and samples are named by their dataset: only
    /// annotations of datasets that both have are compared.
    pub fn differences(&self, found: &Self) -> Vec<String> {
        let fields = |key: &Self| match serde_json::to_value(key) {
            Ok(Value::Object(fields)) => fields,
            _ => serde_json::Map::new(),
        };
        let (mut wanted, mut found) = (fields(self), fields(found));
        let of_datasets = |key: &mut serde_json::Map<_, _>| match key.remove("annotations") {
            Some(Value::Object(digests)) => digests,
            _ => serde_json::Map::new(),
        };
        let (own, others) = (of_datasets(&mut wanted), of_datasets(&mut found));
        let line = |name: &str, wanted: &Value, found: &Value| {
            format!("{name}: {found} in the cache, {wanted} wanted")
        };
        let serves = |name: &str, found: &Value| name == "rows" && found.as_str() == Some("all");
        let differs = wanted.iter().filter_map(|(name, value)| {
            let other = found.get(name).unwrap_or(&Value::Null);
            (other != value && !serves(name, other)).then(|| line(name, value, other))
        });
        let edited = own.iter().filter_map(|(dataset, value)| {
            let other = others.get(dataset).filter(|other| *other != value)?;
            Some(line(&format!("annotations.{dataset}"), value, other))
        });
        differs.chain(edited).collect()
    }

    pub(super) fn to_json(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self)
            .map_err(|e| Error::request(format!("the cache's key cannot be written: {e}"), "report this"))
    }
}

#[cfg(test)]
pub(super) fn test_key() -> CacheKey {
    CacheKey {
        lmm: "tiny".into(),
        lmm_revision: "1".into(),
        lmm_dtype: "f32".into(),
        sam_revision: "2".into(),
        preprocessing: 1,
        capture: 1,
        prompt: "Describe.".into(),
        annotations: BTreeMap::new(),
        data: Value::Null,
        values: Values::F32,
        maps: MapValues::Same,
        rows: Rows::Phrases,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_named_and_more_rows_serve() {
        let wanted = test_key();
        let all = CacheKey { rows: Rows::All, ..test_key() };
        assert!(wanted.differences(&all).is_empty());
        assert_eq!(all.differences(&wanted), [r#"rows: "phrases" in the cache, "all" wanted"#]);
        let other = CacheKey { prompt: "What?".into(), capture: 2, ..test_key() };
        let lines = wanted.differences(&other);
        assert_eq!(
            lines,
            ["capture: 2 in the cache, 1 wanted", r#"prompt: "What?" in the cache, "Describe." wanted"#]
        );
    }

    #[test]
    fn annotations_of_the_same_dataset_must_agree() {
        let key = |annotations: &[(&str, &str)]| CacheKey {
            annotations: annotations.iter().map(|&(name, digest)| (name.into(), digest.into())).collect(),
            ..test_key()
        };
        let wanted = key(&[("png", "1"), ("refcoco", "2")]);
        assert!(wanted.differences(&key(&[("png", "1"), ("refcocog", "9")])).is_empty());
        assert_eq!(
            wanted.differences(&key(&[("refcoco", "3")])),
            [r#"annotations.refcoco: "3" in the cache, "2" wanted"#]
        );
    }
}
