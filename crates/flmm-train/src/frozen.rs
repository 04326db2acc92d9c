//! The frozen models of a run, opened when a sample first needs them: a complete feature cache never does.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use candle_core::{Device, Tensor};
use flmm::grounder::{GroundingHead, HeadSizes, RefinerKind};
use flmm::lmm::{self, LmmSpec};
use flmm::sam::{Sam, SamConfig, read_checkpoint};
use flmm::weights::{Params, fingerprint, rehearse};
use flmm::{Error, Grounder, Result, capture, vision};
use serde_json::json;

use crate::cache::{CacheKey, MapValues, Rows, Values};
use crate::config::Config;
use crate::digest;
use crate::mixture::{DataRevision, Mixture};
use crate::run::Models;

/// The LMM and SAM's image encoder, and what is known of them without opening the LMM.
pub struct Frozen {
    models: Models,
    /// What a head must fit.
    pub(crate) sizes: HeadSizes,
    /// The LMM, by its configuration.
    pub(crate) spec: LmmSpec,
    /// SAM, unless the head has no refiner.
    pub(crate) sam: Option<FrozenSam>,
    grounder: OnceLock<Grounder>,
    /// Held by the thread that opens the models.
    opening: Mutex<()>,
}

/// A SAM checkpoint that has been read.
pub(crate) struct FrozenSam {
    /// Where it lies.
    path: PathBuf,
    /// Tensors of prompt encoder and mask decoder under their public names, which a fresh head begins with.
    pub(crate) refiner: HashMap<String, Tensor>,
    /// Digest of the neck of the image encoder, which tells states of the encoder apart.
    pub(crate) digest: String,
    /// All tensors, until the models are opened or it is known that they never will be.
    tensors: Mutex<Option<HashMap<String, Tensor>>>,
}

impl FrozenSam {
    fn read(path: &Path, models: &Models) -> Result<(SamConfig, Self)> {
        let (config, tensors) = read_checkpoint(path, &models.options.device)?;
        let named = |prefixes: &'static [&str]| {
            tensors.iter().filter(|(name, _)| prefixes.iter().any(|prefix| name.starts_with(prefix)))
        };
        let refiner = named(&["prompt_encoder.", "mask_decoder."]);
        let refiner = refiner.map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
        let neck = named(&["image_encoder.neck."]).map(|(name, tensor)| (name.as_str(), tensor));
        let digest = digest::tensors(neck)?;
        Ok((config, Self { path: path.to_owned(), refiner, digest, tensors: Mutex::new(Some(tensors)) }))
    }

    fn tensors(&self) -> MutexGuard<'_, Option<HashMap<String, Tensor>>> {
        self.tensors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The whole of it, from the tensors that were read before if they are still there.
    fn open(&self, config: &SamConfig, models: &Models) -> Result<Sam> {
        let kept = self.tensors().take();
        let tensors = match kept {
            Some(tensors) => tensors,
            None => read_checkpoint(&self.path, &models.options.device)?.1,
        };
        let params = Params::new(&self.path, tensors);
        let sam = Sam::load(config, &params)?;
        params.finish("give a SAM checkpoint")?;
        Ok(sam)
    }
}

impl Frozen {
    /// Reads the LMM's configuration, none of its weights, and SAM's checkpoint if `config` has a refiner.
    ///
    /// # Errors
    /// [`Error::Request`] if the configuration is for another LMM, or SAM is needed and not given; what opening models
    /// gives.
    pub fn new(config: &Config, models: &Models) -> Result<Self> {
        let (opened, _) = rehearse(|| lmm::open_with(&models.lmm, &models.options));
        let opened = opened?;
        let spec = *opened.spec();
        if let Some(wanted) = &config.model.lmm
            && wanted != spec.name
        {
            let what =
                format!("the configuration is for {wanted}, but `{}` is {}", models.lmm.display(), spec.name);
            let hint = "choose the configuration of this LMM, or the LMM of this configuration";
            return Err(Error::request(what, hint));
        }
        let (sizes, sam) = match (config.head.refiner.unwrap_or_default(), &models.sam) {
            (RefinerKind::Sam, Some(path)) => {
                let (sizes, sam) = FrozenSam::read(path, models)?;
                (sizes, Some(sam))
            }
            (RefinerKind::Sam, None) => {
                let hint = "give a SAM checkpoint, or train without a refiner (`head.refiner = \"none\"`)";
                return Err(Error::request("the head refines its masks with SAM, and there is none", hint));
            }
            // A head without a refiner fits any.
            (RefinerKind::None, _) => (SamConfig::vit_l(), None),
        };
        let sizes = HeadSizes::of(opened.as_ref(), sizes);
        let (grounder, opening) = (OnceLock::new(), Mutex::new(()));
        Ok(Self { models: models.clone(), sizes, spec, sam, grounder, opening })
    }

    /// Where the models compute, and the head that is trained on what they see.
    pub(crate) fn device(&self) -> &Device {
        &self.models.options.device
    }

    /// The models, opened now if they were not. Their head says nothing.
    ///
    /// # Errors
    /// [`Error::Weights`] whatever is wrong with their files: it is not the fault of the sample that needs them.
    pub fn grounder(&self) -> Result<&Grounder> {
        // Other threads wait instead of opening them once more.
        let _opening = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(grounder) = self.grounder.get() {
            return Ok(grounder);
        }
        let grounder = self.open().map_err(|error| match error {
            Error::Config { file, what, hint } => Error::Weights { file, what, hint },
            Error::Io { path, source } => {
                Error::weights(path, source.to_string(), "the model's folder has changed since the run began")
            }
            Error::Request { what, hint } => Error::weights(&self.models.lmm, what, hint),
            other => other,
        })?;
        Ok(self.grounder.get_or_init(|| grounder))
    }

    fn open(&self) -> Result<Grounder> {
        let Models { lmm, options, .. } = &self.models;
        let lmm = lmm::open_with(lmm, options)?;
        let head = GroundingHead::blank(&self.sizes, &options.device)?;
        Ok(match &self.sam {
            None => Grounder::without_sam(lmm, head),
            Some(sam) => Grounder::from_parts(lmm, sam.open(&self.sizes.sam, &self.models)?, head),
        })
    }

    /// Frees the tensors that are kept for opening the models. They can still be opened, and are read anew then.
    pub(crate) fn release(&self) {
        if let Some(sam) = &self.sam {
            sam.tensors().take();
        }
    }

    /// Whether the models were opened.
    #[cfg(test)]
    pub(crate) fn is_open(&self) -> bool {
        self.grounder.get().is_some()
    }

    /// Tells states of the LMM's files apart.
    pub(crate) fn revision(&self) -> Result<String> {
        fingerprint(&self.models.lmm)
    }

    /// What the numbers of a feature cache depend on.
    pub(crate) fn cache_key(
        &self,
        config: &Config,
        mixture: &Mixture,
        revision: &DataRevision,
        (values, maps): (Values, MapValues),
    ) -> Result<CacheKey> {
        let options = &self.models.options;
        let sam_revision = match &self.sam {
            Some(sam) => fingerprint(&sam.path)?,
            None => "none".to_owned(),
        };
        Ok(CacheKey {
            lmm: self.spec.name.to_owned(),
            lmm_revision: self.revision()?,
            lmm_dtype: options.numbers().to_owned(),
            sam_revision,
            preprocessing: vision::preprocess::VERSION,
            capture: capture::VERSION,
            prompt: mixture.narrative_instruction(&self.spec).to_owned(),
            annotations: revision.annotations.clone(),
            data: json!({
                "expressions": config.data.expressions,
                "empty_narratives": config.data.empty_narratives,
                "seed": config.train.seed,
                "image_size": options.image_size,
                "vision_towers": self.towers()?,
            }),
            values,
            maps,
            rows: if config.head.selector.is_some() { Rows::All } else { Rows::Phrases },
        })
    }

    /// Fingerprints of the vision towers that lie apart from the LMM.
    pub(crate) fn towers(&self) -> Result<Vec<String>> {
        let options = &self.models.options;
        let towers = [&options.vision_tower, &options.vision_tower_aux];
        towers.into_iter().flatten().map(|tower| fingerprint(tower)).collect()
    }
}
