//! What goes in and what comes out.

use std::ops::Range;
use std::time::Duration;

use candle_core::{Device, Tensor};

use crate::error::Result;
use crate::geometry::Geometry;
use crate::masks::Mask;
use crate::phrases::{LAMBDA, PhraseChoice};
use crate::sam::SamGeometry;

/// What the frozen models have seen: everything that masks are made from.
#[derive(Debug, Clone)]
pub struct Observation {
    /// Merged attention of every phrase `[N, C, gh, gw]`, f32, in `[0, 1]`.
    pub maps: Tensor,
    /// Hidden states `[L, T, D]` of the text's tokens that have one, in the LMM's type.
    pub hidden: Tensor,
    /// Rows of `hidden` that belong to each phrase.
    pub phrases: Vec<Vec<usize>>,
    /// How the LMM's view lies in its padded square.
    pub geometry: Geometry,
    /// SAM's image embedding `[1, C, e, e]`.
    pub sam_embedding: Tensor,
    /// How the picture lies in SAM's padded square.
    pub sam_geometry: SamGeometry,
}

impl Observation {
    /// The same picture with only some of its phrases; the text's hidden states stay whole.
    ///
    /// # Errors
    /// If `phrases` reaches beyond the number of phrases.
    pub fn part(&self, phrases: Range<usize>) -> Result<Self> {
        let maps = self.maps.narrow(0, phrases.start, phrases.len())?;
        Ok(Self { maps, phrases: self.phrases[phrases].to_vec(), ..self.clone() })
    }

    /// The same on `device`; what is there already is not copied.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self {
            maps: self.maps.to_device(device)?,
            hidden: self.hidden.to_device(device)?,
            sam_embedding: self.sam_embedding.to_device(device)?,
            ..self.clone()
        })
    }
}

/// Mask logits of every phrase.
#[derive(Debug, Clone)]
pub struct MaskLogits {
    /// From the mask head, padding cut off: `[N, mh, mw]`.
    pub coarse: Tensor,
    /// From the refiner, at the picture's own size: `[N, H, W]`.
    pub refined: Tensor,
}

/// Which phrases are selected, and what is returned besides masks.
#[derive(Debug, Clone, PartialEq)]
pub struct GroundOptions {
    /// λ of the keyword selector: tokens above it are part of a phrase (`spec/training.md` §8.2).
    pub keyword_threshold: f32,
    /// Whether to return the attention maps.
    pub keep_maps: bool,
    /// Number of the picture that phrases are looked for in, counted from 0 in the order the pictures were given.
    pub image: usize,
}

impl Default for GroundOptions {
    fn default() -> Self {
        Self { keyword_threshold: LAMBDA, keep_maps: false, image: 0 }
    }
}

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Sampling {
    /// The likeliest token.
    #[default]
    Greedy,
    /// A random token of the nucleus; the same seed gives the same answer.
    Seeded {
        /// Divides the logits; above 0.
        temperature: f64,
        /// Mass of the nucleus, 0 to 1.
        top_p: f64,
        /// Seed of the generator.
        seed: u64,
    },
}

/// How an answer is made.
#[derive(Debug, Clone, PartialEq)]
pub struct AnswerOptions {
    /// Most tokens to generate, the dropped last one included.
    pub max_new_tokens: usize,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// Texts that end the answer beside the model's own; like those, they are not part of it.
    pub stop_words: Vec<String>,
    /// How phrases are found in the answer; `None` gives text only. The text is the same either way.
    pub phrases: Option<PhraseChoice>,
    /// How phrases are grounded.
    pub ground: GroundOptions,
}

impl Default for AnswerOptions {
    fn default() -> Self {
        Self {
            max_new_tokens: 512,
            sampling: Sampling::Greedy,
            stop_words: Vec::new(),
            phrases: Some(PhraseChoice::Keywords),
            ground: GroundOptions::default(),
        }
    }
}

/// A phrase of a text and the part of the picture it speaks of.
#[derive(Debug, Clone)]
pub struct GroundedPhrase {
    /// The phrase.
    pub text: String,
    /// First character in the text, counted in Unicode scalar values.
    pub start: usize,
    /// Behind the last character.
    pub end: usize,
    /// First token and the one behind the last.
    pub tokens: (usize, usize),
    /// Mean keyword probability of the tokens; 1 where the head has no keyword selector.
    pub score: f32,
    /// The refined mask at the picture's own size.
    pub mask: Mask,
    /// The mask head's mask at the picture's own size.
    pub coarse_mask: Mask,
    /// Attention maps `[C, gh, gw]`, if asked for.
    pub maps: Option<Tensor>,
}

/// How long each stage took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timings {
    /// Vision tower and reading the prompt or the given text.
    pub read: Duration,
    /// Generating tokens.
    pub generate: Duration,
    /// SAM's image encoder; zero when the session already had it.
    pub encode: Duration,
    /// Attention maps, mask head, refiner and thresholds.
    pub segment: Duration,
}

/// An answer, its phrases and their masks.
#[derive(Debug, Clone)]
pub struct GroundedAnswer {
    /// The text.
    pub answer: String,
    /// The text's tokens.
    pub token_ids: Vec<u32>,
    /// The phrases found, in order of the text (given phrases: in the order given).
    pub phrases: Vec<GroundedPhrase>,
    /// How long it took.
    pub timings: Timings,
}
