//! Reading Hugging Face configuration files: sparse keys, defaults, and errors that name the key.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The largest size accepted: far above any model's, and products of two of them do not overflow.
pub const MAX_SIZE: usize = 1 << 24;

/// The largest number of layers accepted.
const MAX_LAYERS: usize = 1 << 10;

/// One JSON object of a configuration file, with the path of keys that led to it.
#[derive(Debug, Clone)]
pub struct Config {
    file: PathBuf,
    prefix: String,
    map: Map<String, Value>,
}

impl Config {
    /// Reads the JSON object in `file`.
    pub fn read(file: &Path) -> Result<Self> {
        let text = crate::weights::files::read_text(file)?;
        let value: Value = serde_json::from_str(&text).map_err(|source| {
            Error::config(file, format!("not valid JSON: {source}"), "download the file again")
        })?;
        Self::new(file, value)
    }

    /// Wraps `value`; `file` is what error messages call its origin.
    pub fn new(file: &Path, value: Value) -> Result<Self> {
        match value {
            Value::Object(map) => Ok(Self { file: file.to_owned(), prefix: String::new(), map }),
            other => Err(Error::config(
                file,
                format!("expected a JSON object, found {}", kind(&other)),
                "download the file again",
            )),
        }
    }

    /// The file the values came from.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The value of `key`, unless it is absent or null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Whether `key` is present, even as null.
    pub fn mentions(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// The object under `key`; missing is an error.
    pub fn object(&self, key: &str) -> Result<Self> {
        match self.get(key) {
            Some(Value::Object(map)) => Ok(Self {
                file: self.file.clone(),
                prefix: format!("{}{key}.", self.prefix),
                map: map.clone(),
            }),
            Some(other) => Err(self.wrong(key, "an object", other)),
            None => Err(self.missing(key)),
        }
    }

    /// A whole number from 1 to [`MAX_SIZE`]; missing is an error.
    pub fn size(&self, key: &str) -> Result<usize> {
        let value = self.get(key).ok_or_else(|| self.missing(key))?;
        match value.as_u64().and_then(|number| usize::try_from(number).ok()) {
            Some(number) if (1..=MAX_SIZE).contains(&number) => Ok(number),
            _ => Err(self.wrong(key, &format!("a whole number from 1 to {MAX_SIZE}"), value)),
        }
    }

    /// As [`Config::size`], or `default` where the key is left out.
    pub fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        if self.get(key).is_some() { self.size(key) } else { Ok(default) }
    }

    /// A number of layers, or `default` where the key is left out.
    pub fn layers_or(&self, key: &str, default: usize) -> Result<usize> {
        match self.size_or(key, default)? {
            layers if layers <= MAX_LAYERS => Ok(layers),
            layers => Err(self.error(
                key,
                format!("expected at most {MAX_LAYERS} layers, found {layers}"),
                "correct the value in the file",
            )),
        }
    }

    /// A whole number, possibly negative, or `default` where the key is left out.
    pub fn integer_or(&self, key: &str, default: i64) -> Result<i64> {
        match self.get(key) {
            Some(value) => value.as_i64().ok_or_else(|| self.wrong(key, "a whole number", value)),
            None => Ok(default),
        }
    }

    /// A finite number, or `default` where the key is left out.
    pub fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        match self.get(key) {
            Some(value) => value
                .as_f64()
                .filter(|number| number.is_finite())
                .ok_or_else(|| self.wrong(key, "a number", value)),
            None => Ok(default),
        }
    }

    /// `true` or `false`, or `default` where the key is left out.
    pub fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            Some(value) => value.as_bool().ok_or_else(|| self.wrong(key, "true or false", value)),
            None => Ok(default),
        }
    }

    /// A string; missing is an error.
    pub fn text(&self, key: &str) -> Result<&str> {
        let value = self.get(key).ok_or_else(|| self.missing(key))?;
        value.as_str().ok_or_else(|| self.wrong(key, "a string", value))
    }

    /// A string, or `default` where the key is left out.
    pub fn text_or<'a>(&'a self, key: &str, default: &'a str) -> Result<&'a str> {
        if self.get(key).is_some() { self.text(key) } else { Ok(default) }
    }

    /// An [`Error::Config`] about `key`.
    pub fn error(&self, key: &str, what: impl std::fmt::Display, hint: &str) -> Error {
        Error::config(&self.file, format!("`{}{key}`: {what}", self.prefix), hint)
    }

    fn missing(&self, key: &str) -> Error {
        Error::config(
            &self.file,
            format!("required key `{}{key}` is missing", self.prefix),
            "check that this is the model's own, complete configuration file",
        )
    }

    fn wrong(&self, key: &str, expected: &str, found: &Value) -> Error {
        self.error(key, format!("expected {expected}, found {found}"), "correct the value in the file")
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn errors_name_the_file_and_the_whole_key() -> Result<()> {
        let config = Config::new(Path::new("config.json"), json!({ "text_config": { "layers": 0 } }))?;
        let inner = config.object("text_config")?;
        let message = |result: Result<usize>| result.err().map(|error| error.to_string()).unwrap_or_default();
        assert_eq!(
            message(inner.size("hidden_size")),
            "config.json: required key `text_config.hidden_size` is missing"
        );
        assert!(
            message(inner.size("layers")).contains("`text_config.layers`: expected a whole number from 1")
        );
        assert_eq!(inner.size_or("heads", 7)?, 7);
        let huge = Config::new(Path::new("config.json"), json!({ "layers": 2000, "width": 1u64 << 40 }))?;
        assert!(message(huge.layers_or("layers", 1)).contains("at most 1024 layers"));
        assert!(message(huge.size("width")).contains("from 1 to"));
        assert!(Config::new(Path::new("config.json"), json!([1])).is_err());
        Ok(())
    }
}
