//! The prompt formats of the ten models (`spec/models.md` §2), as data.

use crate::error::{Error, Result};

pub use super::turn::{Role, Shown, Turn, order_shown};

/// How a model family writes a conversation.
///
/// One question is `before + input + after`, the published instruction wrapper. What lies between turns is the
/// convention of the language model's authors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChatFormat {
    /// Name of the format.
    pub name: &'static str,
    /// Before and after system instructions; `None` if the format has no place for them.
    pub system: Option<(&'static str, &'static str)>,
    /// Before a user's text.
    pub before: &'static str,
    /// After a user's text: what the model continues.
    pub after: &'static str,
    /// Between `after` and an answer that is already known.
    pub answer: &'static str,
    /// After a known answer, before the next question.
    pub between: &'static str,
    /// The token that stands for the picture.
    pub image: &'static str,
    /// Behind each picture before the text of the first question.
    pub image_end: &'static str,
    /// A text that ends an answer besides the end-of-sequence token.
    pub stop_word: Option<&'static str>,
}

/// LLaVA-1.5, LLaVA-1.6 with Vicuna, Mini-Gemini 7B.
pub const VICUNA: ChatFormat = ChatFormat {
    name: "vicuna",
    system: Some(("", " ")),
    before: "USER: ",
    after: " ASSISTANT:",
    answer: " ",
    between: "</s>",
    image: "<image>",
    image_end: "\n",
    stop_word: None,
};

/// LLaVA-1.6 with Mistral.
pub const MISTRAL: ChatFormat = ChatFormat {
    name: "mistral",
    system: None,
    before: "[INST] ",
    after: " [/INST]",
    answer: " ",
    between: "</s>",
    image: "<image>",
    image_end: "\n",
    stop_word: None,
};

/// DeepSeek-VL. The picture is one token per feature and is followed by no newline.
pub const DEEPSEEK: ChatFormat = ChatFormat {
    name: "deepseek",
    system: Some(("", "\n\n")),
    before: "User: ",
    after: "\n\nAssistant:",
    answer: " ",
    between: "<｜end▁of▁sentence｜>",
    image: "<image_placeholder>",
    image_end: "",
    stop_word: Some("<｜end▁of▁sentence｜>"),
};

/// Mini-Gemini 2B.
pub const GEMMA: ChatFormat = ChatFormat {
    name: "gemma",
    system: None,
    before: "<start_of_turn>user\n",
    after: "<end_of_turn>\n<start_of_turn>model\n",
    answer: "",
    between: "<end_of_turn>\n",
    image: "<image>",
    image_end: "\n",
    stop_word: Some("<end_of_turn>"),
};

/// HPT-Air.
pub const CHATML: ChatFormat = ChatFormat {
    name: "chatml",
    system: Some(("<|im_start|>system\n", "<|im_end|>\n")),
    before: "<|im_start|>user\n",
    after: "<|im_end|>\n<|im_start|>assistant\n",
    answer: "",
    between: "<|im_end|>\n",
    image: "<image>",
    image_end: "\n",
    stop_word: Some("<|im_end|>"),
};

/// HPT-Air-1.5.
pub const LLAMA3: ChatFormat = ChatFormat {
    name: "llama3",
    system: Some(("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>")),
    before: "<|start_header_id|>user<|end_header_id|>\n\n",
    after: "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    answer: "",
    between: "<|eot_id|>",
    image: "<image>",
    image_end: "\n",
    stop_word: Some("<|eot_id|>"),
};

/// The format of each published model, in the order of `spec/models.md` §1.
pub const MODELS: [(&str, &ChatFormat); 10] = [
    ("DeepSeekVL-1.3B", &DEEPSEEK),
    ("MGM-2B", &GEMMA),
    ("LLaVA-1.5-7B", &VICUNA),
    ("HPT-Air-6B", &CHATML),
    ("HPT-Air-1.5-8B", &LLAMA3),
    ("MGM-7B", &VICUNA),
    ("DeepSeekVL-7B", &DEEPSEEK),
    ("LLaVA-1.6-7B", &VICUNA),
    ("LLaVA-1.6-Mistral-7B", &MISTRAL),
    ("MGM-HD-7B", &VICUNA),
];

const ORDER: &str = "begin with a question and let questions and answers take turns";

impl ChatFormat {
    /// The prompt of a conversation about `images` pictures, each written as one image token, in the order of
    /// [`order_shown`].
    ///
    /// Pictures that no turn has a place for come before the text of the first question, each followed by the
    /// format's `image_end`; where a turn places a picture itself, its text says what is around it. A last question is
    /// closed so that the model answers it; a last answer is left open so that the model continues it.
    ///
    /// # Errors
    /// [`Error::Request`] if the conversation is empty, does not begin with a question, if the speakers do not
    /// take turns, if a question is blank, if a text contains the image token, if a picture cannot be shown
    /// ([`order_shown`]), or if the format has no place for system instructions.
    pub fn render(&self, turns: &[Turn], images: usize) -> Result<String> {
        self.check(turns)?;
        let placed: usize = turns.iter().map(|turn| turn.images.len()).sum();
        let in_front = order_shown(turns, images)?.len() - placed;
        let mut prompt = String::new();
        let mut first = true;
        let mut turns = turns.iter().peekable();
        while let Some(turn) = turns.next() {
            match turn.role {
                Role::System if turn.text.trim().is_empty() => {}
                Role::System => {
                    let (before, after) = self.system.ok_or_else(|| {
                        let what =
                            format!("the prompt format `{}` has no place for system instructions", self.name);
                        Error::request(what, "put the instructions into the first question")
                    })?;
                    prompt += before;
                    prompt += &turn.text;
                    prompt += after;
                }
                Role::User => {
                    prompt += self.before;
                    if std::mem::take(&mut first) {
                        prompt += &[self.image, self.image_end].concat().repeat(in_front);
                    }
                    prompt += &turn.with_images(self.image);
                    prompt += self.after;
                }
                Role::Assistant => {
                    if !turn.text.is_empty() {
                        prompt += self.answer;
                    }
                    prompt += &turn.text;
                    if turns.peek().is_some() {
                        prompt += self.between;
                    }
                }
                Role::Opening => prompt += &turn.text,
            }
        }
        Ok(prompt)
    }

    fn check(&self, turns: &[Turn]) -> Result<()> {
        let talk = match turns.split_first() {
            Some((first, rest)) if first.role == Role::System => rest,
            _ => turns,
        };
        if talk.is_empty() {
            return Err(Error::request(
                "the conversation has no question",
                "ask a question about the picture",
            ));
        }
        for (i, turn) in talk.iter().enumerate() {
            let expected = if i % 2 == 0 { Role::User } else { Role::Assistant };
            let opens = turn.role == Role::Opening && expected == Role::Assistant && i + 1 == talk.len();
            if turn.role != expected && !opens {
                let what =
                    format!("turn {} of the conversation is {:?}, expected {expected:?}", i + 1, turn.role);
                return Err(Error::request(what, ORDER));
            }
            if turn.role == Role::User && turn.text.trim().is_empty() {
                return Err(Error::request("the question is empty", "ask a question about the picture"));
            }
        }
        if turns.iter().any(|turn| turn.text.contains(self.image)) {
            let what =
                format!("a text of the conversation contains `{}`, which stands for the picture", self.image);
            return Err(Error::request(what, "remove it; pictures are shown at their places without it"));
        }
        Ok(())
    }
}

/// Whether `text` without its CR and LF ends with `word`.
pub(crate) fn ends_with(text: &str, word: &str) -> bool {
    // Read from the end, so that no copy of a long text is made for every token.
    let mut characters = text.chars().rev().filter(|c| !matches!(c, '\r' | '\n'));
    word.chars().rev().all(|c| characters.next() == Some(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vicuna(turns: &[Turn]) -> Result<String> {
        VICUNA.render(turns, 1)
    }

    #[test]
    fn wrappers_are_the_published_strings() {
        let ask = |format: &ChatFormat| format.render(&[Turn::user("X")], 1).unwrap();
        assert_eq!(ask(&VICUNA), "USER: <image>\nX ASSISTANT:");
        assert_eq!(ask(&MISTRAL), "[INST] <image>\nX [/INST]");
        assert_eq!(ask(&DEEPSEEK), "User: <image_placeholder>X\n\nAssistant:");
        assert_eq!(ask(&GEMMA), "<start_of_turn>user\n<image>\nX<end_of_turn>\n<start_of_turn>model\n");
        assert_eq!(ask(&CHATML), "<|im_start|>user\n<image>\nX<|im_end|>\n<|im_start|>assistant\n");
        assert_eq!(
            ask(&LLAMA3),
            "<|start_header_id|>user<|end_header_id|>\n\n<image>\nX<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        );
    }

    #[test]
    fn several_pictures_are_shown_in_front_or_among_the_words() {
        assert_eq!(VICUNA.render(&[Turn::user("X")], 2).unwrap(), "USER: <image>\n<image>\nX ASSISTANT:");
        let three = "User: <image_placeholder><image_placeholder><image_placeholder>X\n\nAssistant:";
        assert_eq!(DEEPSEEK.render(&[Turn::user("X")], 3).unwrap(), three);
        let among = Turn::user("").show(0).say("the whole image, ").show(1).say("the image region");
        assert_eq!(
            DEEPSEEK.render(std::slice::from_ref(&among), 2).unwrap(),
            "User: <image_placeholder>the whole image, <image_placeholder>the image region\n\nAssistant:"
        );
        let turns = [Turn::user("X"), Turn::assistant("Y"), Turn::user("Z ").show(0)];
        assert_eq!(
            VICUNA.render(&turns, 2).unwrap(),
            "USER: <image>\nX ASSISTANT: Y</s>USER: Z <image> ASSISTANT:"
        );
        assert!(VICUNA.render(&[among], 1).is_err());
    }

    #[test]
    fn conversations_continue() {
        let turns = [Turn::user("A"), Turn::assistant("B"), Turn::user("C")];
        assert_eq!(vicuna(&turns).unwrap(), "USER: <image>\nA ASSISTANT: B</s>USER: C ASSISTANT:");
        assert_eq!(vicuna(&turns[..2]).unwrap(), "USER: <image>\nA ASSISTANT: B");
        assert_eq!(vicuna(&[Turn::user("A"), Turn::assistant("")]).unwrap(), "USER: <image>\nA ASSISTANT:");
        assert_eq!(
            vicuna(&[Turn::user("A"), Turn::opening("It is")]).unwrap(),
            "USER: <image>\nA ASSISTANT:It is"
        );
        let turns = [Turn::system("S"), Turn::user("A")];
        assert_eq!(vicuna(&turns).unwrap(), "S USER: <image>\nA ASSISTANT:");
        assert!(GEMMA.render(&turns, 1).is_err());
        let none = [Turn::system(" "), Turn::user("A")];
        assert_eq!(GEMMA.render(&none, 1).unwrap(), GEMMA.render(&none[1..], 1).unwrap());
    }

    #[test]
    fn refuses_what_is_not_a_conversation() {
        for turns in [
            vec![],
            vec![Turn::system("S")],
            vec![Turn::user("  ")],
            vec![Turn::assistant("A")],
            vec![Turn::user("A"), Turn::user("B")],
            vec![Turn::user("A"), Turn::system("S")],
            vec![Turn::opening("O")],
            vec![Turn::user("A"), Turn::opening("O"), Turn::user("B")],
            vec![Turn::user("what is <image>?")],
        ] {
            let error = vicuna(&turns).unwrap_err();
            assert!(matches!(error, Error::Request { .. }), "{turns:?}");
        }
    }

    #[test]
    fn stop_words_ignore_line_breaks() {
        let stops = |format: &ChatFormat, text| format.stop_word.is_some_and(|word| ends_with(text, word));
        assert!(stops(&CHATML, "done<|im_\nend|>\r\n"));
        assert!(!stops(&CHATML, "done<|im_end|> "));
        assert!(!stops(&CHATML, "|>"));
        assert!(stops(&DEEPSEEK, "<｜end▁of▁sentence｜>"));
        assert!(!stops(&VICUNA, "</s>"));
    }

    #[test]
    fn every_model_has_a_format() {
        assert!(MODELS.iter().all(|(_, format)| !format.before.is_empty() && format.after.len() > 3));
    }
}
