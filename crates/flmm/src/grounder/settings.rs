//! What of a head its tensors do not tell: which attention maps it looks at, and whether it has a refiner.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::SAM_PREFIX;
use crate::error::{Error, Result};
use crate::weights::files;

/// What makes the final masks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RefinerKind {
    /// SAM's prompt encoder and mask decoder, as published.
    #[default]
    Sam,
    /// Nothing: coarse logits are resized to the picture. Neither SAM nor the text projection is needed.
    None,
}

/// Settings of a head, kept in its `head.json`. The defaults are the published head's.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HeadSettings {
    /// Numbers of the attention maps that the mask head looks at, in its own order; all of them unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channels_used: Option<Vec<u32>>,
    /// What makes the final masks.
    #[serde(default)]
    pub refiner: RefinerKind,
}

impl HeadSettings {
    /// Reads the `head.json` of the head at `path`, in the folder or beside the file; the defaults where there is none.
    ///
    /// # Errors
    /// [`Error::Config`] if it cannot be read or names a map twice.
    pub fn read(path: &Path) -> Result<Self> {
        let folder = if files::is_dir(path) { path } else { path.parent().unwrap_or(path) };
        let file = folder.join("head.json");
        if !files::is_file(&file) {
            return Ok(Self::default());
        }
        let settings: Self = serde_json::from_str(&files::read_text(&file)?).map_err(|e| {
            let hint = "`channels_used` is a list of numbers, `refiner` is \"sam\" or \"none\"";
            Error::config(&file, format!("not the description of a head: {e}"), hint)
        })?;
        if let Some(used) = &settings.channels_used
            && (used.is_empty() || used.iter().collect::<BTreeSet<_>>().len() != used.len())
        {
            let hint = "give the number of every map once";
            return Err(Error::config(&file, "`channels_used` is empty or names a map twice", hint));
        }
        Ok(settings)
    }

    /// How many maps the mask head looks at, of `channels` that the LMM has.
    ///
    /// # Errors
    /// [`Error::Request`] if it looks at one that the LMM does not have.
    pub fn channels(&self, channels: usize) -> Result<usize> {
        let Some(used) = &self.channels_used else { return Ok(channels) };
        match used.iter().find(|&&channel| channel as usize >= channels) {
            None => Ok(used.len()),
            Some(channel) => Err(Error::request(
                format!("the head looks at attention map {channel}, but the LMM has {channels}"),
                super::head::WRONG_HEAD,
            )),
        }
    }

    /// Leaves out the tensors that a head with these settings does not have.
    pub fn retain(&self, tensors: &mut BTreeMap<String, Tensor>) {
        if self.refiner == RefinerKind::None {
            tensors.retain(|name, _| !name.starts_with(SAM_PREFIX) && !name.starts_with("text_proj."));
        }
    }

    /// The numbers in [`Self::channels_used`] for picking maps.
    pub(super) fn index(&self, device: &Device) -> Result<Option<Tensor>> {
        let used = self.channels_used.as_ref();
        used.map(|used| Ok(Tensor::from_slice(used, used.len(), device)?)).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<HeadSettings> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("head.json"), json).unwrap();
        HeadSettings::read(folder.path())
    }

    #[test]
    fn older_descriptions_and_files_without_one_are_published_heads() {
        assert_eq!(
            read(r#"{"format": 1, "channels": 30, "refiner": "sam"}"#).unwrap(),
            HeadSettings::default()
        );
        assert_eq!(HeadSettings::read(Path::new("none/head.pth")).unwrap(), HeadSettings::default());
        assert_eq!(HeadSettings::default().channels(30).unwrap(), 30);
    }

    #[test]
    fn chosen_maps_and_no_refiner() {
        let settings = read(r#"{"channels_used": [7, 2], "refiner": "none"}"#).unwrap();
        assert_eq!((settings.channels(8).unwrap(), settings.refiner), (2, RefinerKind::None));
        assert!(settings.channels(7).unwrap_err().to_string().contains("map 7"));
        let json = serde_json::to_string(&settings).unwrap();
        assert_eq!(read(&json).unwrap(), settings);
    }

    #[test]
    fn nonsense_is_refused() {
        for json in
            [r#"{"channels_used": []}"#, r#"{"channels_used": [1, 1]}"#, r#"{"refiner": "magic"}"#, "{"]
        {
            assert!(read(json).is_err(), "{json}");
        }
    }
}
