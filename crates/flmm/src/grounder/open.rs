//! Opening a model from its parts.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};

use super::head::{self, load_head_tensors};
use super::{Grounder, GroundingHead, HeadSettings, HeadSizes, RefinerKind, overlay};
use crate::error::Result;
use crate::lmm::{self, OpenOptions};
use crate::sam::{Sam, SamConfig, read_checkpoint};
use crate::training_free::TrainingFree;
use crate::weights::Params;

/// Where the three parts of a model lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelPaths {
    /// The LMM: a Hugging Face folder.
    pub model: PathBuf,
    /// SAM: a checkpoint file, or a folder with one.
    pub sam: PathBuf,
    /// The grounding head: a folder with `head.safetensors`, or a released `.safetensors` or `.pth` file. `None`: masks
    /// are made without one ([`crate::training_free`]).
    pub head: Option<PathBuf>,
}

impl ModelPaths {
    /// A bundle: one folder with `lmm/`, `sam/` and `head/`.
    pub fn bundle(dir: &Path) -> Self {
        Self { model: dir.join("lmm"), sam: dir.join("sam"), head: Some(dir.join("head")) }
    }
}

impl Grounder {
    /// Opens the three parts. The LMM computes in `dtype`; SAM and the head in f32.
    ///
    /// Public SAM tensors are loaded first, the head's are laid over them (`spec/pipeline.md` §7).
    ///
    /// # Errors
    /// [`Error::Weights`](crate::Error::Weights) with every missing, misshapen or unexpected tensor of a part,
    /// [`Error::Config`](crate::Error::Config).
    pub fn open(paths: &ModelPaths, device: &Device, dtype: DType) -> Result<Self> {
        Self::open_with(paths, &OpenOptions::new(dtype, device))
    }

    /// As [`Grounder::open`], with what else the LMM's family may need.
    pub fn open_with(paths: &ModelPaths, options: &OpenOptions) -> Result<Self> {
        let device = &options.device;
        let Some(head) = &paths.head else {
            return Self::open_without_head(paths, options);
        };
        let settings = HeadSettings::read(head)?;
        let (config, sam_tensors) = match settings.refiner {
            RefinerKind::Sam => read_checkpoint(&paths.sam, device)?,
            RefinerKind::None => (SamConfig::vit_l(), HashMap::new()),
        };
        let tensors = overlay(head, &sam_tensors, load_head_tensors(head, device)?)?;
        drop(sam_tensors);
        let params = Params::new(head, tensors);
        // SAM comes first: what it is read from is given up before the LMM takes its memory.
        let sam = match settings.refiner {
            RefinerKind::Sam => {
                let params = params.pp("sam.model");
                let sam = Sam::load(&config, &params)?.with_image_encoder_in(options.sam_dtype)?;
                params.pp("image_encoder").give_up()?;
                Some(sam)
            }
            RefinerKind::None => None,
        };
        let lmm = lmm::open_with(&paths.model, options)?;
        let sizes = HeadSizes::of(lmm.as_ref(), config);
        let head = GroundingHead::from_params_as(&sizes, &settings, &params)?;
        params.finish(head::WRONG_HEAD)?;
        Ok(Self { lmm, sam, head, training_free: None })
    }

    /// Masks come from attention and SAM alone.
    fn open_without_head(paths: &ModelPaths, options: &OpenOptions) -> Result<Self> {
        let device = &options.device;
        let sam = Sam::open(&paths.sam, device)?.with_image_encoder_in(options.sam_dtype)?;
        let lmm = lmm::open_with(&paths.model, options)?;
        let head = GroundingHead::blank(&HeadSizes::of(lmm.as_ref(), sam.config().clone()), device)?;
        let training_free = TrainingFree::new(sam.refiner().clone());
        Ok(Self { lmm, sam: Some(sam), head, training_free: Some(training_free) })
    }
}
