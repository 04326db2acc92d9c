//! Which of a repository's files a model needs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::weights::{KNOWN, is_weight_file};

/// Small files that loaders read where they exist.
const SMALL: [&str; 14] = [
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
    "chat_template.jinja",
    "open_clip_config.json",
    "sam_config.json",
    "head.json",
];

/// Files that say that a folder holds a model or a part of one.
const CONFIGS: [&str; 4] = ["config.json", "open_clip_config.json", "sam_config.json", "head.json"];

/// Folders of a bundle, which may hold weights alone.
const BUNDLE: [&str; 3] = ["lmm", "sam", "head"];

/// The files of a repository that a model needs; an index stands for its shards.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Selection {
    /// Configurations, tokenizers and the indexes of sharded weights.
    pub(super) small: Vec<String>,
    /// Weight files that need no index.
    pub(super) weights: Vec<String>,
    /// Folders with a configuration but without weights, where others have some.
    pub(super) hollow: Vec<String>,
}

impl Selection {
    /// Chooses among `files`, paths with `/` below the repository.
    ///
    /// Weights are looked for as [`crate::weights::load_checkpoint`] does: safetensors before pickles, an index
    /// before a single file. A repository whose root has weights is taken without its folders, else every folder
    /// with a configuration and weights is taken (HPT's `llm/`, `visual_encoder/`, `projector/`; a bundle's parts).
    pub(super) fn of<'a>(files: impl IntoIterator<Item = &'a str>) -> Self {
        let mut folders: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for file in files {
            let (folder, name) = file.rsplit_once('/').unwrap_or(("", file));
            if !folder.contains('/') {
                folders.entry(folder).or_default().insert(name);
            }
        }
        let flat = folders.get("").is_some_and(|names| weights(names).is_some());
        let mut chosen = Self::default();
        for (folder, names) in &folders {
            let inside = |name: &str| match folder.is_empty() {
                true => name.to_owned(),
                false => format!("{folder}/{name}"),
            };
            let weights = weights(names);
            if !folder.is_empty() {
                let described = CONFIGS.iter().any(|name| names.contains(name));
                if flat || !(described || BUNDLE.contains(folder)) {
                    continue;
                }
                if weights.is_none() {
                    chosen.hollow.push((*folder).to_owned());
                    continue;
                }
            }
            chosen.small.extend(SMALL.iter().filter(|name| names.contains(*name)).map(|name| inside(name)));
            match weights {
                Some(index) if index.ends_with(".index.json") => chosen.small.push(inside(index)),
                Some(file) => chosen.weights.push(inside(file)),
                None => {}
            }
        }
        chosen
    }

    /// The weight file or index called `name`, with the configurations among `names`, the files beside it.
    pub(super) fn of_file<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Self {
        let configs = names.filter(|name| CONFIGS.contains(name)).map(str::to_owned);
        let mut chosen = Self { small: configs.collect(), ..Self::default() };
        if name.ends_with(".index.json") {
            chosen.small.push(name.to_owned());
        } else if is_weight_file(Path::new(name)) {
            chosen.weights.push(name.to_owned());
        }
        chosen
    }

    /// The same files with `prefix` before their names.
    pub(super) fn below(self, prefix: &str) -> Self {
        let below =
            |names: Vec<String>| names.into_iter().map(|name| format!("{prefix}{name}")).collect::<Vec<_>>();
        Self { small: below(self.small), weights: below(self.weights), hollow: below(self.hollow) }
    }

    /// The indexes among the files.
    pub(super) fn indexes(&self) -> impl Iterator<Item = &str> {
        self.small.iter().map(String::as_str).filter(|name| name.ends_with(".index.json"))
    }

    /// Whether there are weights at all.
    pub(super) fn has_weights(&self) -> bool {
        !self.weights.is_empty() || self.indexes().next().is_some()
    }

    /// Whether `name` is among the small files of any folder.
    pub(super) fn has_small(&self, name: &str) -> bool {
        self.small.iter().any(|file| file.rsplit('/').next() == Some(name))
    }
}

/// The weight file, or the index of the weight files, of a folder with the files `names`.
fn weights<'a>(names: &BTreeSet<&'a str>) -> Option<&'a str> {
    if let Some(known) = KNOWN.iter().find_map(|name| names.get(name)) {
        return Some(known);
    }
    let mut others = names.iter().filter(|name| is_weight_file(Path::new(name)));
    match (others.next(), others.next()) {
        (Some(one), None) => Some(one),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(files: &[&str]) -> Selection {
        Selection::of(files.iter().copied())
    }

    #[test]
    fn one_form_of_the_weights_is_enough() {
        let chosen = of(&[
            ".gitattributes",
            "README.md",
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "onnx/config.json",
            "onnx/model.onnx",
            "pytorch_model-00001-of-00001.bin",
            "pytorch_model.bin.index.json",
            "tf_model.h5",
            "tokenizer.json",
            "tokenizer.model",
        ]);
        assert_eq!(chosen.small, ["config.json", "tokenizer.json", "model.safetensors.index.json"]);
        assert_eq!(chosen.weights, Vec::<String>::new());
        assert!(chosen.has_weights() && chosen.has_small("tokenizer.json"));
        let pickles = of(&["config.json", "pytorch_model.bin", "training_args.bin", "model.gguf"]);
        assert_eq!(pickles.weights, ["pytorch_model.bin"]);
        assert!(!of(&["config.json", "model.gguf"]).has_weights());
    }

    #[test]
    fn folders_count_where_the_root_has_no_weights() {
        let hpt = of(&[
            "README.md",
            "config.json",
            "llm/config.json",
            "llm/model.safetensors",
            "llm/tokenizer.json",
            "projector/config.json",
            "projector/model.safetensors",
            "visual_encoder/config.json",
            "assets/logo.bin",
            "a/b/model.safetensors",
        ]);
        assert_eq!(hpt.weights, ["llm/model.safetensors", "projector/model.safetensors"]);
        assert_eq!(
            hpt.small,
            ["config.json", "llm/config.json", "llm/tokenizer.json", "projector/config.json"]
        );
        assert_eq!(hpt.hollow, ["visual_encoder"]);
        let bundle =
            of(&["lmm/config.json", "lmm/model.safetensors", "sam/sam_vit_l.pth", "head/head.safetensors"]);
        assert_eq!(bundle.weights, ["head/head.safetensors", "lmm/model.safetensors", "sam/sam_vit_l.pth"]);
    }
}
