//! The facade: observe → decode → segment.
//!
//! [`Grounder::observe`] runs the frozen models once and keeps what grounding needs. [`Grounder::decode`] turns
//! that into mask logits and is differentiable in the head. [`Grounder::segment`] makes binary masks. Answering,
//! grounding a given text, training and evaluation all go through these three.

mod answer;
mod caption;
mod given;
mod head;
mod reply;
mod session;
mod spans;

use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use image::RgbImage;

use crate::capture::Capture;
use crate::error::Result;
use crate::layout::Merge;
use crate::lmm::{self, GROUNDING_INSTRUCTION, Lmm, OpenOptions, Turn};
use crate::masks::Mask;
use crate::nn::bilinear;
use crate::sam::{Sam, read_checkpoint};
use crate::weights::Params;

use spans::Span;

pub use answer::{
    AnswerOptions, GroundOptions, GroundedAnswer, GroundedPhrase, MaskLogits, Observation, Sampling, Timings,
};
pub use caption::Caption;
pub use head::{GroundingHead, HeadSizes, SAM_PREFIX, overlay};
pub use session::Session;

/// Where the three parts of a model lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelPaths {
    /// The LMM: a Hugging Face folder.
    pub model: PathBuf,
    /// SAM: a checkpoint file, or a folder with one.
    pub sam: PathBuf,
    /// The grounding head: a folder with `head.safetensors`, or a released `.safetensors` or `.pth` file.
    pub head: PathBuf,
}

impl ModelPaths {
    /// A bundle: one folder with `lmm/`, `sam/` and `head/`.
    pub fn bundle(dir: &Path) -> Self {
        Self { model: dir.join("lmm"), sam: dir.join("sam"), head: dir.join("head") }
    }
}

/// A frozen LMM, a frozen SAM image encoder and a grounding head.
pub struct Grounder {
    lmm: Box<dyn Lmm>,
    sam: Sam,
    head: GroundingHead,
}

impl Grounder {
    /// Opens the three parts. The LMM computes in `dtype`; SAM and the head in f32.
    ///
    /// Public SAM tensors are loaded first, the head's are laid over them (`spec/pipeline.md` §7).
    ///
    /// # Errors
    /// [`Error::Weights`] with every missing, misshapen or unexpected tensor of a part, [`Error::Config`].
    pub fn open(paths: &ModelPaths, device: &Device, dtype: DType) -> Result<Self> {
        Self::open_with(paths, &OpenOptions::new(dtype, device))
    }

    /// As [`Grounder::open`], with what else the LMM's family may need.
    pub fn open_with(paths: &ModelPaths, options: &OpenOptions) -> Result<Self> {
        let device = &options.device;
        let lmm = lmm::open_with(&paths.model, options)?;
        let (sam, sam_tensors) = read_checkpoint(&paths.sam, device)?;
        let sizes = HeadSizes {
            channels: lmm.spec().channels,
            layers: lmm.spec().layers,
            hidden_size: lmm.decoder().config().hidden_size,
            sam,
        };
        let tensors = overlay(&paths.head, &sam_tensors, head::load_head_tensors(&paths.head, device)?)?;
        let params = Params::new(&paths.head, tensors);
        let head = GroundingHead::from_params(&sizes, &params)?;
        let sam = Sam::load(&sizes.sam, &params.pp("sam.model"))?;
        params.finish(head::WRONG_HEAD)?;
        Ok(Self::from_parts(lmm, sam, head))
    }

    /// From parts already at hand, which must fit one another.
    pub fn from_parts(lmm: Box<dyn Lmm>, sam: Sam, head: GroundingHead) -> Self {
        Self { lmm, sam, head }
    }

    /// The frozen language model.
    pub fn lmm(&self) -> &dyn Lmm {
        self.lmm.as_ref()
    }

    /// SAM; its image encoder is what is used here, the head has its own refiner.
    pub fn sam(&self) -> &Sam {
        &self.sam
    }

    /// The trained part.
    pub fn head(&self) -> &GroundingHead {
        &self.head
    }

    /// Begins a conversation about `picture`.
    pub fn start(&self, picture: &RgbImage) -> Result<Session> {
        self.start_with([picture])
    }

    /// Begins a conversation about several pictures, which [`Turn::show`] and [`GroundOptions::image`] count from 0.
    ///
    /// Fails with [`Error::Request`] for a model that takes one picture ([`lmm::LmmSpec::several_images`]).
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

    /// Reads `caption` as if the model had said it about `picture`, and keeps what grounding needs.
    ///
    /// One teacher-forced pass over the grounding prompt and the caption (`spec/pipeline.md` §2). Nothing of the
    /// result can be differentiated.
    pub fn observe(&self, picture: &RgbImage, caption: &Caption) -> Result<Observation> {
        self.observe_in(&mut self.start(picture)?, &[Turn::user(GROUNDING_INSTRUCTION)], caption)
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
        let capture = self.read_caption(session, prompt, &mut caption)?;
        self.observation(session, image, &capture, caption.phrases()?)
    }

    /// Mask logits of every phrase observed; differentiable in the head.
    pub fn decode(&self, observation: &Observation) -> Result<MaskLogits> {
        self.head.decode(observation)
    }

    /// Binary masks `(refined, coarse)` of every phrase at the picture's own size: logits above 0
    /// (`spec/pipeline.md` §6).
    pub fn segment(&self, observation: &Observation) -> Result<Vec<(Mask, Mask)>> {
        self.binarise(&self.decode(observation)?, observation)
    }

    /// As [`Grounder::segment`], from logits that are at hand.
    pub fn binarise(&self, logits: &MaskLogits, observation: &Observation) -> Result<Vec<(Mask, Mask)>> {
        let (height, width) = observation.sam_geometry.original;
        let coarse = bilinear(&logits.coarse.unsqueeze(0)?, height, width)?.squeeze(0)?;
        Ok(binary(&logits.refined)?.into_iter().zip(binary(&coarse)?).collect())
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
        let (sam_embedding, sam_geometry) = session.sam(&self.sam, image)?;
        let rows = capture.positions();
        let positions: Vec<Vec<usize>> =
            phrases.iter().map(|phrase| phrase.iter().map(|token| rows.start + token).collect()).collect();
        let input = session.input(image)?;
        let maps = capture.phrase_maps(&session.cache, &input.layout, &positions, Merge::Mean)?;
        let hidden = capture.hidden_rows(&rows.collect::<Vec<_>>())?;
        Ok(Observation { maps, hidden, phrases, geometry: input.geometry, sam_embedding, sam_geometry })
    }

    /// Grounds `spans` and adds them to `result`.
    fn ground_spans(
        &self,
        session: &mut Session,
        capture: &Capture,
        result: &mut GroundedAnswer,
        spans: &[Span],
        probs: Option<&[f32]>,
        options: &GroundOptions,
    ) -> Result<()> {
        if spans.is_empty() {
            return Ok(());
        }
        let clock = Instant::now();
        session.sam(&self.sam, options.image)?;
        result.timings.encode = clock.elapsed();
        let clock = Instant::now();
        let phrases = spans.iter().map(|span| span.tokens.clone().collect()).collect();
        let observation = self.observation(session, options.image, capture, phrases)?;
        let chars: Vec<char> = result.answer.chars().collect();
        for (number, (span, (mask, coarse_mask))) in spans.iter().zip(self.segment(&observation)?).enumerate()
        {
            let score = |probs: &[f32]| probs.iter().sum::<f32>() / probs.len() as f32;
            result.phrases.push(GroundedPhrase {
                text: chars[span.chars.clone()].iter().collect(),
                start: span.chars.start,
                end: span.chars.end,
                tokens: (span.tokens.start, span.tokens.end),
                score: probs.map_or(1.0, |probs| score(&probs[span.tokens.clone()])),
                mask,
                coarse_mask,
                maps: if options.keep_maps { Some(observation.maps.get(number)?) } else { None },
            });
        }
        result.timings.segment = clock.elapsed();
        Ok(())
    }
}

/// Logits `[N, H, W]` above 0, one mask per phrase.
fn binary(logits: &Tensor) -> Result<Vec<Mask>> {
    (0..logits.dim(0)?).map(|phrase| Mask::from_logits(&logits.get(phrase)?)).collect()
}
