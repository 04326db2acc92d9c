//! What a client may say about grounding, and what it gets.

use std::fmt;

use flmm::masks::Segmentation;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// `true`, `false`, or how to ground. The text of an answer is the same either way.
#[derive(Debug, Clone, PartialEq, ToSchema)]
#[serde(untagged)]
pub enum Grounding {
    /// Whether to ground.
    Switch(bool),
    /// Ground like this.
    Options(GroundingOptions),
}

/// How to ground an answer.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct GroundingOptions {
    /// How phrases are found.
    pub phrases: PhraseRule,
    /// Keyword probability above which a token is part of a phrase, 0 to 1; the published 0.3 unless given.
    pub threshold: Option<f32>,
    /// Number of the picture to ground in, counted from 0 in order of the messages.
    pub image: usize,
    /// Form of the masks.
    pub mask: MaskFormat,
    /// Whether to give the mask before refinement too.
    pub coarse: bool,
}

/// How phrases are found in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PhraseRule {
    /// The head's keyword selector; noun phrases where it has none.
    #[default]
    Keywords,
    /// Rules for English.
    NounPhrases,
}

/// Form of a mask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MaskFormat {
    /// COCO's compressed run lengths.
    #[default]
    Rle,
    /// Outlines in pixels, holes filled.
    Polygons,
    /// A grey PNG (0 and 255) as a data URL.
    Png,
    /// No mask, only its box.
    None,
}

/// A mask in one of its forms.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum MaskData {
    /// `{"size": [height, width], "counts": "…"}`.
    #[schema(value_type = Object)]
    Rle(Segmentation),
    /// `[[x0, y0, x1, y1, …], …]`.
    Polygons(Vec<Vec<f64>>),
    /// `data:image/png;base64,…`.
    Png(String),
}

/// A phrase of an answer and the part of the picture it speaks of.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Annotation {
    /// Always `grounding`.
    pub r#type: &'static str,
    /// Number of the annotation, counted from 0.
    pub index: usize,
    /// The phrase.
    pub phrase: String,
    /// First character of the phrase in the text, counted in Unicode scalar values.
    pub start: usize,
    /// Behind its last character.
    pub end: usize,
    /// First token of the phrase and the one behind its last, counted from the first of the text.
    pub tokens: [usize; 2],
    /// Mean probability of the phrase's tokens to be groundable, 0 to 1; 1 where the head has no keyword selector.
    pub score: f64,
    /// Number of the picture.
    pub image: usize,
    /// Smallest box around the mask, `[x, y, width, height]` in pixels; all 0 for an empty mask.
    pub bbox: [usize; 4],
    /// Pixels of the mask.
    pub area: usize,
    /// The mask; absent if none was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub segmentation: Option<MaskData>,
    /// The mask before refinement, if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub coarse: Option<MaskData>,
}

impl Grounding {
    /// The options, or `None` if the text alone is wanted.
    pub(crate) fn options(self) -> Option<GroundingOptions> {
        match self {
            Self::Switch(false) => None,
            Self::Switch(true) => Some(GroundingOptions::default()),
            Self::Options(options) => Some(options),
        }
    }
}

impl<'de> Deserialize<'de> for Grounding {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct GroundingVisitor;

        impl<'de> Visitor<'de> for GroundingVisitor {
            type Value = Grounding;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("true, false, or how to ground")
            }

            fn visit_bool<E>(self, on: bool) -> Result<Grounding, E> {
                Ok(Grounding::Switch(on))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Grounding, A::Error> {
                GroundingOptions::deserialize(MapAccessDeserializer::new(map)).map(Grounding::Options)
            }
        }

        deserializer.deserialize_any(GroundingVisitor)
    }
}
