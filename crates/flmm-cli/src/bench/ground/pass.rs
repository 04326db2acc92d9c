//! One grounding pass, stage by stage.

use std::time::Instant;

use candle_core::{Device, Tensor};
use cpu_time::ProcessTime;
use flmm::Grounder;
use flmm::capture::Capture;
use flmm::grounder::{Caption, Observation};
use flmm::layout::{ImageLayout, Merge};
use flmm::lmm::{GROUNDING_INSTRUCTION, Turn};
use flmm::masks::Mask;
use flmm::text::KvCache;
use image::RgbImage;

use crate::failure::{Failure, Result};

/// Wall and processor seconds.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub(super) struct Times {
    pub(super) wall: f64,
    pub(super) cpu: f64,
}

/// Seconds since the last lap.
pub(super) struct Watch {
    device: Device,
    wall: Instant,
    cpu: ProcessTime,
}

impl Watch {
    pub(super) fn start(device: &Device) -> Self {
        Self { device: device.clone(), wall: Instant::now(), cpu: ProcessTime::now() }
    }

    pub(super) fn lap(&mut self) -> Result<Times> {
        // A device may still be at work on what it was given.
        self.device.synchronize().map_err(flmm::Error::from)?;
        let times = Times { wall: self.wall.elapsed().as_secs_f64(), cpu: self.cpu.elapsed().as_secs_f64() };
        (self.wall, self.cpu) = (Instant::now(), ProcessTime::now());
        Ok(times)
    }
}

/// Names of the stages, in order.
pub(super) const STAGES: [&str; 7] =
    ["preprocess", "vision tower", "prefill", "maps", "SAM encoder", "U-Net", "SAM decoder"];

/// What is grounded.
pub(super) struct Question<'a> {
    pub(super) grounder: &'a Grounder,
    pub(super) picture: &'a RgbImage,
    pub(super) caption: Caption,
}

/// A pass and what it left.
pub(super) struct Pass {
    /// In the order of [`STAGES`].
    pub(super) stages: Vec<Times>,
    /// Refined and coarse mask of every phrase.
    pub(super) masks: Vec<(Mask, Mask)>,
    pub(super) observation: Observation,
    pub(super) read: Read,
    /// Rows that the vision tower reads.
    pub(super) tower_rows: usize,
}

/// A text that was read.
pub(super) struct Read {
    /// All ids, those of the picture included.
    pub(super) ids: Vec<u32>,
    /// Where the caption begins.
    pub(super) caption_start: usize,
    pub(super) image: ImageLayout,
    /// Bytes kept of the attention rows and hidden states.
    pub(super) captured: usize,
}

/// What the decoder knows of a text that was read.
pub(super) struct State {
    /// The decoder's input `[tokens, hidden]`.
    pub(super) embeds: Tensor,
    cache: KvCache,
    /// Final-normed state of the last token, `[1, hidden]`.
    last: Tensor,
}

impl Question<'_> {
    fn device(&self) -> &Device {
        self.grounder.lmm().decoder().device()
    }

    /// The steps of [`Grounder::ground`] for given phrases, one after the other.
    pub(super) fn pass(&self) -> Result<(Pass, State)> {
        let (grounder, lmm) = (self.grounder, self.grounder.lmm());
        let decoder = lmm.decoder();
        let mut stages = Vec::with_capacity(STAGES.len());
        let mut watch = Watch::start(self.device());

        let prepared = lmm.prepare(self.picture, &[Turn::user(GROUNDING_INSTRUCTION)])?;
        let [input] = &prepared.images[..] else {
            return Err(Failure::other("the prompt shows another number of pictures than one"));
        };
        let sam = grounder.sam().ok_or_else(|| {
            Failure::usage("the head has no refiner, so SAM has nothing to do", "give a head with a refiner")
        })?;
        let (pixels, sam_geometry) = sam.pixel_values(self.picture)?;
        let pixels = pixels.unsqueeze(0).and_then(|pixels| pixels.to_device(self.device()));
        let pixels = pixels.map_err(flmm::Error::from)?;
        stages.push(watch.lap()?);

        let features = lmm.vision_features(input)?;
        let tower_rows = features.elem_count() / features.dims().last().copied().unwrap_or(1).max(1);
        let features = lmm.project(input, &features)?;
        stages.push(watch.lap()?);

        let mut caption = self.caption.clone();
        let caption_start = prepared.token_ids.len();
        if let Some(limit) = lmm.reads_at_most() {
            caption.cut(limit.saturating_sub(caption_start))?;
        }
        let ids = [&prepared.token_ids[..], &caption.token_ids].concat();
        let (start, end) = (input.layout.start, input.layout.end());
        let features = features.to_dtype(decoder.dtype()).map_err(flmm::Error::from)?;
        let parts = [decoder.embed(&ids[..start])?, features, decoder.embed(&ids[end..])?];
        let embeds = Tensor::cat(&parts, 0).map_err(flmm::Error::from)?;
        let mut capture = Capture::from_position(caption_start);
        let mut cache = KvCache::new(decoder.config(), ids.len() + 256);
        let hidden = decoder.forward(&embeds, &mut cache, Some(&mut capture))?;
        stages.push(watch.lap()?);

        let phrases = caption.phrases()?;
        let rows = |phrase: &Vec<usize>| phrase.iter().map(|token| caption_start + token).collect();
        let positions: Vec<Vec<usize>> = phrases.iter().map(rows).collect();
        let maps = capture.phrase_maps(&cache, &input.layout, &positions, Merge::Mean)?;
        let states = capture.hidden_rows(&capture.positions().collect::<Vec<_>>())?;
        stages.push(watch.lap()?);

        let sam_embedding = sam.image_encoder().forward(&pixels)?.detach();
        stages.push(watch.lap()?);

        let geometry = input.geometry;
        let observation =
            Observation { maps, hidden: states, phrases, geometry, sam_embedding, sam_geometry };
        let coarse = grounder.coarse(&observation)?;
        stages.push(watch.lap()?);

        let refined = grounder.refine(&observation, &coarse)?;
        let masks = grounder.binarise(&flmm::grounder::MaskLogits { coarse, refined }, &observation)?;
        stages.push(watch.lap()?);

        let last = hidden.narrow(0, ids.len() - 1, 1).map_err(flmm::Error::from)?;
        let read = Read { ids, caption_start, image: input.layout.clone(), captured: capture.bytes() };
        let state = State { embeds, cache, last };
        Ok((Pass { stages, masks, observation, read, tower_rows }, state))
    }

    /// Reads the same embeddings again, with attention rows kept or not.
    pub(super) fn prefill(&self, read: &Read, state: &State, keep: bool) -> Result<Times> {
        let decoder = self.grounder.lmm().decoder();
        let mut watch = Watch::start(self.device());
        let mut capture = Capture::from_position(read.caption_start);
        let mut cache = KvCache::new(decoder.config(), read.ids.len() + 256);
        decoder.forward(&state.embeds, &mut cache, keep.then_some(&mut capture))?;
        watch.lap()
    }

    /// The likeliest `count` tokens behind the text, whatever they mean, and the time they took.
    pub(super) fn continue_greedily(&self, state: State, count: usize) -> Result<(Vec<u32>, Times)> {
        let decoder = self.grounder.lmm().decoder();
        let mut ids = Vec::with_capacity(count);
        let mut watch = Watch::start(self.device());
        let State { mut cache, mut last, .. } = state;
        for _ in 0..count {
            let likeliest = decoder.logits(&last)?.argmax(1).and_then(|id| id.to_vec1::<u32>());
            ids.extend(likeliest.map_err(flmm::Error::from)?);
            let embeds = decoder.embed(&ids[ids.len() - 1..])?;
            last = decoder.forward(&embeds, &mut cache, None)?;
        }
        Ok((ids, watch.lap()?))
    }
}
