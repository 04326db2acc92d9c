//! Chat completions, as OpenAI's clients know them.

use std::fmt;

use serde::de::{Deserializer, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::content::bounded;
use super::{Annotation, Grounding, Message};

/// A conversation to be answered. Fields that are not listed are ignored.
#[derive(Debug, Deserialize, ToSchema)]
pub struct ChatRequest {
    /// The model that is served, as `/v1/models` names it; may be left out.
    #[serde(default)]
    pub model: Option<String>,
    /// The conversation, with at least one picture.
    pub messages: Vec<Message>,
    /// Most tokens to generate.
    #[serde(default)]
    pub max_tokens: Option<usize>,
    /// As `max_tokens`, which it overrides.
    #[serde(default)]
    pub max_completion_tokens: Option<usize>,
    /// 0 (the default) takes the likeliest token; up to 2, higher values choose more freely.
    #[serde(default)]
    pub temperature: Option<f64>,
    /// With a temperature: share of the probability that tokens are chosen from.
    #[serde(default)]
    pub top_p: Option<f64>,
    /// With a temperature: the same seed gives the same answer.
    #[serde(default)]
    pub seed: Option<u64>,
    /// Texts that end the answer and are no part of it.
    #[serde(default)]
    pub stop: Option<StopWords>,
    /// Whether the answer is sent as it grows, as server-sent events.
    #[serde(default)]
    pub stream: Option<bool>,
    /// More about the stream.
    #[serde(default)]
    pub stream_options: Option<StreamOptions>,
    /// How many answers; only 1.
    #[serde(default)]
    pub n: Option<usize>,
    /// Whether and how the answer is grounded; on by default.
    #[serde(default)]
    pub grounding: Option<Grounding>,
    /// Not supported: refused unless empty.
    #[serde(default)]
    #[schema(value_type = Option<Vec<Object>>)]
    pub tools: Option<Vec<IgnoredAny>>,
    /// Not supported: refused if true.
    #[serde(default)]
    pub logprobs: Option<bool>,
}

/// One text or several.
#[derive(Debug, ToSchema)]
#[serde(untagged)]
pub enum StopWords {
    /// One.
    One(String),
    /// Several.
    Several(Vec<String>),
}

/// What a stream contains.
#[derive(Debug, Deserialize, ToSchema)]
pub struct StreamOptions {
    /// Whether a last chunk tells the usage.
    #[serde(default)]
    pub include_usage: Option<bool>,
}

/// An answer.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatCompletion {
    /// `chatcmpl-` and the request's id.
    pub id: String,
    /// Always `chat.completion`.
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// The model that answered.
    pub model: String,
    /// Exactly one.
    pub choices: Vec<Choice>,
    /// How many tokens were read and generated.
    pub usage: Usage,
}

/// The answer in its envelope.
#[derive(Debug, Serialize, ToSchema)]
pub struct Choice {
    /// Always 0.
    pub index: usize,
    /// The answer.
    pub message: ResponseMessage,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Always null.
    pub logprobs: Option<bool>,
}

/// What the model says.
#[derive(Debug, Serialize, ToSchema)]
pub struct ResponseMessage {
    /// Always `assistant`.
    pub role: &'static str,
    /// The text.
    pub content: String,
    /// Always null.
    pub refusal: Option<String>,
    /// The phrases that speak of something in a picture; empty if not asked for.
    pub annotations: Vec<Annotation>,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// The model or a stop word ended it.
    Stop,
    /// It has the most tokens, or the context is full.
    Length,
}

/// Token counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Usage {
    /// Tokens of the prompt, image tokens included.
    pub prompt_tokens: usize,
    /// Tokens of the answer.
    pub completion_tokens: usize,
    /// Both.
    pub total_tokens: usize,
    /// More about the prompt.
    pub prompt_tokens_details: PromptTokensDetails,
}

/// More about the prompt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct PromptTokensDetails {
    /// Tokens that were known from an earlier request about the same pictures.
    pub cached_tokens: usize,
}

/// A piece of a streamed answer.
#[derive(Debug, Serialize, ToSchema)]
pub struct Chunk {
    /// `chatcmpl-` and the request's id.
    pub id: String,
    /// Always `chat.completion.chunk`.
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// The model that answers.
    pub model: String,
    /// One, or none in the last chunk, which tells the usage.
    pub choices: Vec<ChunkChoice>,
    /// Token counts, in the last chunk, if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

/// A piece in its envelope.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChunkChoice {
    /// Always 0.
    pub index: usize,
    /// What is new.
    pub delta: Delta,
    /// Why the answer ended, once it has.
    pub finish_reason: Option<FinishReason>,
}

/// What is new in a piece.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct Delta {
    /// `assistant`, in the first chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// Text to append.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// A phrase that has become complete, in events named `grounding`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub annotations: Vec<Annotation>,
}

impl<'de> Deserialize<'de> for StopWords {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StopVisitor;

        impl<'de> Visitor<'de> for StopVisitor {
            type Value = StopWords;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a text or a list of texts")
            }

            fn visit_str<E>(self, word: &str) -> Result<StopWords, E> {
                Ok(StopWords::One(word.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, words: A) -> Result<StopWords, A::Error> {
                Ok(StopWords::Several(bounded(words)?))
            }
        }

        deserializer.deserialize_any(StopVisitor)
    }
}
