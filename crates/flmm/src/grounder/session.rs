//! One picture and the conversation about it: what is computed once and kept.

use candle_core::Tensor;
use image::RgbImage;

use crate::capture::Capture;
use crate::error::Result;
use crate::layout::ImageLayout;
use crate::lmm::shared::embed_with_image;
use crate::lmm::{ImageInput, Lmm, Prepared, Turn};
use crate::sam::SamGeometry;
use crate::text::{KvCache, too_long};

/// A picture, the conversation about it, and what of both is already computed: image features, SAM's image
/// embedding, and the keys and values of every token read so far.
///
/// A later turn, or another text about the same picture, re-reads only what differs.
#[derive(Debug)]
pub struct Session {
    /// The conversation so far.
    pub turns: Vec<Turn>,
    pub(super) picture: RgbImage,
    pub(super) image: ImageInput,
    pub(super) sam: Option<(Tensor, SamGeometry)>,
    pub(super) cache: KvCache,
    /// `[image tokens, hidden]`
    features: Option<Tensor>,
    /// Ids of the tokens in the cache.
    read: Vec<u32>,
    /// How many tokens the last reading found in the cache.
    reused: usize,
}

impl Session {
    pub(super) fn new(lmm: &dyn Lmm, picture: &RgbImage) -> Result<Self> {
        let image = lmm.prepare_image(picture)?;
        let cache = KvCache::new(lmm.decoder().config(), image.layout.tokens + 256);
        Ok(Self {
            turns: Vec::new(),
            picture: picture.clone(),
            image,
            sam: None,
            cache,
            features: None,
            read: Vec::new(),
            reused: 0,
        })
    }

    /// How many tokens the last prompt shared with what was read before, and did not read again.
    pub fn tokens_reused(&self) -> usize {
        self.reused
    }

    /// Where the image lies in the sequence last read.
    pub fn layout(&self) -> &ImageLayout {
        &self.image.layout
    }

    /// Prompt ids of the conversation, the image token repeated for every image feature.
    ///
    /// Fails for an empty conversation or question, and when the prompt leaves no room in the context.
    pub(super) fn prompt(&mut self, lmm: &dyn Lmm, turns: &[Turn]) -> Result<Vec<u32>> {
        let prepared = Prepared::new(self.image.clone(), &lmm.prompt(turns)?, lmm.image_token())?;
        let limit = lmm.decoder().config().max_positions.min(lmm.reads_at_most().unwrap_or(usize::MAX));
        if prepared.token_ids.len() >= limit {
            return Err(too_long(prepared.token_ids.len() + 1, limit));
        }
        self.image.layout = prepared.image.layout;
        Ok(prepared.token_ids)
    }

    /// Reads `ids`, keeping what of them is already in the cache, and returns the final-normed state of the last
    /// one, `[1, hidden]`. Rows that `capture` wants are always read anew.
    pub(super) fn read(
        &mut self,
        lmm: &dyn Lmm,
        ids: &[u32],
        capture: Option<&mut Capture>,
    ) -> Result<Tensor> {
        let wanted = capture.as_ref().map_or(ids.len(), |capture| capture.positions().start);
        let shared = self.read.iter().zip(ids).take_while(|(old, new)| old == new).count();
        // The last token is always read, for its state.
        let shared = shared.min(wanted).min(ids.len().saturating_sub(1));
        self.reused = shared;
        self.cache.truncate(shared);
        self.read.truncate(shared);
        let embeds = self.embed(lmm, ids, shared)?;
        let hidden = lmm.decoder().forward(&embeds, &mut self.cache, capture)?;
        self.read.extend_from_slice(&ids[shared..]);
        Ok(hidden.narrow(0, hidden.dim(0)? - 1, 1)?)
    }

    /// Counts generated tokens that were fed to the decoder behind what was read.
    pub(super) fn continued(&mut self, ids: &[u32]) {
        self.read.extend_from_slice(ids);
        self.read.truncate(self.cache.len());
    }

    /// Embeddings of `ids[from..]`, image features in place.
    fn embed(&mut self, lmm: &dyn Lmm, ids: &[u32], from: usize) -> Result<Tensor> {
        let (start, end) = (self.image.layout.start, self.image.layout.end());
        if from >= end {
            return lmm.decoder().embed(&ids[from..]);
        }
        let features = match &self.features {
            Some(features) => features.clone(),
            None => self.features.insert(lmm.image_features(&self.image)?).clone(),
        };
        // `from` may lie inside the image when another prompt placed it elsewhere.
        let first = from.max(start);
        let kept = features.narrow(0, first - start, features.dim(0)?.saturating_sub(first - start))?;
        embed_with_image(lmm.decoder(), &ids[from..], first - from..end - from, &kept)
    }
}
