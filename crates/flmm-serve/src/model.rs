//! The model that is served.

use flmm::Grounder;
use image::RgbImage;

/// An opened model and what requests need to know of it.
pub(crate) struct Model {
    pub(crate) name: String,
    pub(crate) grounder: Grounder,
    /// Most image tokens that a picture becomes.
    pub(crate) image_tokens: usize,
}

impl Model {
    /// Finds out how many tokens pictures become by showing a wide, a high and a square one.
    pub(crate) fn new(name: String, grounder: Grounder) -> flmm::Result<Self> {
        let mut image_tokens = 1;
        for (width, height) in [(64, 64), (96, 32), (32, 96), (672, 672)] {
            let input = grounder.lmm().prepare_image(&RgbImage::new(width, height))?;
            image_tokens = image_tokens.max(input.layout.tokens);
        }
        Ok(Self { name, grounder, image_tokens })
    }

    /// What the model's prompt format puts behind a picture.
    pub(crate) fn image_end(&self) -> &'static str {
        self.grounder.lmm().base().format.image_end
    }
}
