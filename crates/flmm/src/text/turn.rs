//! What is said in a conversation, and where in it pictures are shown.

use crate::error::{Error, Result};

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions before the conversation.
    System,
    /// The one who asks.
    User,
    /// The model.
    Assistant,
    /// What the model is made to begin its answer with, directly behind the prompt; only as the last turn.
    #[serde(skip)]
    Opening,
}

impl Role {
    /// The name that chat templates use.
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant | Self::Opening => "assistant",
        }
    }
}

/// A picture shown at a place of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Shown {
    /// Number of the picture among those of the conversation, counted from 0.
    pub image: usize,
    /// The byte of the text that the picture comes before; the text's length: behind it.
    pub at: usize,
}

/// One contribution to a conversation.
///
/// A conversation shows every one of its pictures once. Those that no turn has a place for come before the text of
/// the first question, so a question about one picture is just [`Turn::user`]. For pictures among the words:
///
/// ```
/// use flmm::lmm::Turn;
///
/// let turn = Turn::user("").show(0).say("the whole image, ").show(1).say("the part that helps: Where is it?");
/// assert_eq!(turn.images[1].at, "the whole image, ".len());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Turn {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub text: String,
    /// The pictures shown at places of the text, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub images: Vec<Shown>,
}

impl Turn {
    fn new(role: Role, text: impl Into<String>) -> Self {
        Self { role, text: text.into(), images: Vec::new() }
    }

    /// The user says `text`.
    pub fn user(text: impl Into<String>) -> Self {
        Self::new(Role::User, text)
    }

    /// The model says `text`.
    pub fn assistant(text: impl Into<String>) -> Self {
        Self::new(Role::Assistant, text)
    }

    /// The model is made to begin its answer with `text`: nothing is put between the prompt and it, and the text
    /// of the answer does not contain it.
    pub fn opening(text: impl Into<String>) -> Self {
        Self::new(Role::Opening, text)
    }

    /// Instructions before the conversation. A blank `text` means none, also where a model would get some otherwise
    /// (DeepSeek-VL).
    pub fn system(text: impl Into<String>) -> Self {
        Self::new(Role::System, text)
    }

    /// Shows picture number `image` (counted from 0) behind what is said so far.
    pub fn show(mut self, image: usize) -> Self {
        self.images.push(Shown { image, at: self.text.len() });
        self
    }

    /// Says `text` behind what is said so far.
    pub fn say(mut self, text: impl AsRef<str>) -> Self {
        self.text.push_str(text.as_ref());
        self
    }

    /// Without the white space around text and pictures together.
    pub(crate) fn trimmed(&self) -> Self {
        let end = self.text.trim_end().len().max(self.images.last().map_or(0, |shown| shown.at));
        let blank = self.text.len() - self.text.trim_start().len();
        let start = blank.min(self.images.first().map_or(end, |shown| shown.at)).min(end);
        let text = self.text.get(start..end).unwrap_or_default().to_owned();
        let images = self.images.iter().map(|shown| Shown { at: shown.at.saturating_sub(start), ..*shown });
        Self { role: self.role, text, images: images.collect() }
    }

    /// The text with `token` in every place of a picture.
    pub(super) fn with_images(&self, token: &str) -> String {
        let (mut out, mut from) = (String::new(), 0);
        for shown in &self.images {
            out += self.text.get(from..shown.at).unwrap_or_default();
            out += token;
            from = shown.at;
        }
        out += self.text.get(from..).unwrap_or_default();
        out
    }
}

/// Numbers of the `images` pictures of a conversation in the order in which its prompt shows them: first those that
/// no turn has a place for.
///
/// # Errors
/// [`Error::Request`] if a turn shows a picture that there is not or that was shown before, at a place that its text
/// does not have, out of order, or in something that the user did not say.
pub fn order_shown(turns: &[Turn], images: usize) -> Result<Vec<usize>> {
    let mut placed = Vec::new();
    for turn in turns {
        let mut last = 0;
        for shown in &turn.images {
            let what = if turn.role != Role::User {
                format!("the {} text shows picture {}", turn.role.name(), shown.image)
            } else if shown.image >= images {
                format!("a question shows picture {} of {images}, counted from 0", shown.image)
            } else if placed.contains(&shown.image) {
                format!("picture {} is shown twice", shown.image)
            } else if shown.at < last || !turn.text.is_char_boundary(shown.at) {
                format!("byte {} of a question is no place for picture {}", shown.at, shown.image)
            } else {
                last = shown.at;
                placed.push(shown.image);
                continue;
            };
            return Err(Error::request(
                what,
                "show every picture of the conversation once, in a question, in order of the places",
            ));
        }
    }
    let mut order: Vec<usize> = (0..images).filter(|image| !placed.contains(image)).collect();
    order.extend(placed);
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_without_a_place_come_first() {
        let turns = [Turn::user("").show(2).say("and ").show(1).say("?"), Turn::assistant("A")];
        assert_eq!(order_shown(&turns, 4).unwrap(), [0, 3, 2, 1]);
        assert_eq!(order_shown(&[], 2).unwrap(), [0, 1]);
        assert_eq!(turns[0].with_images("<i>"), "<i>and <i>?");
    }

    #[test]
    fn refuses_pictures_that_cannot_be_shown() {
        let at = |image, at| Turn { images: vec![Shown { image, at }], ..Turn::user("é?") };
        let mut backwards = at(0, 3);
        backwards.images.push(Shown { image: 1, at: 0 });
        let mut answer = at(0, 0);
        answer.role = Role::Assistant;
        for (turn, part) in [
            (at(2, 0), "picture 2 of 2"),
            (at(0, 1), "byte 1"),
            (at(0, 9), "byte 9"),
            (backwards, "byte 0"),
            (answer, "the assistant text"),
            (Turn::user("").show(1).show(1), "picture 1 is shown twice"),
        ] {
            let error = order_shown(std::slice::from_ref(&turn), 2).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn trimming_keeps_what_lies_between_pictures() {
        let turn = |before: &str, between: &str, behind: &str| {
            Turn::user(before).show(0).say(between).show(1).say(behind)
        };
        assert_eq!(turn(" \n", " a ", " b\n").trimmed(), turn("", " a ", " b"));
        assert_eq!(turn(" c ", "", " \n").trimmed(), turn("c ", "", ""));
        assert_eq!(Turn::user(" \n").trimmed(), Turn::user(""));
        assert_eq!(Turn::user(" ").show(0).say("\n ").trimmed(), Turn::user("").show(0));
    }

    #[test]
    fn a_turn_about_one_picture_is_written_as_before() {
        let json = serde_json::to_string(&Turn::user("Q")).unwrap();
        assert_eq!(json, r#"{"role":"user","text":"Q"}"#);
        assert_eq!(serde_json::from_str::<Turn>(&json).unwrap(), Turn::user("Q"));
        let shown = Turn::user("a").show(0);
        assert_eq!(serde_json::from_str::<Turn>(&serde_json::to_string(&shown).unwrap()).unwrap(), shown);
    }
}
