//! What is served.

use serde::Serialize;
use utoipa::ToSchema;

/// A list with the one model that is served.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelList {
    /// Always `list`.
    pub object: &'static str,
    /// The model.
    pub data: Vec<ModelDetail>,
}

/// The model that is served.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelDetail {
    /// Its name.
    pub id: String,
    /// Always `model`.
    pub object: &'static str,
    /// Always 0.
    pub created: u64,
    /// Always `flmm`.
    pub owned_by: &'static str,
    /// Its family and size, as `flmm inspect lmms` lists it.
    pub family: &'static str,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads per layer.
    pub heads: usize,
    /// Tokens that prompt and answer may have together.
    pub context: usize,
    /// Most tokens that a picture becomes.
    pub image_tokens: usize,
    /// Whether a conversation may be about more than one picture.
    pub several_images: bool,
    /// Whether phrases are chosen by a trained keyword selector; noun phrases otherwise.
    pub keyword_selector: bool,
}

/// Whether the server is as asked.
#[derive(Debug, Serialize, ToSchema)]
pub struct Status {
    /// `ok`, or `ready`.
    pub status: &'static str,
}
