//! Attention alone, for looking at the frozen LMM: neither SAM nor the head is run.

use candle_core::Tensor;
use image::RgbImage;

use super::{Caption, Grounder};
use crate::error::Result;
use crate::geometry::Geometry;
use crate::layout::ImageLayout;
use crate::lmm::{GROUNDING_INSTRUCTION, Turn};

/// Where the phrases of a caption look.
#[derive(Debug, Clone)]
pub struct Attention {
    /// Merged attention of every phrase `[N, C, gh, gw]`, f32, in `[0, 1]`.
    pub maps: Tensor,
    /// How the LMM's view lies in its padded square.
    pub geometry: Geometry,
    /// How image tokens became channels ([`ImageLayout::channel_origin`]).
    pub layout: ImageLayout,
}

impl Grounder {
    /// Reads `caption` as [`Grounder::observe`] does and keeps its phrases' attention only.
    pub fn attention(&self, picture: &RgbImage, caption: &Caption) -> Result<Attention> {
        caption.phrases()?;
        let mut caption = caption.clone();
        let mut session = self.start(picture)?;
        let prompt = session.prompt(self.lmm(), &[Turn::user(GROUNDING_INSTRUCTION)])?;
        let capture = self.read_caption(&mut session, prompt, &mut caption)?;
        let (maps, input) = session.phrase_maps(0, &capture, &caption.phrases()?)?;
        Ok(Attention { maps, geometry: input.geometry, layout: input.layout.clone() })
    }
}
