//! Visual chain of thought: questions with the box of the region that helps to answer them (`evaluation.md` §5.1).

use crate::coco::{malformed, read_json};
use flmm::Result;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The sentence that asks for the box; it is removed from questions.
pub const BOX_REQUEST: &str = "Please provide the bounding box coordinate of the region that can help you answer the \
    question better.";

/// One element of a benchmark file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Entry {
    /// Which of the benchmark's datasets.
    #[serde(default)]
    pub dataset: String,
    /// Its split.
    #[serde(default)]
    pub split: String,
    /// Its number.
    #[serde(default)]
    pub question_id: serde_json::Value,
    /// The picture, and `path###[x0, y0, x1, y1]`.
    pub image: Vec<String>,
    /// Question, box as text, image marker, answer.
    pub conversations: Vec<Turn>,
}

/// One turn of the conversation.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Turn {
    /// `human` or `gpt`.
    pub from: String,
    /// What is said.
    pub value: String,
}

/// A question ready to be asked.
#[derive(Debug, Clone, PartialEq)]
pub struct VisCotQuestion {
    /// Path of the picture, as written.
    pub image: String,
    /// The question without markers and without the request for a box.
    pub question: String,
    /// The region that helps: x0, y0, x1, y1 in pixels.
    pub box_in_image: [f64; 4],
    /// The gold answer.
    pub answer: String,
}

/// Reads a benchmark file.
pub fn read(path: &Path) -> Result<Vec<VisCotQuestion>> {
    let entries: Vec<Entry> = read_json(path)?;
    let parse = |(index, entry): (usize, &Entry)| {
        entry.question().map_err(|what| {
            malformed(path, format!("entry {index}: {what}"), "expected the Visual-CoT benchmark's format")
        })
    };
    entries.iter().enumerate().map(parse).collect()
}

impl Entry {
    fn question(&self) -> std::result::Result<VisCotQuestion, String> {
        let [image, with_box, ..] = &self.image[..] else {
            return Err("`image` needs a path and a path with a box".into());
        };
        let text = with_box.rsplit("###").next().unwrap_or_default();
        let box_in_image: [f64; 4] = serde_json::from_str(text.trim())
            .map_err(|_| format!("{text:?} is not a box [x0, y0, x1, y1]"))?;
        let (Some(question), Some(answer)) = (self.conversations.first(), self.conversations.last()) else {
            return Err("`conversations` is empty".into());
        };
        let question = question.value.replace(BOX_REQUEST, "").replace("<image>", "");
        Ok(VisCotQuestion {
            image: image.clone(),
            question: question.trim().to_owned(),
            box_in_image,
            answer: answer.value.clone(),
        })
    }
}
