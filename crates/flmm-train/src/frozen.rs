//! The frozen models of a run, opened when a sample first needs them: a complete feature cache never does.

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock, PoisonError};

use candle_core::Tensor;
use flmm::grounder::{GroundingHead, HeadSizes, RefinerKind};
use flmm::lmm::{self, LmmSpec};
use flmm::sam::{Sam, SamConfig, read_checkpoint};
use flmm::weights::{Params, fingerprint, rehearse};
use flmm::{Grounder, Result, capture, vision};
use flmm_data::ImageStore;
use serde_json::json;

use crate::cache::{CacheKey, MapValues, Rows, Values};
use crate::config::Config;
use crate::head::HeadSample;
use crate::mixture::Mixture;
use crate::observed::Observed;
use crate::run::Models;
use crate::samples::Samples;
use crate::selector::SelectorSample;

/// The models, and what is known of them without opening them.
pub(crate) struct Frozen {
    models: Models,
    /// What a head must fit.
    pub(crate) sizes: HeadSizes,
    /// The LMM, by its configuration.
    pub(crate) spec: LmmSpec,
    refiner: RefinerKind,
    grounder: OnceLock<Grounder>,
    opening: Mutex<()>,
}

impl Frozen {
    /// Reads configurations; no weight of the LMM is read. `sam` are the sizes of SAM, which is not opened either if
    /// there is no `refiner`.
    pub(crate) fn new(models: &Models, sam: SamConfig, refiner: RefinerKind) -> Result<Self> {
        let (opened, _) = rehearse(|| lmm::open_with(&models.lmm, &models.options));
        let opened = opened?;
        let spec = *opened.spec();
        let sizes = HeadSizes::of(opened.as_ref(), sam);
        let (grounder, opening) = (OnceLock::new(), Mutex::new(()));
        Ok(Self { models: models.clone(), sizes, spec, refiner, grounder, opening })
    }

    /// The models, opened now if they were not. Their head says nothing.
    pub(crate) fn grounder(&self) -> Result<&Grounder> {
        // Other threads wait instead of opening them once more.
        let _opening = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(grounder) = self.grounder.get() {
            return Ok(grounder);
        }
        let Models { lmm, sam, options, .. } = &self.models;
        let lmm = lmm::open_with(lmm, options)?;
        let head = GroundingHead::blank(&self.sizes, &options.device)?;
        let grounder = match self.refiner {
            RefinerKind::None => Grounder::without_sam(lmm, head),
            RefinerKind::Sam => {
                let (_, tensors) = read_checkpoint(sam, &options.device)?;
                let params = Params::new(sam, tensors);
                let opened = Sam::load(&self.sizes.sam, &params)?;
                params.finish("give a SAM checkpoint")?;
                Grounder::from_parts(lmm, opened, head)
            }
        };
        Ok(self.grounder.get_or_init(|| grounder))
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
        (values, maps): (Values, MapValues),
    ) -> Result<CacheKey> {
        let Models { sam, options, .. } = &self.models;
        let sam_revision = match self.refiner {
            RefinerKind::Sam => fingerprint(sam)?,
            RefinerKind::None => "none".to_owned(),
        };
        let towers = [&options.vision_tower, &options.vision_tower_aux];
        let towers =
            towers.into_iter().flatten().map(|tower| fingerprint(tower)).collect::<Result<Vec<_>>>()?;
        Ok(CacheKey {
            lmm: self.spec.name.to_owned(),
            lmm_revision: self.revision()?,
            lmm_dtype: format!("{:?}", options.dtype).to_lowercase(),
            sam_revision,
            preprocessing: vision::preprocess::VERSION,
            capture: capture::VERSION,
            prompt: mixture.narrative_instruction(&self.spec).to_owned(),
            data: json!({
                "expressions": config.data.expressions,
                "empty_narratives": config.data.empty_narratives,
                "seed": config.train.seed,
                "image_size": options.image_size,
                "vision_towers": towers,
            }),
            values,
            maps,
            rows: if config.head.selector.is_some() { Rows::All } else { Rows::Phrases },
        })
    }
}

/// The samples of a [`Mixture`] as the frozen models see them.
pub(crate) struct Seen<'a> {
    pub(crate) frozen: &'a Frozen,
    pub(crate) mixture: &'a Mixture,
    pub(crate) images: &'a ImageStore,
}

impl Seen<'_> {
    fn observed(&self) -> Result<Observed<'_>> {
        Ok(Observed { grounder: self.frozen.grounder()?, mixture: self.mixture, images: self.images })
    }
}

impl Samples<HeadSample> for Seen<'_> {
    fn len(&self) -> usize {
        self.mixture.len()
    }

    fn sample(&self, index: usize, epoch: u64) -> Result<HeadSample> {
        self.observed()?.sample(index, epoch)
    }

    fn key(&self, index: usize, epoch: u64) -> String {
        self.mixture.key(index, epoch)
    }
}

impl Samples<SelectorSample> for Seen<'_> {
    fn len(&self) -> usize {
        self.mixture.len()
    }

    fn sample(&self, index: usize, epoch: u64) -> Result<SelectorSample> {
        self.observed()?.sample(index, epoch)
    }

    fn key(&self, index: usize, epoch: u64) -> String {
        self.mixture.key(index, epoch)
    }
}

/// Sizes and tensors of SAM; the published sizes and nothing where there is no refiner.
pub(crate) fn sam_of(models: &Models, refiner: RefinerKind) -> Result<(SamConfig, HashMap<String, Tensor>)> {
    match refiner {
        RefinerKind::Sam => read_checkpoint(&models.sam, &models.options.device),
        RefinerKind::None => Ok((SamConfig::vit_l(), HashMap::new())),
    }
}
