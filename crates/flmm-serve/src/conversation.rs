//! Messages as the turns of a conversation.

use flmm::lmm::Turn;

use crate::api::{Content, Message, MessageRole, Part};
use crate::error::ApiError;
use crate::settings::Limits;

/// A conversation and the addresses of its pictures, in their order.
#[derive(Debug, Default)]
pub(crate) struct Conversation {
    pub(crate) turns: Vec<Turn>,
    pub(crate) urls: Vec<String>,
}

/// Turns of `messages`.
///
/// Pictures of the first question come before its text, as the models were trained, unless it has text between pictures
/// or several texts; pictures elsewhere stay where they are. `image_end` is what the model's format puts behind a picture.
///
/// # Errors
/// [`ApiError`] 400 for what exceeds a limit, for parts of another type, and for a conversation without picture.
pub(crate) fn read(
    messages: Vec<Message>,
    image_end: &str,
    limits: &Limits,
) -> Result<Conversation, ApiError> {
    if messages.len() > limits.messages {
        let message = format!("{} messages; at most {} are read", messages.len(), limits.messages);
        return Err(ApiError::bad_request("too_many_messages", message).param("messages"));
    }
    let mut conversation = Conversation::default();
    let mut text_bytes = 0;
    for message in messages {
        let parts = match message.content {
            None => Vec::new(),
            Some(Content::Text(text)) => vec![Piece::Text(text)],
            Some(Content::Parts(parts)) => parts.into_iter().map(piece).collect::<Result<_, _>>()?,
        };
        text_bytes +=
            parts.iter().map(|part| if let Piece::Text(text) = part { text.len() } else { 0 }).sum::<usize>();
        let turn = match message.role {
            MessageRole::System | MessageRole::Developer => Turn::system(plain(parts, "system")?),
            MessageRole::Assistant => Turn::assistant(plain(parts, "assistant")?),
            MessageRole::User => question(parts, &mut conversation, image_end),
        };
        conversation.turns.push(turn);
    }
    if text_bytes > limits.text_bytes {
        let message = format!("{text_bytes} bytes of text; at most {} are read", limits.text_bytes);
        return Err(ApiError::bad_request("text_too_long", message).param("messages"));
    }
    match conversation.urls.len() {
        0 => Err(ApiError::bad_request("no_image", "the conversation has no picture")
            .hint(r#"add a part {"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}}"#)
            .param("messages")),
        count if count > limits.pictures => {
            let message = format!("{count} pictures; at most {} are looked at", limits.pictures);
            Err(ApiError::bad_request("too_many_images", message).param("messages"))
        }
        _ => Ok(conversation),
    }
}

enum Piece {
    Text(String),
    Picture(String),
}

fn piece(part: Part) -> Result<Piece, ApiError> {
    let wrong = |message: String| {
        ApiError::bad_request("invalid_part", message)
            .hint("parts are of type `text`, with `text`, or of type `image_url`, with `image_url.url`")
            .param("messages")
    };
    match (part.r#type.as_str(), part.text, part.image_url) {
        ("text", Some(text), _) => Ok(Piece::Text(text)),
        ("image_url", _, Some(image)) => Ok(Piece::Picture(image.url)),
        (kind @ ("text" | "image_url"), ..) => {
            Err(wrong(format!("a part of type `{kind}` lacks its `{kind}`")))
        }
        (kind, ..) => {
            let kind: String = kind.chars().take(40).collect();
            Err(wrong(format!("a part has the type `{kind}`")))
        }
    }
}

/// The text of a message that shows nothing.
fn plain(parts: Vec<Piece>, role: &str) -> Result<String, ApiError> {
    let texts = parts.into_iter().map(|part| match part {
        Piece::Text(text) => Ok(text),
        Piece::Picture(_) => {
            let message = format!("a message of role `{role}` shows a picture");
            Err(ApiError::bad_request("misplaced_image", message)
                .hint("show pictures in messages of role `user`")
                .param("messages"))
        }
    });
    texts.collect()
}

fn question(parts: Vec<Piece>, conversation: &mut Conversation, image_end: &str) -> Turn {
    let first = conversation.turns.iter().all(|turn| turn.role != flmm::lmm::Role::User);
    let texts = parts.iter().filter(|part| matches!(part, Piece::Text(_))).count();
    let in_front = first && texts <= 1;
    let mut turn = Turn::user("");
    let mut said = !first;
    for part in parts {
        match part {
            Piece::Text(text) => {
                turn = turn.say(text);
                said = true;
            }
            Piece::Picture(url) => {
                let number = conversation.urls.len();
                conversation.urls.push(url);
                // A picture that no turn has a place for comes before the first question.
                if !in_front && said {
                    turn = turn.show(number).say(image_end);
                }
            }
        }
    }
    turn
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conversation(json: &str) -> Result<Conversation, ApiError> {
        read(serde_json::from_str(json).unwrap(), "\n", &Limits { pictures: 2, ..Limits::default() })
    }

    const IMAGE: &str = r#"{"type": "image_url", "image_url": {"url": "data:x"}}"#;

    #[test]
    fn a_picture_behind_the_only_text_comes_first() {
        for parts in [
            format!(r#"{{"type": "text", "text": "Q"}}, {IMAGE}"#),
            format!(r#"{IMAGE}, {{"type": "text", "text": "Q"}}"#),
        ] {
            let read = conversation(&format!(r#"[{{"role": "user", "content": [{parts}]}}]"#)).unwrap();
            assert_eq!((read.turns, read.urls.len()), (vec![Turn::user("Q")], 1));
        }
    }

    #[test]
    fn pictures_among_texts_stay_there() {
        let text = |text: &str| format!(r#"{{"type": "text", "text": "{text}"}}"#);
        let parts = [IMAGE.to_owned(), text("a"), IMAGE.to_owned(), text("b")].join(",");
        let read = conversation(&format!(r#"[{{"role": "user", "content": [{parts}]}}]"#)).unwrap();
        assert_eq!(read.turns, [Turn::user("a").show(1).say("\nb")]);
        let later = format!(
            r#"[{{"role": "developer", "content": "S"}}, {{"role": "user", "content": [{IMAGE}, {}]}},
                {{"role": "assistant", "content": "A"}}, {{"role": "user", "content": [{IMAGE}, {}]}}]"#,
            text("Q"),
            text("R")
        );
        let turns = conversation(&later).unwrap().turns;
        let last = Turn::user("").show(1).say("\nR");
        assert_eq!(turns, [Turn::system("S"), Turn::user("Q"), Turn::assistant("A"), last]);
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let code = |content: &str| {
            conversation(&format!(r#"[{{"role": "user", "content": {content}}}]"#)).unwrap_err().code
        };
        assert_eq!(code(r#""Q""#), "no_image");
        assert_eq!(code(&format!("[{IMAGE}, {IMAGE}, {IMAGE}]")), "too_many_images");
        assert_eq!(code(r#"[{"type": "input_audio"}]"#), "invalid_part");
        assert_eq!(code(r#"[{"type": "image_url"}]"#), "invalid_part");
        let shown = conversation(&format!(r#"[{{"role": "assistant", "content": [{IMAGE}]}}]"#));
        assert_eq!(shown.unwrap_err().code, "misplaced_image");
    }
}
