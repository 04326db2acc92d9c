//! The facade: observe → decode → segment.
//!
//! [`Grounder::observe`] runs the frozen models once and keeps what grounding needs. [`Grounder::decode`] turns
//! that into mask logits and is differentiable in the head. [`Grounder::segment`] makes binary masks. Answering,
//! grounding a given text, training and evaluation all go through these three.

mod answer;
mod caption;
mod head;
mod session;
mod settings;
mod spans;

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use image::RgbImage;

use crate::capture::Capture;
use crate::error::{Error, Result};
use crate::layout::Merge;
use crate::lmm::{self, GROUNDING_INSTRUCTION, Lmm, OpenOptions, Turn};
use crate::masks::Mask;
use crate::nn::bilinear;
use crate::phrases::{PhraseChoice, find_phrases, noun_phrases};
use crate::sam::{Sam, SamConfig, SamGeometry, read_checkpoint};
use crate::text::sampling::Sampler;
use crate::text::stream::TextStream;
use crate::text::{Limits, generate};
use crate::training_free::{TrainingFree, TrainingFreeOptions};
use crate::weights::Params;

use spans::Span;

pub use answer::{
    AnswerOptions, GroundOptions, GroundedAnswer, GroundedPhrase, MaskLogits, Observation, Sampling, Timings,
};
pub use caption::Caption;
pub use head::{GroundingHead, HeadSizes, SAM_PREFIX, overlay};
pub use session::Session;
pub use settings::{HeadSettings, RefinerKind};

/// Where the three parts of a model lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelPaths {
    /// The LMM: a Hugging Face folder.
    pub model: PathBuf,
    /// SAM: a checkpoint file, or a folder with one.
    pub sam: PathBuf,
    /// The grounding head: a folder with `head.safetensors`, or a released `.safetensors` or `.pth` file; or
    /// [`NO_HEAD`].
    pub head: PathBuf,
}

/// In the place of a head's path: masks are made without one ([`crate::training_free`]).
pub const NO_HEAD: &str = "none";

impl ModelPaths {
    /// A bundle: one folder with `lmm/`, `sam/` and `head/`.
    pub fn bundle(dir: &Path) -> Self {
        Self { model: dir.join("lmm"), sam: dir.join("sam"), head: dir.join("head") }
    }
}

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
        if paths.head.as_os_str() == NO_HEAD {
            return Self::open_without_head(lmm, &paths.sam, device);
        }
        let settings = HeadSettings::read(&paths.head)?;
        let (sam, sam_tensors) = match settings.refiner {
            RefinerKind::Sam => read_checkpoint(&paths.sam, device)?,
            RefinerKind::None => (SamConfig::vit_l(), HashMap::new()),
        };
        let sizes = HeadSizes {
            channels: lmm.spec().channels,
            layers: lmm.spec().layers,
            hidden_size: lmm.decoder().config().hidden_size,
            sam,
        };
        let tensors = overlay(&paths.head, &sam_tensors, head::load_head_tensors(&paths.head, device)?)?;
        let params = Params::new(&paths.head, tensors);
        let head = GroundingHead::from_params_as(&sizes, &settings, &params)?;
        let sam = match settings.refiner {
            RefinerKind::Sam => Some(Sam::load(&sizes.sam, &params.pp("sam.model"))?),
            RefinerKind::None => None,
        };
        params.finish(head::WRONG_HEAD)?;
        Ok(Self { lmm, sam, head, training_free: None })
    }

    /// Masks come from attention and the SAM at `sam` alone.
    fn open_without_head(lmm: Box<dyn Lmm>, sam: &Path, device: &Device) -> Result<Self> {
        let sam = Sam::open(sam, device)?;
        let sizes = HeadSizes {
            channels: lmm.spec().channels,
            layers: lmm.spec().layers,
            hidden_size: lmm.decoder().config().hidden_size,
            sam: sam.config().clone(),
        };
        let training_free = TrainingFree::new(sam.refiner().clone(), TrainingFreeOptions::default());
        let head = GroundingHead::blank(&sizes, device)?;
        Ok(Self { lmm, sam: Some(sam), head, training_free: Some(training_free) })
    }

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
        Session::new(self.lmm(), picture)
    }

    /// Reads `caption` as if the model had said it about `picture`, and keeps what grounding needs.
    ///
    /// One teacher-forced pass over the grounding prompt and the caption (`spec/pipeline.md` §2). Nothing of the
    /// result can be differentiated.
    pub fn observe(&self, picture: &RgbImage, caption: &Caption) -> Result<Observation> {
        self.observe_in(&mut self.start(picture)?, &[Turn::user(GROUNDING_INSTRUCTION)], caption)
    }

    /// As [`Grounder::observe`], behind the prompt of any conversation, and reusing what the session has read.
    pub fn observe_in(
        &self,
        session: &mut Session,
        turns: &[Turn],
        caption: &Caption,
    ) -> Result<Observation> {
        caption.phrases()?;
        let mut caption = caption.clone();
        let capture = self.read_caption(session, turns, &mut caption)?;
        self.encode(session)?;
        self.observation(session, &capture, caption.phrases()?)
    }

    /// Hidden states `[L, T, D]` of the tokens of `caption`, read as in [`Grounder::observe_in`]: what the keyword
    /// selector needs, without SAM and without attention maps. The caption may have no phrase at all.
    pub fn hidden_in(&self, session: &mut Session, turns: &[Turn], caption: &Caption) -> Result<Tensor> {
        let capture = self.read_caption(session, turns, &mut caption.clone())?;
        capture.hidden_rows(&capture.positions().collect::<Vec<_>>())
    }

    /// Mask logits of every phrase observed; differentiable in the head.
    pub fn decode(&self, observation: &Observation) -> Result<MaskLogits> {
        match &self.training_free {
            Some(training_free) => training_free.decode(observation),
            None => self.head.decode(observation),
        }
    }

    /// Binary masks `(refined, coarse)` of every phrase at the picture's own size: logits above 0
    /// (`spec/pipeline.md` §6).
    pub fn segment(&self, observation: &Observation) -> Result<Vec<(Mask, Mask)>> {
        let logits = self.decode(observation)?;
        let (height, width) = observation.sam_geometry.original;
        let coarse = bilinear(&logits.coarse.unsqueeze(0)?, height, width)?.squeeze(0)?;
        Ok(binary(&logits.refined)?.into_iter().zip(binary(&coarse)?).collect())
    }

    /// Answers the last of `turns` about `picture`. See [`Grounder::ask`].
    pub fn answer(
        &self,
        picture: &RgbImage,
        turns: &[Turn],
        options: &AnswerOptions,
    ) -> Result<GroundedAnswer> {
        let mut session = self.start(picture)?;
        session.turns = turns.to_vec();
        self.reply(&mut session, options, &mut |_| {})
    }

    /// Asks the next question of a conversation and adds question and answer to it. On an error the
    /// conversation is as before.
    pub fn ask(
        &self,
        session: &mut Session,
        question: &str,
        options: &AnswerOptions,
    ) -> Result<GroundedAnswer> {
        let before = session.turns.len();
        session.turns.push(Turn::user(question));
        let answer = self.reply(session, options, &mut |_| {});
        match &answer {
            Ok(answer) => session.turns.push(Turn::assistant(&answer.answer)),
            Err(_) => session.turns.truncate(before),
        }
        answer
    }

    /// Generates the answer to the session's last turn and grounds its phrases; the turns stay as they are.
    ///
    /// Attention rows are kept while generating, no second pass is made. The last token, normally the stop word,
    /// is dropped from the text: it is never fed back, so it has no row (`spec/models.md` §12). `on_text`
    /// receives the text as it grows, piece by piece.
    pub fn reply(
        &self,
        session: &mut Session,
        options: &AnswerOptions,
        on_text: &mut dyn FnMut(&str),
    ) -> Result<GroundedAnswer> {
        let mut timings = Timings::default();
        let clock = Instant::now();
        let turns = session.turns.clone();
        let prompt = session.prompt(self.lmm(), &turns)?;
        let mut capture = options.phrases.is_some().then(|| Capture::from_position(prompt.len()));
        let hidden = session.read(self.lmm(), &prompt, capture.as_mut())?;
        timings.read = clock.elapsed();

        let clock = Instant::now();
        let mut sampler = match options.sampling {
            Sampling::Greedy => Sampler::greedy(),
            Sampling::Seeded { temperature, top_p, seed } => Sampler::seeded(temperature, top_p, seed),
        };
        let limits = Limits { max_new_tokens: options.max_new_tokens, stop_ids: self.lmm.stop_ids() };
        let tokenizer = self.lmm.tokenizer();
        // Told one token late: the last token is not part of the answer.
        let mut stream = TextStream::new(tokenizer, false);
        let mut late = None;
        let mut ids = generate(
            self.lmm.decoder(),
            &hidden,
            &mut session.cache,
            capture.as_mut(),
            limits,
            &mut sampler,
            |id, _| {
                if let Some(id) = late.replace(id) {
                    tell(&stream.push(id), on_text);
                }
                ControlFlow::Continue(())
            },
        )?;
        tell(&stream.finish(), on_text);
        ids.pop();
        session.continued(&ids);
        timings.generate = clock.elapsed();

        let (answer, offsets) = spans::token_offsets(tokenizer, &ids);
        let mut result = GroundedAnswer { answer, token_ids: ids, phrases: Vec::new(), timings };
        if let (Some(choice), Some(capture)) = (&options.phrases, &capture)
            && !result.token_ids.is_empty()
        {
            let positions: Vec<usize> = capture.positions().collect();
            let probs = self.head.keyword_probs(&capture.hidden_rows(&positions)?)?;
            let lambda = options.ground.keyword_threshold;
            let spans = spans::select(choice, &result.answer, &offsets, probs.as_deref(), lambda)?;
            self.ground_spans(session, capture, &mut result, &spans, probs.as_deref(), &options.ground)?;
        }
        Ok(result)
    }

    /// Grounds phrases of a given `text`, read as if the model had said it about `picture`.
    ///
    /// Given phrases and noun phrases are encoded segment by segment, as in training; with the keyword selector
    /// the text is encoded in one piece.
    pub fn ground(
        &self,
        picture: &RgbImage,
        text: &str,
        choice: &PhraseChoice,
        options: &GroundOptions,
    ) -> Result<GroundedAnswer> {
        self.ground_in(&mut self.start(picture)?, text, choice, options)
    }

    /// As [`Grounder::ground`], for a session: other texts about its picture reuse what is already computed.
    pub fn ground_in(
        &self,
        session: &mut Session,
        text: &str,
        choice: &PhraseChoice,
        options: &GroundOptions,
    ) -> Result<GroundedAnswer> {
        if text.trim().is_empty() {
            return Err(Error::request(
                "the text to ground is empty",
                "give a text that describes the picture",
            ));
        }
        let tokenizer = self.lmm.tokenizer();
        let ranges = match choice {
            PhraseChoice::Keywords if self.head.keyword_selector.is_some() => None,
            PhraseChoice::Keywords | PhraseChoice::NounPhrases => Some(noun_phrases(text)),
            PhraseChoice::Given(phrases) => Some(find_phrases(text, phrases)?),
        };
        let mut caption = match &ranges {
            Some(ranges) if !spans::overlapping(ranges) => Caption::from_ranges(tokenizer, text, ranges)?,
            _ => Caption::from_segments(tokenizer, [(text, None)])?,
        };
        let clock = Instant::now();
        let capture = self.read_caption(session, &[Turn::user(GROUNDING_INSTRUCTION)], &mut caption)?;
        let timings = Timings { read: clock.elapsed(), ..Timings::default() };

        let positions: Vec<usize> = capture.positions().collect();
        let probs = self.head.keyword_probs(&capture.hidden_rows(&positions)?)?;
        let mut result = GroundedAnswer {
            answer: text.to_owned(),
            token_ids: caption.token_ids.clone(),
            phrases: Vec::new(),
            timings,
        };
        let spans = match &ranges {
            Some(ranges) if !spans::overlapping(ranges) => {
                let phrases = caption.phrases()?;
                let spans = ranges.iter().zip(&phrases).map(|(chars, tokens)| Span {
                    chars: chars.clone(),
                    tokens: tokens[0]..tokens[0] + tokens.len(),
                });
                spans.collect()
            }
            _ => {
                let (text, offsets) = spans::token_offsets(tokenizer, &caption.token_ids);
                result.answer = text;
                spans::select(choice, &result.answer, &offsets, probs.as_deref(), options.keyword_threshold)?
            }
        };
        self.ground_spans(session, &capture, &mut result, &spans, probs.as_deref(), options)?;
        Ok(result)
    }

    /// Reads prompt and caption; the capture holds the caption's rows. A caption that is too long for a model that
    /// cuts sequences off is cut.
    fn read_caption(&self, session: &mut Session, turns: &[Turn], caption: &mut Caption) -> Result<Capture> {
        if caption.token_ids.is_empty() {
            return Err(Error::request(
                "the text to ground has no tokens",
                "give a text that describes the picture",
            ));
        }
        let mut ids = session.prompt(self.lmm(), turns)?;
        if let Some(limit) = self.lmm.reads_at_most() {
            caption.cut(limit.saturating_sub(ids.len()))?;
        }
        let mut capture = Capture::from_position(ids.len());
        ids.extend_from_slice(&caption.token_ids);
        session.read(self.lmm(), &ids, Some(&mut capture))?;
        Ok(capture)
    }

    /// SAM's image embedding, once per session.
    fn encode(&self, session: &mut Session) -> Result<()> {
        if session.sam.is_none() {
            session.sam = Some(match &self.sam {
                Some(sam) => sam.encode_image(&session.picture)?,
                None => {
                    let picture = &session.picture;
                    let original = (picture.height() as usize, picture.width() as usize);
                    let geometry = SamGeometry::new(original, SamConfig::vit_l().image_size);
                    (Tensor::zeros((1, 0, 0, 0), DType::F32, &Device::Cpu)?, geometry)
                }
            });
        }
        Ok(())
    }

    /// What the session has seen of the text whose rows are in `capture`; `phrases` are token numbers.
    fn observation(
        &self,
        session: &Session,
        capture: &Capture,
        phrases: Vec<Vec<usize>>,
    ) -> Result<Observation> {
        let rows = capture.positions();
        let positions: Vec<Vec<usize>> =
            phrases.iter().map(|phrase| phrase.iter().map(|token| rows.start + token).collect()).collect();
        let maps = capture.phrase_maps(&session.cache, session.layout(), &positions, Merge::Mean)?;
        let hidden = capture.hidden_rows(&rows.collect::<Vec<_>>())?;
        let Some((sam_embedding, sam_geometry)) = session.sam.clone() else {
            return Err(candle_core::Error::Msg("the picture is not encoded yet".into()).into());
        };
        let geometry = session.image.geometry;
        Ok(Observation { maps, hidden, phrases, geometry, sam_embedding, sam_geometry })
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
        self.encode(session)?;
        result.timings.encode = clock.elapsed();
        let clock = Instant::now();
        let phrases = spans.iter().map(|span| span.tokens.clone().collect()).collect();
        let observation = self.observation(session, capture, phrases)?;
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

fn tell(text: &str, on_text: &mut dyn FnMut(&str)) {
    if !text.is_empty() {
        on_text(text);
    }
}

/// Logits `[N, H, W]` above 0, one mask per phrase.
fn binary(logits: &Tensor) -> Result<Vec<Mask>> {
    (0..logits.dim(0)?).map(|phrase| Mask::from_logits(&logits.get(phrase)?)).collect()
}
