//! Chat templates that model folders bring along, for free-form conversation.

use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Rest, from_args};
use minijinja::{Environment, ErrorKind, State, Value, context};

use super::chat::{Role, Turn};
use crate::error::{Error, Result};
use crate::weights::files;

/// A template in the Jinja language, as `chat_template` of Hugging Face folders.
///
/// Grounding itself never uses it: the strings of `spec/models.md` §2 are what the heads were trained with.
#[derive(Debug)]
pub struct ChatTemplate {
    file: PathBuf,
    environment: Environment<'static>,
    /// Whether messages are lists of text and image parts instead of plain strings.
    parts: bool,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// The template of the folder `dir`: `chat_template.jinja`, else `chat_template.json`, else the entry in
    /// `tokenizer_config.json` (of several, the one called `default`). `None` if there is none.
    pub fn load(dir: impl AsRef<Path>) -> Result<Option<Self>> {
        let dir = dir.as_ref();
        let file = dir.join("chat_template.jinja");
        if files::is_file(&file) {
            let source = files::read_text(&file)?;
            return Self::new(file, source).map(Some);
        }
        for name in ["chat_template.json", "tokenizer_config.json"] {
            let file = dir.join(name);
            if !files::is_file(&file) {
                continue;
            }
            let text = files::read_text(&file)?;
            let json: serde_json::Value = serde_json::from_str(&text).map_err(|e| {
                Error::config(&file, format!("not a JSON file: {e}"), "download the file again")
            })?;
            let source = match json.get("chat_template") {
                Some(serde_json::Value::String(source)) => Some(source.clone()),
                Some(serde_json::Value::Array(list)) => list
                    .iter()
                    .find(|entry| entry["name"] == "default")
                    .and_then(|entry| entry["template"].as_str())
                    .map(str::to_owned),
                _ => None,
            };
            if let Some(source) = source {
                return Self::new(file, source).map(Some);
            }
        }
        Ok(None)
    }

    /// The template written in `source`; `file` is what errors call its origin.
    pub fn new(file: impl Into<PathBuf>, source: String) -> Result<Self> {
        let file = file.into();
        let mut environment = Environment::new();
        // As the library that the templates were written for sets it.
        match SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
            Ok(syntax) => environment.set_syntax(syntax),
            Err(e) => return Err(Error::config(&file, e.to_string(), "report this as a bug")),
        }
        environment.set_unknown_method_callback(python_method);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        let parts = source.contains("'type'") || source.contains("\"type\"") || source.contains(".type");
        environment.add_template_owned(NAME, source).map_err(|e| {
            Error::config(&file, format!("the chat template is damaged: {e:#}"), "download the file again")
        })?;
        Ok(Self { file, environment, parts })
    }

    /// The prompt of `turns` about one picture; `bos` and `eos` as the tokenizer writes them. With
    /// `open_answer` the model's turn is opened at the end.
    ///
    /// Templates whose messages are lists of parts get the picture as a part of the first question; for the
    /// others the caller writes the image token into the text.
    ///
    /// # Errors
    /// [`Error::Config`] if the template cannot be evaluated or refuses the conversation.
    pub fn render(&self, turns: &[Turn], bos: &str, eos: &str, open_answer: bool) -> Result<String> {
        let first = turns.iter().position(|turn| turn.role == Role::User);
        let messages: Vec<Value> = turns
            .iter()
            .enumerate()
            .map(|(i, turn)| {
                let mut parts = vec![context! { type => "text", text => turn.text.as_str() }];
                if Some(i) == first {
                    parts.insert(0, context! { type => "image" });
                }
                let content = if self.parts { Value::from(parts) } else { Value::from(turn.text.as_str()) };
                context! { role => turn.role.name(), content }
            })
            .collect();
        let values = context! {
            messages, bos_token => bos, eos_token => eos, add_generation_prompt => open_answer,
        };
        let rendered = self.environment.get_template(NAME).and_then(|template| template.render(values));
        rendered.map_err(|e| {
            let what = format!("the chat template cannot write this conversation: {e:#}");
            Error::config(&self.file, what, "check that questions and answers take turns")
        })
    }
}

/// The methods of Python strings and dictionaries that chat templates call.
fn python_method(
    _: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, minijinja::Error> {
    let unknown = || minijinja::Error::from(ErrorKind::UnknownMethod);
    if let Some(text) = value.as_str() {
        let characters = |args: &[Value]| -> Result<Vec<char>, minijinja::Error> {
            let (set,): (Option<String>,) = from_args(args)?;
            Ok(set.map_or_else(
                || [' ', '\t', '\n', '\r', '\u{b}', '\u{c}'].to_vec(),
                |set| set.chars().collect(),
            ))
        };
        return Ok(match method {
            "strip" => Value::from(text.trim_matches(&characters(args)?[..])),
            "lstrip" => Value::from(text.trim_start_matches(&characters(args)?[..])),
            "rstrip" => Value::from(text.trim_end_matches(&characters(args)?[..])),
            "startswith" => {
                let (prefix,): (String,) = from_args(args)?;
                Value::from(text.starts_with(&prefix))
            }
            "endswith" => {
                let (suffix,): (String,) = from_args(args)?;
                Value::from(text.ends_with(&suffix))
            }
            "replace" => {
                let (old, new): (String, String) = from_args(args)?;
                Value::from(text.replace(&old, &new))
            }
            "split" => {
                let (separator,): (Option<String>,) = from_args(args)?;
                let parts: Vec<&str> = match &separator {
                    Some(separator) if separator.is_empty() => return Err(unknown()),
                    Some(separator) => text.split(separator.as_str()).collect(),
                    None => text.split_whitespace().collect(),
                };
                Value::from(parts.into_iter().map(Value::from).collect::<Vec<_>>())
            }
            "upper" => Value::from(text.to_uppercase()),
            "lower" => Value::from(text.to_lowercase()),
            _ => return Err(unknown()),
        });
    }
    match method {
        "get" => {
            let (key, Rest(default)): (Value, Rest<Value>) = from_args(args)?;
            let found = value.get_item(&key)?;
            Ok(if found.is_undefined() { default.first().cloned().unwrap_or(Value::from(())) } else { found })
        }
        "items" => {
            let pairs = value.try_iter()?.map(|key| {
                let item = value.get_item(&key)?;
                Ok(Value::from(vec![key, item]))
            });
            Ok(Value::from(pairs.collect::<Result<Vec<_>, minijinja::Error>>()?))
        }
        _ => Err(unknown()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, turns: &[Turn]) -> Result<String> {
        ChatTemplate::new("t", source.to_owned())?.render(turns, "<s>", "</s>", true)
    }

    #[test]
    fn renders_published_styles() {
        let turns = [Turn::user(" A "), Turn::assistant("B"), Turn::user("C")];
        // Mistral's style: strings, strip, exceptions, BOS and EOS.
        let mistral = "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}\
            {{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}\
            {{ '[INST] ' + m['content'].strip() + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}";
        assert_eq!(render(mistral, &turns).unwrap(), "<s>[INST] A [/INST]B</s>[INST] C [/INST]");
        let error = render(mistral, &turns[1..]).unwrap_err();
        assert!(error.to_string().contains("roles must alternate"), "{error}");
        // LLaVA's newer style: lists of parts.
        let llava = "{% for m in messages %}{{ m.role.upper() + ': ' }}{% for c in m.content | selectattr('type', 'equalto', 'image') %}\
            {{ '<image>\n' }}{% endfor %}{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}\
            {% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}";
        assert_eq!(render(llava, &turns[2..]).unwrap(), "USER: <image>\nC ASSISTANT:");
    }

    #[test]
    fn python_methods_work() {
        let source = "{{ 'xaxx'.rstrip('x') }}|{{ 'a b'.split()|length }}|{{ 'ab'.startswith('a') }}|{{ 'ab'.endswith('a') }}\
            |{{ messages[0].get('nothing', 'd') }}|{{ 'a-b'.replace('-', '+') }}|{{ ' x'.lstrip() }}|{{ 'X'.lower() }}";
        assert_eq!(render(source, &[Turn::user("A")]).unwrap(), "xa|2|True|False|d|a+b|x|x");
    }

    #[test]
    fn damaged_templates_are_errors() {
        assert!(matches!(render("{% for", &[]), Err(Error::Config { .. })));
        assert!(matches!(render("{{ nothing.at.all }}", &[]), Err(Error::Config { .. })));
        assert!(matches!(render("{{ 'a'.format() }}", &[]), Err(Error::Config { .. })));
    }

    #[test]
    fn finds_the_template_of_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let found = || {
            let template = ChatTemplate::load(folder.path()).unwrap();
            template.map(|t| t.render(&[], "", "", false).unwrap())
        };
        assert_eq!(found(), None);
        write(
            "tokenizer_config.json",
            r#"{"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}"#,
        );
        assert_eq!(found().as_deref(), Some("d"));
        write("chat_template.json", r#"{"chat_template": "j"}"#);
        assert_eq!(found().as_deref(), Some("j"));
        write("chat_template.jinja", "f");
        assert_eq!(found().as_deref(), Some("f"));
    }
}
