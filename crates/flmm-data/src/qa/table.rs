//! Rows of a file with named cells, whatever the format.

use std::path::Path;

use flmm::{Error, Result};
use serde_json::{Map, Value};

use super::Picture;
use crate::coco::malformed;

/// One row. Cells of pictures are not among its cells.
pub(super) struct Row<'a> {
    pub(super) file: &'a Path,
    /// Its number, from 1.
    pub(super) number: u64,
    pub(super) cells: Map<String, Value>,
    /// The picture inside the row, if the file has some.
    pub(super) picture: Picture,
}

impl Row<'_> {
    /// An error about this row.
    pub(super) fn error(&self, what: impl std::fmt::Display, hint: &str) -> Error {
        malformed(self.file, format!("row {}: {what}", self.number), hint)
    }

    /// The cell of this name, unless it is absent, null, blank or "nan".
    fn cell(&self, name: &str) -> Option<&Value> {
        self.cells.get(name).filter(|value| match value {
            Value::Null => false,
            Value::String(text) => !text.trim().is_empty() && text != "nan",
            _ => true,
        })
    }

    fn missing(&self, name: &str) -> Error {
        let known: Vec<&str> = self.cells.keys().map(String::as_str).collect();
        let what = format!("no `{name}`; there are {}", known.join(", "));
        self.error(what, "compare with the published file")
    }

    /// A cell as text; a number counts as its digits.
    pub(super) fn text(&self, name: &str) -> Result<String> {
        self.optional_text(name)?.ok_or_else(|| self.missing(name))
    }

    /// As [`Row::text`]; `None` where there is nothing.
    pub(super) fn optional_text(&self, name: &str) -> Result<Option<String>> {
        match self.cell(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(Value::Number(number)) => Ok(Some(number.to_string())),
            Some(other) => {
                Err(self
                    .error(format!("`{name}` is {other}, expected text"), "compare with the published file"))
            }
        }
    }

    /// A cell as a whole number, which text may spell.
    pub(super) fn number(&self, name: &str) -> Result<u64> {
        let text = self.text(name)?;
        // Tables that went through floating point write 12 as 12.0.
        text.trim().trim_end_matches(".0").parse().map_err(|_| {
            self.error(
                format!("`{name}` is {text:?}, expected a whole number"),
                "compare with the published file",
            )
        })
    }

    /// A cell as a list of texts: of text, of objects with the text under `key`, or one text with commas between.
    pub(super) fn texts(&self, name: &str, key: &str) -> Result<Vec<String>> {
        let wrong =
            || self.error(format!("`{name}` is not a list of texts"), "compare with the published file");
        match self.cell(name).ok_or_else(|| self.missing(name))? {
            Value::Array(items) => {
                let text =
                    |item: &Value| item.as_str().or_else(|| item.get(key)?.as_str()).map(str::to_owned);
                items.iter().map(|item| text(item).ok_or_else(wrong)).collect()
            }
            Value::String(text) => Ok(text.split(',').map(|part| part.trim().to_owned()).collect()),
            _ => Err(wrong()),
        }
    }

    /// A cell as text; of a list of texts, one per line.
    pub(super) fn texts_or_text(&self, name: &str) -> Result<String> {
        match self.cell(name) {
            Some(Value::Array(_)) => Ok(self.texts(name, "")?.join("\n")),
            _ => self.text(name),
        }
    }

    /// The picture inside the row. An error if there is none.
    pub(super) fn picture(&self) -> Result<Picture> {
        match &self.picture {
            Picture::Missing => {
                Err(self.error("no picture", "this reader needs a file with a column `image`"))
            }
            picture => Ok(picture.clone()),
        }
    }

    /// The options in the columns A, B, …, as far as they are filled.
    pub(super) fn lettered_options(&self) -> Result<Vec<(char, String)>> {
        let mut options = Vec::new();
        for letter in 'A'..='H' {
            let Some(text) = self.optional_text(&letter.to_string())? else { break };
            options.push((letter, text));
        }
        match options.is_empty() {
            false => Ok(options),
            true => Err(self.missing("A")),
        }
    }
}
