//! Messages and their parts.

use std::fmt;

use serde::de::{Deserializer, Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// One message of a conversation.
#[derive(Debug, Deserialize, ToSchema)]
pub struct Message {
    /// Who speaks.
    pub role: MessageRole,
    /// What is said and shown.
    #[serde(default)]
    pub content: Option<Content>,
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum MessageRole {
    /// Instructions before the conversation, where the model has a place for them.
    System,
    /// As `system`.
    Developer,
    /// The one who asks.
    User,
    /// The model. A last message of this role is continued.
    Assistant,
}

/// Text, or a list of texts and pictures.
#[derive(Debug, ToSchema)]
#[schema(rename_all = "lowercase")]
#[serde(untagged)]
pub enum Content {
    /// Only text.
    Text(String),
    /// Texts and pictures in their order.
    Parts(Vec<Part>),
}

/// A text or a picture of a message.
#[derive(Debug, Deserialize, ToSchema)]
pub struct Part {
    /// `text` or `image_url`.
    pub r#type: String,
    /// The text of a part of type `text`.
    #[serde(default)]
    pub text: Option<String>,
    /// The picture of a part of type `image_url`.
    #[serde(default)]
    pub image_url: Option<ImageUrl>,
}

/// Where a picture is.
#[derive(Debug, Deserialize, ToSchema)]
pub struct ImageUrl {
    /// `data:image/…;base64,…`, or an http or https address where the server allows it.
    #[schema(example = "data:image/png;base64,iVBORw0KGgo=")]
    pub url: String,
}

// By hand, as wherever one of two kinds may come: serde's untagged enums keep a copy of what they read, which is many times
// larger than the JSON, and hide what was wrong.
impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ContentVisitor;

        impl<'de> Visitor<'de> for ContentVisitor {
            type Value = Content;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a text or a list of parts")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Content, E> {
                Ok(Content::Text(text.to_owned()))
            }

            fn visit_string<E: serde::de::Error>(self, text: String) -> Result<Content, E> {
                Ok(Content::Text(text))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, parts: A) -> Result<Content, A::Error> {
                Ok(Content::Parts(bounded(parts)?))
            }
        }

        deserializer.deserialize_any(ContentVisitor)
    }
}

/// Most elements of a list whose kind is not known beforehand.
const MOST: usize = 4096;

/// The elements of a list that is not too long.
pub(super) fn bounded<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(mut list: A) -> Result<Vec<T>, A::Error> {
    let mut elements = Vec::new();
    while let Some(element) = list.next_element()? {
        if elements.len() == MOST {
            return Err(A::Error::custom(format!("a list has more than {MOST} elements")));
        }
        elements.push(element);
    }
    Ok(elements)
}
