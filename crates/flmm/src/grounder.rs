//! The facade: observe → decode → segment.
//!
//! [`Grounder::observe`] runs the frozen models once and keeps what grounding needs. [`Grounder::decode`] turns
//! that into mask logits and is differentiable in the head. [`Grounder::segment`] makes binary masks. Answering,
//! grounding a given text, training and evaluation all go through these three.

mod answer;
mod attention;
mod caption;
mod given;
mod head;
mod open;
mod reply;
mod revision;
mod session;
mod settings;
mod spans;

use std::time::Instant;

use candle_core::Tensor;
use image::RgbImage;

use crate::capture::Capture;
use crate::error::Result;
use crate::lmm::{GROUNDING_INSTRUCTION, Lmm, Turn};
use crate::masks::Mask;
use crate::nn::bilinear;
use crate::sam::Sam;
use crate::training_free::TrainingFree;

use spans::Chosen;

pub use answer::{
    AnswerOptions, GroundOptions, GroundedAnswer, GroundedPhrase, MaskLogits, Observation, Sampling, Timings,
};
pub use attention::{Attention, AttentionChoice, TokenAttention};
pub use caption::Caption;
pub use head::{GroundingHead, HeadSizes, SAM_PREFIX, overlay};
pub use open::ModelPaths;
pub use reply::{Ended, Reply};
pub use revision::Revision;
pub use session::Session;
pub use settings::{HeadSettings, RefinerKind};

/// Phrases are refined so many pixels at a time: 128 MB of logits, however many phrases of however large a picture.
const GROUP_PIXELS: usize = 32 << 20;

/// A frozen LMM, a frozen SAM image encoder and a grounding head.
pub struct Grounder {
    lmm: Box<dyn Lmm>,
    /// None where the head has no refiner.
    sam: Option<Sam>,
    head: GroundingHead,
    /// What makes masks in the head's place, for an LMM that has none.
    training_free: Option<TrainingFree>,
}

impl Grounder {
    /// From parts already at hand, which must fit one another.
    pub fn from_parts(lmm: Box<dyn Lmm>, sam: Sam, head: GroundingHead) -> Self {
        Self { lmm, sam: Some(sam), head, training_free: None }
    }

    /// As [`Grounder::from_parts`], for a head without a refiner.
    pub fn without_sam(lmm: Box<dyn Lmm>, head: GroundingHead) -> Self {
        Self { lmm, sam: None, head, training_free: None }
    }

    /// The frozen language model.
    pub fn lmm(&self) -> &dyn Lmm {
        self.lmm.as_ref()
    }

    /// SAM; its image encoder is what is used here, the head has its own refiner. A head without one needs no SAM.
    pub fn sam(&self) -> Option<&Sam> {
        self.sam.as_ref()
    }

    /// The trained part; one that says nothing where there is none.
    pub fn head(&self) -> &GroundingHead {
        &self.head
    }

    /// Begins a conversation about `picture`.
    pub fn start(&self, picture: &RgbImage) -> Result<Session> {
        self.start_with([picture])
    }

    /// Begins a conversation about several pictures, which [`Turn::show`] and [`GroundOptions::image`] count from 0.
    ///
    /// Fails with [`Error::Request`](crate::Error::Request) for a model that takes one picture
    /// ([`LmmSpec::several_images`](crate::lmm::LmmSpec::several_images)).
    pub fn start_with<'a>(&self, pictures: impl IntoIterator<Item = &'a RgbImage>) -> Result<Session> {
        Session::new(self.lmm(), pictures)
    }

    /// Adds a picture to a conversation; what is computed of the others is kept. Unless a question to come has a place
    /// for it ([`Turn::show`]), it is shown before the first one, and all is read again.
    ///
    /// Fails as [`Grounder::start_with`].
    pub fn add_picture(&self, session: &mut Session, picture: &RgbImage) -> Result<()> {
        session.add(self.lmm(), picture)
    }

    /// Lets SAM look at picture number `image` of the session on a thread of its own, unless it has. Worth it before
    /// [`Grounder::begin_reply`] or [`Grounder::ground_in`], where there are processors to spare: masks need SAM's embedding
    /// only when the LMM has read the picture.
    pub fn look_ahead(&self, session: &mut Session, image: usize) {
        session.look_ahead(self.sam(), image);
    }

    /// Reads `caption` as if the model had said it about `picture`, and keeps what grounding needs.
    ///
    /// One teacher-forced pass over the grounding prompt and the caption (`spec/pipeline.md` §2). Nothing of the
    /// result can be differentiated.
    pub fn observe(&self, picture: &RgbImage, caption: &Caption) -> Result<Observation> {
        self.observe_in(&mut self.start(picture)?.once(), &[Turn::user(GROUNDING_INSTRUCTION)], caption)
    }

    /// As [`Grounder::observe`], behind the prompt of any conversation, about the session's first picture, and reusing
    /// what the session has read.
    pub fn observe_in(
        &self,
        session: &mut Session,
        turns: &[Turn],
        caption: &Caption,
    ) -> Result<Observation> {
        self.observe_image_in(session, 0, turns, caption)
    }

    /// As [`Grounder::observe_in`], about picture number `image` of the session, counted from 0.
    pub fn observe_image_in(
        &self,
        session: &mut Session,
        image: usize,
        turns: &[Turn],
        caption: &Caption,
    ) -> Result<Observation> {
        let prompt = session.prompt(self.lmm(), turns)?;
        self.observe_behind(session, image, prompt, caption)
    }

    /// As [`Grounder::observe_image_in`], behind any token ids that hold one image token for each picture, in the order of
    /// the pictures: part of what [`Lmm::prompt`] gives, for example a question that is itself the text to ground.
    pub fn observe_tokens(
        &self,
        session: &mut Session,
        image: usize,
        token_ids: &[u32],
        caption: &Caption,
    ) -> Result<Observation> {
        let order: Vec<usize> = (0..session.images()).collect();
        let prompt = session.place(self.lmm(), token_ids, &order)?;
        self.observe_behind(session, image, prompt, caption)
    }

    fn observe_behind(
        &self,
        session: &mut Session,
        image: usize,
        prompt: Vec<u32>,
        caption: &Caption,
    ) -> Result<Observation> {
        session.input(image)?;
        caption.phrases()?;
        let mut caption = caption.clone();
        let capture = self.read_caption(session, image, prompt, &mut caption)?;
        self.observation(session, image, &capture, caption.phrases()?)
    }

    /// Hidden states `[L, T, D]` of the tokens of `caption`, read as in [`Grounder::observe_in`]: what the keyword
    /// selector needs, without SAM and without attention maps. The caption may have no phrase at all.
    pub fn hidden_in(&self, session: &mut Session, turns: &[Turn], caption: &Caption) -> Result<Tensor> {
        let prompt = session.prompt(self.lmm(), turns)?;
        let capture = self.read_caption(session, 0, prompt, &mut caption.clone())?;
        capture.hidden_rows(&capture.positions().collect::<Vec<_>>())
    }

    /// Mask logits of every phrase observed; differentiable in the head.
    pub fn decode(&self, observation: &Observation) -> Result<MaskLogits> {
        let coarse = self.coarse(observation)?;
        let refined = self.refine(observation, &coarse)?;
        Ok(MaskLogits { coarse, refined })
    }

    /// Coarse logits `[N, mh, mw]` of every phrase observed, the LMM's padding cut off.
    pub fn coarse(&self, observation: &Observation) -> Result<Tensor> {
        match &self.training_free {
            Some(training_free) => training_free.coarse(observation),
            None => self.head.coarse(observation),
        }
    }

    /// Refined logits `[N, H, W]` at the picture's own size, from coarse logits `[N, mh, mw]` of any size.
    pub fn refine(&self, observation: &Observation, coarse: &Tensor) -> Result<Tensor> {
        match &self.training_free {
            Some(training_free) => training_free.refine(observation, coarse),
            None => self.head.refine(observation, coarse),
        }
    }

    /// Binary masks `(refined, coarse)` of every phrase at the picture's own size: logits above 0
    /// (`spec/pipeline.md` §6).
    pub fn segment(&self, observation: &Observation) -> Result<Vec<(Mask, Mask)>> {
        self.binarise(&self.decode(observation)?, observation)
    }

    /// As [`Grounder::segment`], from logits that are at hand.
    pub fn binarise(&self, logits: &MaskLogits, observation: &Observation) -> Result<Vec<(Mask, Mask)>> {
        let refined = binary(&logits.refined)?;
        if self.sam.is_none() {
            // Without a refiner the refined logits are the coarse ones at the picture's size.
            return Ok(refined.into_iter().map(|mask| (mask.clone(), mask)).collect());
        }
        let (height, width) = observation.sam_geometry.original;
        let coarse = bilinear(&logits.coarse.unsqueeze(0)?, height, width)?.squeeze(0)?;
        Ok(refined.into_iter().zip(binary(&coarse)?).collect())
    }

    /// What the session has seen of picture number `image` and the text whose rows are in `capture`; `phrases` are
    /// token numbers.
    fn observation(
        &self,
        session: &mut Session,
        image: usize,
        capture: &Capture,
        phrases: Vec<Vec<usize>>,
    ) -> Result<Observation> {
        let (sam_embedding, sam_geometry) = session.sam(self.sam(), image)?;
        let (maps, input) = session.phrase_maps(image, capture, &phrases)?;
        let hidden = capture.hidden_rows(&capture.positions().collect::<Vec<_>>())?;
        Ok(Observation { maps, hidden, phrases, geometry: input.geometry, sam_embedding, sam_geometry })
    }

    /// Grounds the chosen phrases of a text whose rows are in `capture`, and gives them to `on_phrase` in their order.
    fn ground_spans(
        &self,
        session: &mut Session,
        capture: &Capture,
        chosen: &Chosen,
        options: &GroundOptions,
        timings: &mut Timings,
        on_phrase: &mut dyn FnMut(GroundedPhrase),
    ) -> Result<()> {
        if chosen.spans.is_empty() {
            return Ok(());
        }
        let clock = Instant::now();
        session.sam(self.sam(), options.image)?;
        timings.encode += clock.elapsed();
        let clock = Instant::now();
        let phrases = chosen.spans.iter().map(|span| span.tokens.clone().collect()).collect();
        let observation = self.observation(session, options.image, capture, phrases)?;
        let coarse = self.coarse(&observation)?;
        let (height, width) = observation.sam_geometry.original;
        let group = (GROUP_PIXELS / (height * width).max(1)).max(1);
        let chars: Vec<char> = chosen.text.chars().collect();
        let count = chosen.spans.len();
        for from in (0..count).step_by(group) {
            let part = observation.part(from..count.min(from + group))?;
            let coarse = coarse.narrow(0, from, part.phrases.len())?;
            let refined = self.refine(&part, &coarse)?;
            let masks = self.binarise(&MaskLogits { coarse, refined }, &part)?;
            for (number, (span, (mask, coarse_mask))) in chosen.spans[from..].iter().zip(masks).enumerate() {
                on_phrase(GroundedPhrase {
                    text: chars[span.chars.clone()].iter().collect(),
                    start: span.chars.start,
                    end: span.chars.end,
                    tokens: (span.tokens.start, span.tokens.end),
                    score: chosen.score(span),
                    mask,
                    coarse_mask,
                    maps: if options.keep_maps { Some(part.maps.get(number)?) } else { None },
                });
            }
        }
        timings.segment += clock.elapsed();
        Ok(())
    }
}

/// Logits `[N, H, W]` above 0, one mask per phrase.
fn binary(logits: &Tensor) -> Result<Vec<Mask>> {
    (0..logits.dim(0)?).map(|phrase| Mask::from_logits(&logits.get(phrase)?)).collect()
}
