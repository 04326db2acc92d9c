//! What judges are asked: prompt files, as data.
//!
//! ```text
//! temperature: 0.2
//! max_tokens: 100
//!
//! [system]
//! … (may be left out)
//! [user]
//! … {question} … {reference} … {answer} …
//! ```

use std::path::Path;

use flmm::{Error, Result};

/// What a judge can be asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Grade an answer of the visual chain of thought: `score: 0.7`.
    VisCot,
    /// Grade an answer of MM-Vet: a number from 0.0 to 1.0.
    MmVet,
    /// Grade reference and answer of LLaVA-Bench: two numbers from 1 to 10.
    LlavaBench,
    /// Tell which option of MMBench an answer means: a letter.
    MmBench,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::VisCot, Self::MmVet, Self::LlavaBench, Self::MmBench];

    /// Name of its prompt file, without `.txt`.
    pub fn name(self) -> &'static str {
        match self {
            Self::VisCot => "viscot",
            Self::MmVet => "mmvet",
            Self::LlavaBench => "llavabench",
            Self::MmBench => "mmbench",
        }
    }

    fn default_text(self) -> &'static str {
        match self {
            Self::VisCot => include_str!("prompts/viscot.txt"),
            Self::MmVet => include_str!("prompts/mmvet.txt"),
            Self::LlavaBench => include_str!("prompts/llavabench.txt"),
            Self::MmBench => include_str!("prompts/mmbench.txt"),
        }
    }

    /// Places that a prompt must have.
    fn places(self) -> &'static [&'static str] {
        match self {
            Self::VisCot | Self::MmVet => &["question", "reference", "answer"],
            Self::LlavaBench => &["context", "question", "reference", "answer"],
            Self::MmBench => &["question", "options", "answer"],
        }
    }
}

/// A prompt with places to be filled.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    temperature: f64,
    max_tokens: u64,
    system: String,
    user: String,
}

/// What is sent to a judge.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    /// Sampling temperature.
    pub temperature: f64,
    /// Most tokens of the reply.
    pub max_tokens: u64,
    /// System message; none if empty.
    pub system: String,
    /// User message.
    pub user: String,
}

const HINT: &str = "docs/evaluation-qa.md shows the format of prompt files";

impl Prompt {
    /// The prompt for `role`: `<folder>/<role>.txt` if that is there, else the one that comes with flmm.
    pub fn load(role: Role, folder: Option<&Path>) -> Result<Self> {
        let Some(folder) = folder else {
            return Self::parse(role, Path::new(role.name()), role.default_text());
        };
        let path = folder.join(format!("{}.txt", role.name()));
        match std::fs::read_to_string(&path) {
            Ok(text) => Self::parse(role, &path, &text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Self::load(role, None),
            Err(error) => Err(Error::io(&path, error)),
        }
    }

    /// Parses a prompt file; `file` is what errors call it.
    pub fn parse(role: Role, file: &Path, text: &str) -> Result<Self> {
        let wrong = |what: String| Error::config(file, what, HINT);
        let mut prompt =
            Self { temperature: 0.0, max_tokens: 100, system: String::new(), user: String::new() };
        let mut section: Option<&mut String> = None;
        for (number, line) in text.lines().enumerate() {
            match (line.trim(), &mut section) {
                ("[system]", _) => section = Some(&mut prompt.system),
                ("[user]", _) => section = Some(&mut prompt.user),
                (_, Some(section)) => {
                    section.push_str(line);
                    section.push('\n');
                }
                ("", None) => {}
                (setting, None) => {
                    let value = setting.split_once(':').map(|(name, value)| (name.trim(), value.trim()));
                    let known = match value {
                        Some(("temperature", value)) => {
                            value.parse().map(|t: f64| prompt.temperature = t).is_ok()
                        }
                        Some(("max_tokens", value)) => {
                            value.parse().map(|n: u64| prompt.max_tokens = n).is_ok()
                        }
                        _ => false,
                    };
                    if !known || !prompt.temperature.is_finite() {
                        return Err(wrong(format!("line {}: {setting:?} is no setting", number + 1)));
                    }
                }
            }
        }
        for text in [&mut prompt.system, &mut prompt.user] {
            *text = text.trim().to_owned();
        }
        let whole = format!("{}{}", prompt.system, prompt.user);
        match role.places().iter().find(|place| !whole.contains(&format!("{{{place}}}"))) {
            Some(place) => Err(wrong(format!("the prompt has no place `{{{place}}}`"))),
            None => Ok(prompt),
        }
    }

    /// The prompt with `values` (name, text) in its places. Braces inside texts are not places.
    pub fn fill(&self, values: &[(&str, &str)]) -> Question {
        Question {
            temperature: self.temperature,
            max_tokens: self.max_tokens,
            system: fill(&self.system, values),
            user: fill(&self.user, values),
        }
    }
}

fn fill(template: &str, values: &[(&str, &str)]) -> String {
    let (mut out, mut rest) = (String::new(), template);
    while let Some(open) = rest.find('{') {
        let (before, from) = rest.split_at(open);
        out += before;
        let value = values.iter().find_map(|(name, value)| {
            let after = from.strip_prefix('{')?.strip_prefix(name)?.strip_prefix('}')?;
            Some((value, after))
        });
        match value {
            Some((value, after)) => {
                out += value;
                rest = after;
            }
            None => {
                out.push('{');
                rest = &from[1..];
            }
        }
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_that_come_along_have_all_places() {
        for role in Role::ALL {
            Prompt::load(role, None).unwrap();
        }
    }

    #[test]
    fn places_are_filled_once() {
        let text = "temperature: 0.5\n[system]\n{x} {{question}\n[user]\n{question}{reference} {answer}\n";
        let prompt = Prompt::parse(Role::VisCot, Path::new("p"), text).unwrap();
        let question = prompt.fill(&[("question", "{answer}"), ("reference", "r"), ("answer", "a")]);
        assert_eq!((question.system.as_str(), question.user.as_str()), ("{x} {{answer}", "{answer}r a"));
        assert_eq!((question.temperature, question.max_tokens), (0.5, 100));
    }

    #[test]
    fn wrong_prompts_say_what_is_missing() {
        let parse =
            |text: &str| Prompt::parse(Role::VisCot, Path::new("p.txt"), text).unwrap_err().to_string();
        assert_eq!(parse("[user]\n{question} {answer}"), "p.txt: the prompt has no place `{reference}`");
        assert_eq!(parse("temprature: 1"), "p.txt: line 1: \"temprature: 1\" is no setting");
        assert!(parse("temperature: nan").contains("is no setting"));
    }
}
