//! Attention read-out.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Message;

/// A conversation of which the last message, an answer, is looked at.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AttentionRequest {
    /// The model that is served; may be left out.
    #[serde(default)]
    pub model: Option<String>,
    /// The conversation. The last message must be of role `assistant`: it is read as if the model had said it.
    pub messages: Vec<Message>,
    /// Number of the picture, counted from 0 in order of the messages.
    #[serde(default)]
    pub image: usize,
    /// Tokens of the answer, counted from 0; all unless given.
    #[serde(default)]
    pub tokens: Vec<usize>,
    /// Decoder layers, counted from 0; all unless given.
    #[serde(default)]
    pub layers: Vec<usize>,
    /// Query heads, counted from 0, the same in every layer; all unless given.
    #[serde(default)]
    pub heads: Vec<usize>,
    /// Whether layers and heads are averaged.
    #[serde(default)]
    pub merge: Merged,
    /// Form of the answer.
    #[serde(default)]
    pub format: AttentionFormat,
}

/// Whether layers and heads are averaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Merged {
    /// Every layer and head by itself.
    #[default]
    None,
    /// The mean of the chosen layers and heads.
    Mean,
}

/// Form of attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AttentionFormat {
    /// One tensor `attention [tokens, planes, layers, heads, rows, columns]`, f32; the file's metadata tell the rest.
    #[default]
    Safetensors,
    /// The picture under the mean of everything chosen.
    Png,
}
