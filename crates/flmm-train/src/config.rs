//! A run's configuration: TOML over typed defaults, with single keys set from outside.

use std::path::{Path, PathBuf};

use candle_core::DType;
use flmm::weights::WeightFormat;
use flmm::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::head::HeadConfig;
use crate::mixture::DataConfig;
use crate::optim::ParamGroup;
use crate::selector::SelectorConfig;
use crate::settings::TrainConfig;

mod check;

/// Everything that can be said about a run. The defaults are the paper's.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// What is trained.
    pub mode: Mode,
    /// The frozen models.
    pub model: ModelConfig,
    /// The samples.
    pub data: DataConfig,
    /// The head and its losses.
    pub head: HeadConfig,
    /// Steps, batches, learning rate.
    pub train: TrainConfig,
    /// Looks at unseen samples while the run goes on.
    pub validation: ValidationConfig,
    /// What does not change the result.
    pub run: RunConfig,
}

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Mask head, text projection, layer weights and refiner; the keyword selector too where `head.selector` is given.
    #[default]
    Head,
    /// The keyword selector alone, for a head that is already trained (`spec/training.md` §8.2, mode b).
    Selector,
}

/// The frozen models. What is given on the command line comes first.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelConfig {
    /// Name of the LMM in the list of known models; another one is refused.
    pub lmm: Option<String>,
    /// Where it lies: a folder, or a repository of the Hugging Face hub.
    pub path: Option<PathBuf>,
    /// SAM checkpoint.
    pub sam: Option<PathBuf>,
    /// Numbers the LMM computes with.
    pub dtype: LmmType,
}

/// Numbers the frozen LMM computes with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LmmType {
    /// As published.
    #[default]
    Bf16,
    /// Twice the memory.
    F32,
    /// bf16 with matrices of linear layers in eight bits.
    Int8,
    /// As `Int8`, those of the decoder's layers in four bits.
    Int4,
}

impl LmmType {
    /// What the LMM computes with, and how its matrices are kept.
    pub fn parts(self) -> (DType, WeightFormat) {
        match self {
            Self::Bf16 => (DType::BF16, WeightFormat::AsLoaded),
            Self::F32 => (DType::F32, WeightFormat::AsLoaded),
            Self::Int8 => (DType::BF16, WeightFormat::Int8),
            Self::Int4 => (DType::BF16, WeightFormat::Int4),
        }
    }
}

/// Looks at unseen samples while the run goes on; the result of the run does not depend on them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ValidationConfig {
    /// Steps between validations; 0: never.
    pub every: u64,
    /// Samples, spread evenly over the `val` parts of `data.datasets`.
    pub samples: usize,
    /// How many of them are drawn, with the masks of the moment.
    pub overlays: usize,
    /// Another data folder with the `val` parts.
    pub data: Option<PathBuf>,
}

impl Default for ValidationConfig {
    fn default() -> Self {
        Self { every: 2000, samples: 64, overlays: 4, data: None }
    }
}

/// What does not change the result of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// Minutes between checkpoints.
    pub checkpoint_minutes: f64,
    /// Checkpoints that are kept.
    pub keep_checkpoints: usize,
    /// Steps between lines of the log.
    pub log_every: u64,
    /// Threads that compute gradients, one sample each.
    pub workers: usize,
    /// Threads that read pictures and run the frozen models, one sample each.
    pub loaders: usize,
    /// Batches made ahead.
    pub prefetch: usize,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self {
            checkpoint_minutes: 5.0,
            keep_checkpoints: 2,
            log_every: 10,
            workers: 1,
            loaders: 1,
            prefetch: 1,
        }
    }
}

/// Configurations that come with the program, by name: one for every known LMM, and one for the embedded model.
pub const BUILT_IN: &[(&str, &str)] = &[
    ("flmm-tiny", include_str!("../../../configs/flmm-tiny.toml")),
    ("deepseek-vl-1.3b", include_str!("../../../configs/deepseek-vl-1.3b.toml")),
    ("deepseek-vl-7b", include_str!("../../../configs/deepseek-vl-7b.toml")),
    ("hpt-air-6b", include_str!("../../../configs/hpt-air-6b.toml")),
    ("hpt-air-1.5-8b", include_str!("../../../configs/hpt-air-1.5-8b.toml")),
    ("llava-1.5-7b", include_str!("../../../configs/llava-1.5-7b.toml")),
    ("llava-1.6-7b", include_str!("../../../configs/llava-1.6-7b.toml")),
    ("llava-1.6-mistral-7b", include_str!("../../../configs/llava-1.6-mistral-7b.toml")),
    ("mgm-2b", include_str!("../../../configs/mgm-2b.toml")),
    ("mgm-7b", include_str!("../../../configs/mgm-7b.toml")),
    ("mgm-hd-7b", include_str!("../../../configs/mgm-hd-7b.toml")),
];

impl Config {
    /// Reads the file `path`, or the built-in configuration of that name, and then sets every `key=value` of
    /// `settings`, such as `train.epochs=1`.
    ///
    /// # Errors
    /// [`Error::Config`] naming the file, the line and the key: not TOML, an unknown key (with the nearest known
    /// one), a value of the wrong kind or out of range. [`Error::Io`] if there is no such file.
    pub fn load(path: &Path, settings: &[String]) -> Result<Self> {
        let built_in = BUILT_IN.iter().find(|(name, _)| !path.exists() && path == Path::new(name));
        let text = match built_in {
            Some((_, text)) => (*text).to_owned(),
            None => std::fs::read_to_string(path).map_err(|error| match error.kind() {
                std::io::ErrorKind::NotFound => {
                    let names: Vec<&str> = BUILT_IN.iter().map(|(name, _)| *name).collect();
                    let what = format!("`{}`: no such file", path.display());
                    Error::request(what, format!("give a file, or one of {}", names.join(", ")))
                }
                _ => Error::io(path, error),
            })?,
        };
        Self::parse(&text, path, settings)
    }

    /// The configuration in `text`, as [`Config::load`] reads it; `file` is what errors call it.
    pub fn parse(text: &str, file: &Path, settings: &[String]) -> Result<Self> {
        // By itself first: errors then tell the line.
        let mut config: Self = toml::from_str(text).map_err(|error| explain(&error, text, file))?;
        if !settings.is_empty() {
            let mut table: toml::Table = toml::from_str(text).map_err(|error| explain(&error, text, file))?;
            for setting in settings {
                set(&mut table, setting)?;
            }
            let given = format!("--set {}", settings.join(" --set "));
            config =
                table.try_into().map_err(|error: toml::de::Error| explain(&error, "", Path::new(&given)))?;
        }
        check::check(&config).map_err(|(key, what)| {
            Error::config(file, format!("`{key}` {what}"), "correct the value in the file, or with --set")
        })?;
        config.complete();
        Ok(config)
    }

    /// The whole configuration as TOML, defaults included.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string_pretty(self).map_err(|error| {
            Error::request(format!("cannot write the configuration: {error}"), "this is a bug")
        })
    }

    /// What follows from the mode and is not written down.
    fn complete(&mut self) {
        if self.mode == Mode::Selector {
            self.head.selector.get_or_insert(SelectorConfig::default());
        }
        const SELECTOR: &str = "keyword_selector.";
        let named = self.train.groups.iter().any(|group| group.prefix.starts_with(SELECTOR));
        if self.mode == Mode::Head && self.head.selector.is_some() && !named {
            // The selector must not disturb what it is trained beside, not even through the norm of all gradients.
            let group =
                ParamGroup { prefix: SELECTOR.into(), learning_rate: 1.0, weight_decay: 1.0, own_norm: true };
            self.train.groups.push(group);
        }
    }
}

/// Sets `a.b=value` in a table. A value that is not TOML is taken as text.
fn set(table: &mut toml::Table, setting: &str) -> Result<()> {
    let usage =
        |what: String| Error::request(what, "write --set key=value, for example --set train.epochs=1");
    let (key, value) =
        setting.split_once('=').ok_or_else(|| usage(format!("`{setting}` is not key=value")))?;
    let (key, value) = (key.trim(), value.trim());
    let parsed = toml::from_str::<toml::Table>(&format!("value = {value}")).ok();
    let value = match parsed.and_then(|mut parsed| parsed.remove("value")) {
        Some(value) => value,
        None => toml::Value::String(value.to_owned()),
    };
    let mut names: Vec<&str> = key.split('.').collect();
    let last = names.pop().filter(|name| !name.is_empty());
    let last = last.ok_or_else(|| usage(format!("`{setting}` has no key")))?;
    let mut at = table;
    for name in names {
        let below = at.entry(name).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        at = below.as_table_mut().ok_or_else(|| usage(format!("`{name}` in `{key}` is not a section")))?;
    }
    at.insert(last.to_owned(), value);
    Ok(())
}

/// The parser's error with the line, and for an unknown key the nearest known one.
fn explain(error: &toml::de::Error, text: &str, file: &Path) -> Error {
    let message = error.message();
    let line = error
        .span()
        .filter(|_| !text.is_empty())
        .map(|span| 1 + text.bytes().take(span.start).filter(|&byte| byte == b'\n').count());
    let at = line.map_or_else(String::new, |line| format!("line {line}: "));
    let (unknown, what) =
        match ["unknown field", "unknown variant"].iter().find(|kind| message.starts_with(**kind)) {
            Some(&"unknown field") => (true, "key"),
            Some(_) => (true, "value"),
            None => (false, ""),
        };
    if !unknown {
        return Error::config(
            file,
            format!("{at}{message}"),
            "compare with docs/training.md, which lists all keys",
        );
    }
    // `unknown field `x`, expected one of `a`, `b``: the quoted words.
    let words: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    let (found, known) = words.split_first().map_or(("", &[][..]), |(first, rest)| (*first, rest));
    let nearest =
        known.iter().map(|name| (strsim::jaro_winkler(found, name), name)).max_by(|a, b| a.0.total_cmp(&b.0));
    let hint = match nearest {
        Some((likeness, name)) if likeness > 0.7 => {
            format!("did you mean `{name}`? Known here: {}", known.join(", "))
        }
        _ => format!("known here: {}", known.join(", ")),
    };
    Error::config(file, format!("{at}unknown {what} `{found}`"), hint)
}

#[cfg(test)]
mod tests {
    use flmm::lmm::REGISTRY;

    use super::*;

    fn parse(text: &str, settings: &[&str]) -> Result<Config> {
        let settings: Vec<String> = settings.iter().map(|setting| (*setting).to_owned()).collect();
        Config::parse(text, Path::new("my.toml"), &settings)
    }

    #[test]
    fn every_known_lmm_has_a_configuration() {
        for entry in REGISTRY {
            let mut named = 0;
            for (name, text) in BUILT_IN {
                let config = Config::parse(text, Path::new(name), &[]).unwrap();
                named += usize::from(config.model.lmm.as_deref() == Some(entry.spec.name));
                assert!(text.lines().count() <= 30, "{name} is not short");
            }
            assert_eq!(named, 1, "{}", entry.spec.name);
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        for (name, text) in BUILT_IN {
            let config = Config::parse(text, Path::new(name), &[]).unwrap();
            let again = Config::parse(&config.to_toml().unwrap(), Path::new("again"), &[]).unwrap();
            assert_eq!(config, again, "{name}");
        }
        assert_eq!(parse("", &[]).unwrap(), Config::default());
    }

    #[test]
    fn keys_are_set_from_outside() {
        let settings = [
            "train.epochs=3",
            "data.exclude = ids.txt",
            "head.selector.pos_weight=2",
            "data.datasets=['png']",
        ];
        let config = parse("[train]\nepochs = 1\n", &settings).unwrap();
        assert_eq!(config.train.epochs, 3);
        assert_eq!(config.data.exclude, Some("ids.txt".into()));
        assert_eq!(config.head.selector.unwrap().pos_weight, 2.0);
        assert_eq!(config.data.datasets.len(), 1);
        // Training beside the selector changes nothing about the rest.
        assert!(config.train.groups.iter().any(|group| group.own_norm));
        for (setting, expected) in [
            ("train.epochs", "is not key=value"),
            ("=3", "has no key"),
            ("mode.x=3", "`mode` in `mode.x` is not a section"),
            ("train.epoch=3", "unknown key `epoch`"),
            ("train.epochs=many", "invalid type"),
        ] {
            let message = parse("mode = \"head\"", &[setting]).unwrap_err().to_string();
            assert!(message.contains(expected), "{setting}: {message}");
        }
    }

    #[test]
    fn mistakes_are_told_with_line_and_nearest_key() {
        for (text, expected, hint) in [
            (
                "[train]\nlerning_rate = 1e-4\n",
                "my.toml: line 2: unknown key `lerning_rate`",
                "did you mean `learning_rate`?",
            ),
            ("[trian]\n", "line 1: unknown key `trian`", "did you mean `train`?"),
            ("[data]\ndatasets = ['refcoc+']\n", "unknown value `refcoc+`", "did you mean `refcoco+`?"),
            ("[train]\nepochs = 'x'\n", "line 2: invalid type", "docs/training.md"),
            ("[train\n", "line 1", "docs/training.md"),
            ("[train]\nbatch_size = 0\n", "`train.batch_size` is 0", "--set"),
            ("[train.optimizer]\nmax_norm = nan\n", "`train.optimizer.max_norm` is NaN", "--set"),
            ("[train.optimizer]\nbeta2 = 1\n", "`train.optimizer.beta2` is 1", "--set"),
            ("[train.optimizer]\neps = 0\n", "`train.optimizer.eps` is 0", "--set"),
            (
                "[[train.groups]]\nprefix = 'sam.'\nlearning_rate = -1\n",
                "`train.groups.learning_rate`",
                "--set",
            ),
            ("[train]\nbatch_size = 65537\n", "`train.batch_size` is 65537, expected 1 to 65536", "--set"),
            ("[head]\nbase_channels = 1025\n", "`head.base_channels` is 1025, expected 1 to 1024", "--set"),
            ("[head]\nmaps = 0\n", "`head.maps` is 0", "--set"),
            ("[head.losses]\ncoarse_bce = -1\n", "`head.losses.coarse_bce` is -1", "--set"),
            ("[head.selector]\npositive_rate = 1\n", "`head.selector.positive_rate` is 1", "--set"),
            ("[data]\nlimit = 0\n", "`data.limit` is 0", "--set"),
            ("[validation]\nsamples = 0\n", "`validation.samples` is 0", "--set"),
            ("[data]\nempty_narratives = 'keep'\n", "only `mode = \"selector\"`", "--set"),
        ] {
            let error = parse(text, &[]).unwrap_err();
            assert!(error.to_string().contains(expected), "{text}: {error}");
            assert!(error.hint().unwrap().contains(hint), "{text}: {:?}", error.hint());
        }
    }
}
