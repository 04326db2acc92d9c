//! Pictures and the conversation about them: what is computed once and kept.

use std::thread::JoinHandle;

use candle_core::{DType, Device, Tensor};
use image::RgbImage;

use super::Caption;
use crate::capture::Capture;
use crate::error::{Error, Result};
use crate::layout::{ImageLayout, Merge};
use crate::lmm::shared::embed_with_images;
use crate::lmm::{ImageInput, Lmm, Prepared, Turn, order_shown};
use crate::sam::{Sam, SamConfig, SamGeometry};
use crate::text::{KvCache, too_long};

/// Pictures, the conversation about them, and what of both is already computed: image features, SAM's image
/// embeddings, and the keys and values of every token read so far.
///
/// A later turn, or another text about the same pictures, re-reads only what differs.
#[derive(Debug)]
pub struct Session {
    /// The conversation so far.
    pub turns: Vec<Turn>,
    pub(super) cache: KvCache,
    pictures: Vec<Picture>,
    /// The tokens in the cache.
    read: Vec<Token>,
    /// How many tokens the last reading found in the cache.
    reused: usize,
    coarse_only: bool,
    once: bool,
}

/// One picture; the layout in `input` is where the last prompt shows it.
#[derive(Debug)]
struct Picture {
    picture: RgbImage,
    input: ImageInput,
    /// `[image tokens, hidden]`
    features: Option<Tensor>,
    sam: Encoding,
}

/// SAM's embedding of a picture.
#[derive(Debug, Default)]
enum Encoding {
    #[default]
    None,
    /// Being computed beside the LMM.
    Begun {
        thread: JoinHandle<Result<(Tensor, SamGeometry)>>,
        /// Memory that the embedding will take.
        bytes: usize,
    },
    Known(Tensor, SamGeometry),
}

/// A token in the cache, and the picture it is part of: all pictures share one id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Token {
    id: u32,
    image: Option<usize>,
}

impl Session {
    pub(super) fn new<'a>(lmm: &dyn Lmm, pictures: impl IntoIterator<Item = &'a RgbImage>) -> Result<Self> {
        let pictures: Vec<&RgbImage> = pictures.into_iter().collect();
        lmm.check_images(pictures.len())?;
        let pictures = pictures.into_iter().map(|picture| Picture::new(lmm, picture));
        let pictures = pictures.collect::<Result<Vec<_>>>()?;
        let tokens: usize = pictures.iter().map(|picture| picture.input.layout.tokens).sum();
        let cache = KvCache::new(lmm.decoder().config(), tokens + 256);
        Ok(Self {
            turns: Vec::new(),
            cache,
            pictures,
            read: Vec::new(),
            reused: 0,
            coarse_only: false,
            once: false,
        })
    }

    /// Adds a picture; what is computed of the others is kept.
    pub(super) fn add(&mut self, lmm: &dyn Lmm, picture: &RgbImage) -> Result<()> {
        lmm.check_images(self.pictures.len() + 1)?;
        self.pictures.push(Picture::new(lmm, picture)?);
        Ok(())
    }

    /// SAM does not look at the pictures: for those who want coarse masks alone. Refining what is then observed fails.
    pub fn coarse_only(mut self) -> Self {
        self.coarse_only = true;
        self
    }

    /// Of a text whose phrases are known before it is read, no keys and values are kept, which take gigabytes where pictures
    /// are thousands of tokens: for those who read a single text.
    pub fn once(mut self) -> Self {
        self.once = true;
        self
    }

    /// How many pictures the conversation is about.
    pub fn images(&self) -> usize {
        self.pictures.len()
    }

    /// Picture number `image`, counted from 0.
    pub fn picture(&self, image: usize) -> Option<&RgbImage> {
        self.pictures.get(image).map(|picture| &picture.picture)
    }

    /// How many tokens the last prompt shared with what was read before, and did not read again.
    pub fn tokens_reused(&self) -> usize {
        self.reused
    }

    /// Where the first picture lies in the sequence last read.
    pub fn layout(&self) -> &ImageLayout {
        // A session has at least one picture.
        &self.pictures[0].input.layout
    }

    /// Where picture number `image`, counted from 0, lies in the sequence last read.
    ///
    /// Fails with [`Error::Request`] if there is no such picture.
    pub fn layout_of(&self, image: usize) -> Result<&ImageLayout> {
        Ok(&self.input(image)?.layout)
    }

    /// Picture number `image` as the LMM sees it.
    pub(super) fn input(&self, image: usize) -> Result<&ImageInput> {
        self.pictures.get(image).map(|picture| &picture.input).ok_or_else(|| self.no_picture(image))
    }

    /// Where `phrases`, token numbers of the text whose rows are in `capture`, look in picture number `image`:
    /// `[N, C, gh, gw]`; and that picture as the LMM sees it.
    pub(super) fn phrase_maps(
        &self,
        image: usize,
        capture: &Capture,
        phrases: &[Vec<usize>],
    ) -> Result<(Tensor, &ImageInput)> {
        let positions = positions(phrases, capture.positions().start);
        let input = self.input(image)?;
        Ok((capture.phrase_maps(&self.cache, &input.layout, &positions, Merge::Mean)?, input))
    }

    /// SAM's embedding of picture number `image`, computed once; an empty one where there is no SAM.
    pub(super) fn sam(&mut self, sam: Option<&Sam>, image: usize) -> Result<(Tensor, SamGeometry)> {
        if image >= self.pictures.len() {
            return Err(self.no_picture(image));
        }
        let picture = &mut self.pictures[image];
        let encoded = match (std::mem::take(&mut picture.sam), sam.filter(|_| !self.coarse_only)) {
            (Encoding::Known(embedding, geometry), _) => (embedding, geometry),
            (Encoding::Begun { thread, .. }, _) => thread.join().unwrap_or_else(|_| {
                Err(candle_core::Error::Msg("SAM's image encoder panicked".into()).into())
            })?,
            (Encoding::None, Some(sam)) => sam.encode_image(&picture.picture)?,
            (Encoding::None, None) => {
                let original = (picture.picture.height() as usize, picture.picture.width() as usize);
                let geometry = SamGeometry::new(original, SamConfig::vit_l().image_size);
                (Tensor::zeros((1, 0, 0, 0), DType::F32, &Device::Cpu)?, geometry)
            }
        };
        picture.sam = Encoding::Known(encoded.0.clone(), encoded.1);
        Ok(encoded)
    }

    /// Lets SAM look at picture number `image` on a thread of its own, unless it has: masks need its embedding only after
    /// the LMM has read the picture. Where no thread can be had, SAM looks when masks are made.
    pub(super) fn look_ahead(&mut self, sam: Option<&Sam>, image: usize) {
        let Some(sam) = sam.filter(|_| !self.coarse_only) else { return };
        let Some(picture) = self.pictures.get_mut(image) else { return };
        if matches!(picture.sam, Encoding::None) {
            let (sam, shown) = (sam.clone(), picture.picture.clone());
            let config = sam.config();
            let side = config.image_size / config.patch_size.max(1);
            let bytes = config.prompt_embed_dim * side * side * DType::F32.size_in_bytes();
            let encode = move || sam.encode_image(&shown);
            if let Ok(thread) = std::thread::Builder::new().name("sam".into()).spawn(encode) {
                picture.sam = Encoding::Begun { thread, bytes };
            }
        }
    }

    /// Memory in bytes that the session holds: pictures, image features, embeddings, keys and values.
    pub fn bytes(&self) -> usize {
        let pictures = self.pictures.iter().map(Picture::bytes).sum::<usize>();
        pictures + self.cache.bytes() + self.read.len() * size_of::<Token>()
    }

    fn no_picture(&self, image: usize) -> Error {
        Error::request(
            format!(
                "there is no picture {image}: the conversation has {}, counted from 0",
                self.pictures.len()
            ),
            "choose a picture of the conversation",
        )
    }

    /// Prompt ids of the conversation, the image tokens repeated for every image feature.
    ///
    /// Fails for an empty conversation or question, and when the prompt leaves no room in the context.
    pub(super) fn prompt(&mut self, lmm: &dyn Lmm, turns: &[Turn]) -> Result<Vec<u32>> {
        let prompt = lmm.prompt(turns, self.pictures.len())?;
        let order = order_shown(turns, self.pictures.len())?;
        self.place(lmm, &prompt, &order)
    }

    /// Repeats the image tokens of `prompt`, which stand for the pictures in `order`, for every image feature.
    pub(super) fn place(&mut self, lmm: &dyn Lmm, prompt: &[u32], order: &[usize]) -> Result<Vec<u32>> {
        let inputs = self.pictures.iter().map(|picture| picture.input.clone()).collect();
        let prepared = Prepared::new(inputs, order, prompt, lmm.image_token())?;
        let limit = lmm.decoder().config().max_positions.min(lmm.reads_at_most().unwrap_or(usize::MAX));
        if prepared.token_ids.len() >= limit {
            return Err(too_long(prepared.token_ids.len() + 1, limit));
        }
        for (picture, input) in self.pictures.iter_mut().zip(prepared.images) {
            picture.input = input;
        }
        Ok(prepared.token_ids)
    }

    /// What is to be kept so that phrases of `caption`, which is read behind `prompt` tokens, can be grounded in picture
    /// number `image`.
    pub(super) fn capture(&self, image: usize, prompt: usize, caption: &Caption) -> Result<Capture> {
        let phrases = if self.once { caption.phrases()? } else { Vec::new() };
        if phrases.is_empty() {
            return Ok(Capture::from_position(prompt));
        }
        let image = self.input(image)?.layout.clone();
        Ok(Capture::of_phrases(prompt, image, positions(&phrases, prompt), Merge::Mean))
    }

    /// Reads `ids`, keeping what of them is already in the cache, and returns the final-normed state of the last
    /// one, `[1, hidden]`. Rows that `capture` wants are always read anew; for one that needs no keys, all is read and nothing kept.
    pub(super) fn read(
        &mut self,
        lmm: &dyn Lmm,
        ids: &[u32],
        capture: Option<&mut Capture>,
    ) -> Result<Tensor> {
        if capture.as_ref().is_some_and(|capture| !capture.needs_keys()) {
            self.reused = 0;
            let embeds = self.embed(lmm, ids, 0)?;
            let mut cache = KvCache::passing(lmm.decoder().config());
            return lmm.decoder().read(&embeds, &mut cache, capture);
        }
        let tokens = self.tokens(ids);
        let wanted = capture.as_ref().map_or(ids.len(), |capture| capture.positions().start);
        let shared = self.read.iter().zip(&tokens).take_while(|(old, new)| old == new).count();
        // The last token is always read, for its state.
        let shared = shared.min(wanted).min(ids.len().saturating_sub(1));
        self.reused = shared;
        self.cache.truncate(shared);
        self.read.truncate(shared);
        let embeds = self.embed(lmm, ids, shared)?;
        let last = lmm.decoder().read(&embeds, &mut self.cache, capture)?;
        self.read.extend_from_slice(&tokens[shared..]);
        Ok(last)
    }

    /// Counts generated tokens that were fed to the decoder behind what was read.
    pub(super) fn continued(&mut self, ids: &[u32]) {
        self.read.extend(ids.iter().map(|&id| Token { id, image: None }));
        self.read.truncate(self.cache.len());
    }

    /// `ids` with the picture that each is part of.
    fn tokens(&self, ids: &[u32]) -> Vec<Token> {
        let mut tokens: Vec<Token> = ids.iter().map(|&id| Token { id, image: None }).collect();
        for (number, picture) in self.pictures.iter().enumerate() {
            let layout = &picture.input.layout;
            for token in tokens.iter_mut().skip(layout.start).take(layout.tokens) {
                token.image = Some(number);
            }
        }
        tokens
    }

    /// Embeddings of `ids[from..]`, image features in place. Only pictures that lie there are looked at.
    fn embed(&mut self, lmm: &dyn Lmm, ids: &[u32], from: usize) -> Result<Tensor> {
        let mut images = Vec::new();
        for picture in &mut self.pictures {
            let (start, end) = (picture.input.layout.start, picture.input.layout.end());
            if from >= end {
                continue;
            }
            let features = match &picture.features {
                Some(features) => features.clone(),
                None => picture.features.insert(lmm.image_features(&picture.input)?).clone(),
            };
            // `from` may lie inside the image when another prompt placed it elsewhere.
            let first = from.max(start);
            let kept = features.dim(0)?.saturating_sub(first - start);
            images.push((first - from, features.narrow(0, first - start, kept)?));
        }
        embed_with_images(lmm.decoder(), &ids[from..], images)
    }
}

/// Positions of the token numbers `phrases` of a text that begins at `first`.
fn positions(phrases: &[Vec<usize>], first: usize) -> Vec<Vec<usize>> {
    phrases.iter().map(|phrase| phrase.iter().map(|token| first + token).collect()).collect()
}

impl Picture {
    fn new(lmm: &dyn Lmm, picture: &RgbImage) -> Result<Self> {
        let input = lmm.prepare_image(picture)?;
        Ok(Self { picture: picture.clone(), input, features: None, sam: Encoding::None })
    }

    fn bytes(&self) -> usize {
        let size = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        let input = size(&self.input.pixel_values) + self.input.pixel_values_aux.as_ref().map_or(0, size);
        let embedding = match &self.sam {
            Encoding::Known(embedding, _) => size(embedding),
            Encoding::Begun { bytes, .. } => *bytes,
            Encoding::None => 0,
        };
        self.picture.as_raw().len() + input + self.features.as_ref().map_or(0, size) + embedding
    }
}
