//! The sizes of flmm-tiny, in one place.

use serde::{Deserialize, Serialize};

/// Sizes of the LMM: a CLIP-style tower, a two-layer projector and a Llama-shaped decoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct LmmSizes {
    /// Side of the square picture the tower sees, in pixels.
    pub(crate) image_size: usize,
    /// Side of a patch, in pixels.
    pub(crate) patch_size: usize,
    /// Width of the tower.
    pub(crate) tower_width: usize,
    /// Encoder layers of the tower.
    pub(crate) tower_layers: usize,
    /// Attention heads of the tower.
    pub(crate) tower_heads: usize,
    /// Feed-forward width of the tower.
    pub(crate) tower_ffn: usize,
    /// Width of the decoder.
    pub(crate) width: usize,
    /// Layers of the decoder.
    pub(crate) layers: usize,
    /// Attention heads of the decoder.
    pub(crate) heads: usize,
    /// Feed-forward width of the decoder.
    pub(crate) ffn: usize,
    /// Rows of the embedding table.
    pub(crate) vocab: usize,
}

impl LmmSizes {
    /// The shipped sizes, for a tokenizer of `vocab` entries.
    pub(crate) fn shipped(vocab: usize) -> Self {
        Self {
            image_size: 144,
            patch_size: 12,
            tower_width: 128,
            tower_layers: 4,
            tower_heads: 4,
            tower_ffn: 512,
            width: 160,
            layers: 6,
            heads: 5,
            ffn: 432,
            vocab,
        }
    }

    /// Patches along one side.
    pub(crate) fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Image tokens.
    pub(crate) fn image_tokens(&self) -> usize {
        self.grid() * self.grid()
    }
}

/// Epsilon of the tower's layer norms, as CLIP.
pub(crate) const LAYER_NORM_EPS: f64 = 1e-5;
/// Epsilon of the decoder's norms, as Vicuna.
pub(crate) const RMS_NORM_EPS: f64 = 1e-5;
/// Base of the rotary frequencies: high enough that most pairs of a 32-wide head hardly turn over the length of a
/// picture, so that a word can be compared with a patch by content.
pub(crate) const ROPE_THETA: f64 = 1e6;
