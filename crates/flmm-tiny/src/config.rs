//! The sizes of flmm-tiny, in one place.

use anyhow::{Result, ensure};
use serde::Deserialize;

/// Sizes of the LMM: a CLIP-style tower, a two-layer projector and a Llama-shaped decoder.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
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
    /// Rows of the embedding table; the tokenizer's entries, so no setting.
    #[serde(skip)]
    pub(crate) vocab: usize,
}

impl Default for LmmSizes {
    fn default() -> Self {
        Self::shipped(0)
    }
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

    /// An error unless heads share widths evenly and patches fill the picture.
    pub(crate) fn check(&self) -> Result<()> {
        let parts = [
            ("image_size", self.image_size, "patch_size", self.patch_size),
            ("tower_width", self.tower_width, "tower_heads", self.tower_heads),
            ("width", self.width, "heads", self.heads),
        ];
        for (name, value, by, divisor) in parts {
            ensure!(
                value > 0 && divisor > 0 && value % divisor == 0,
                "{name} is {value}, {by} is {divisor}: expected a positive multiple of it"
            );
        }
        ensure!(
            (self.width / self.heads).is_multiple_of(2),
            "heads are {} wide: expected an even number, whose halves are rotated against one another",
            self.width / self.heads
        );
        Ok(())
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

/// What the command line sets without options: the one place of default values, for recipes too.
pub(crate) fn defaults<T: clap::Args>() -> T {
    let command = T::augment_args(clap::Command::new("defaults"));
    T::from_arg_matches(&command.get_matches_from(["defaults"])).unwrap_or_else(|error| error.exit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_do_not_fit_together_are_refused() {
        let shipped = LmmSizes::shipped(100);
        shipped.check().unwrap();
        let wrong = LmmSizes { image_size: 145, ..shipped.clone() }.check().unwrap_err().to_string();
        assert_eq!(wrong, "image_size is 145, patch_size is 12: expected a positive multiple of it");
        assert!(LmmSizes { heads: 0, ..shipped.clone() }.check().is_err());
        assert!(LmmSizes { heads: 32, ..shipped }.check().is_err());
    }
}
