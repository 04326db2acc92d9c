//! Grounding of a given text.

use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::content::bounded;
use super::{Annotation, ImageUrl, MaskFormat, PhraseRule};

/// A text to be read as if the model had said it about a picture.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GroundRequest {
    /// The model that is served; may be left out.
    #[serde(default)]
    pub model: Option<String>,
    /// The picture.
    pub image: ImageUrl,
    /// The text.
    pub text: String,
    /// Which parts of the text to ground; the head's keyword selector chooses unless given.
    #[serde(default)]
    pub phrases: Option<Phrases>,
    /// Keyword probability above which a token is part of a phrase, 0 to 1; the published 0.3 unless given.
    #[serde(default)]
    pub threshold: Option<f32>,
    /// Form of the masks.
    #[serde(default)]
    pub mask: MaskFormat,
    /// Whether to give the mask before refinement too.
    #[serde(default)]
    pub coarse: bool,
}

/// A rule, or parts of the text.
#[derive(Debug, ToSchema)]
#[serde(untagged)]
pub enum Phrases {
    /// How to find them.
    Rule(PhraseRule),
    /// Exact parts of the text, in any order; one that is given twice means its first and second occurrence.
    Given(Vec<String>),
}

/// The text and its phrases.
#[derive(Debug, Serialize, ToSchema)]
pub struct GroundResponse {
    /// The model.
    pub model: String,
    /// Size of the picture.
    pub image: ImageSize,
    /// The text that `start` and `end` count characters of.
    pub text: String,
    /// The phrases, in order of the text; given ones in the order given.
    pub annotations: Vec<Annotation>,
    /// How long it took.
    pub timings_ms: TimingsMs,
}

/// Size of a picture in pixels.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
pub struct ImageSize {
    /// Pixels per row.
    pub width: u32,
    /// Number of rows.
    pub height: u32,
}

/// How long each stage took, in milliseconds.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
pub struct TimingsMs {
    /// Waiting for the model.
    pub queue: f64,
    /// Picture and text through the model.
    pub read: f64,
    /// Generating tokens.
    pub generate: f64,
    /// Waiting for SAM's image encoder; 0 when the picture was known.
    pub encode: f64,
    /// Attention maps, masks and refinement.
    pub segment: f64,
}

impl<'de> Deserialize<'de> for Phrases {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PhrasesVisitor;

        impl<'de> Visitor<'de> for PhrasesVisitor {
            type Value = Phrases;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("`keywords`, `noun_phrases`, or a list of parts of the text")
            }

            fn visit_str<E: serde::de::Error>(self, rule: &str) -> Result<Phrases, E> {
                PhraseRule::deserialize(StrDeserializer::new(rule)).map(Phrases::Rule)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, phrases: A) -> Result<Phrases, A::Error> {
                Ok(Phrases::Given(bounded(phrases)?))
            }
        }

        deserializer.deserialize_any(PhrasesVisitor)
    }
}
