//! Which models a head is trained with.

use std::path::{Path, PathBuf};

use candle_core::Device;
use clap::{Args, ValueEnum};
use flmm::grounder::{ModelPaths, RefinerKind};
use flmm::hub::Hub;
use flmm::lmm::OpenOptions;
use flmm_train::Models;
use flmm_train::config::Config;

use crate::args::{DeviceArgs, Precision};
use crate::embedded;
use crate::failure::{Failure, Result};
use crate::fetch::{self, Named, Part, named};
use crate::model::{SAM_SOURCE, head_part, is_bundle, refiner_of, sam_part};
use crate::talk::Talk;

#[derive(Debug, Args)]
#[command(next_help_heading = "Models")]
pub(crate) struct ModelsArgs {
    /// LMM in the Hugging Face layout, or a bundle: a folder, or a repository of the Hugging Face hub
    /// [default: the configuration's, else the embedded flmm-tiny].
    #[arg(long, value_name = "DIR|REPO")]
    model: Option<PathBuf>,
    /// SAM checkpoint (.pth or .safetensors): a file, or one of the Hugging Face hub as org/name:file
    /// [default: the bundle's, or the configuration's].
    #[arg(long, value_name = "FILE|REPO")]
    sam: Option<PathBuf>,
    /// Grounding head to begin from: a folder or file, or of the Hugging Face hub as org/name or org/name:path
    /// [default: a fresh one].
    #[arg(long, value_name = "DIR|REPO")]
    head: Option<PathBuf>,
    /// Vision tower of a Mini-Gemini [default: looked for inside and beside the model's folder].
    #[arg(long, value_name = "DIR")]
    vision_tower: Option<PathBuf>,
    /// Second vision tower of a Mini-Gemini [default: as --vision-tower].
    #[arg(long, value_name = "DIR")]
    vision_tower_aux: Option<PathBuf>,
    /// Side of the picture an HPT sees, in pixels [default: the published one].
    #[arg(long, value_name = "PIXELS")]
    image_size: Option<usize>,
    /// Numbers the LMM computes with [default: the configuration's].
    #[arg(long, value_name = "TYPE", value_enum)]
    dtype: Option<Precision>,
    #[command(flatten)]
    device: DeviceArgs,
}

impl ModelsArgs {
    /// The setting of the configuration that `--dtype` stands for.
    pub(crate) fn setting(&self) -> Option<String> {
        Some(format!("model.dtype={}", self.dtype?.to_possible_value()?.get_name()))
    }

    /// Where to compute. Every call opens the device anew: what is to work together needs one call.
    pub(crate) fn device(&self) -> Result<Device> {
        self.device.open()
    }

    /// Where the models lie; what is on the hub is downloaded. Nothing is, if a part is missing.
    pub(crate) fn bring(&self, config: &Config, device: &Device, talk: &Talk) -> Result<Models> {
        let head = self.head.as_deref().map(head_part).transpose()?;
        let sam = match needs_sam(config, head.as_ref())? {
            true => Some(self.sam.as_deref().map(sam_part).transpose()?),
            false => None,
        };
        let sam = |own: Option<PathBuf>| sam.map(|typed| chosen_sam(typed, own, config)).transpose();
        let bring = |part: Option<Part>| part.map(|part| part.bring(talk)).transpose();
        let (name, lmm, sam, head) = match self.model.as_ref().or(config.model.path.as_ref()) {
            None => {
                let folder = embedded::bundle().ok_or_else(|| {
                    Failure::usage("this build has no embedded model", "give --model and --sam")
                })?;
                let bundle = ModelPaths::bundle(&folder);
                (embedded::NAME.to_owned(), bundle.model, bring(sam(Some(bundle.sam))?)?, bring(head)?)
            }
            Some(model) => match named(model)? {
                Named::Local(folder) => {
                    let (lmm, own) = parts(&folder, is_bundle(&folder));
                    let own = own.filter(|own| own.exists());
                    (model.display().to_string(), lmm, bring(sam(own)?)?, bring(head)?)
                }
                Named::Repo(repo) => {
                    let hub = Hub::from_env()?;
                    let plan = hub.plan(&repo)?;
                    let (lmm, own) = parts(plan.folder(), plan.is_bundle());
                    // The bundle's own is downloaded with the rest.
                    let (sam, head) = (bring(sam(own)?)?, bring(head)?);
                    fetch::download(&hub, &repo, &plan, talk)?;
                    (repo.to_string(), lmm, sam, head)
                }
            },
        };
        let (dtype, weights) = config.model.dtype.parts();
        let options = OpenOptions {
            weights,
            vision_tower: self.vision_tower.clone(),
            vision_tower_aux: self.vision_tower_aux.clone(),
            image_size: self.image_size,
            ..OpenOptions::new(dtype, device)
        };
        // Not only when the first sample needs the weights.
        options.check_folder(&lmm)?;
        Ok(Models { name, lmm, sam, head, options })
    }
}

/// The LMM in a folder, and the SAM beside it if it is a bundle.
fn parts(folder: &Path, is_bundle: bool) -> (PathBuf, Option<PathBuf>) {
    let bundle = ModelPaths::bundle(folder);
    match is_bundle {
        true => (bundle.model, Some(bundle.sam)),
        false => (folder.to_owned(), None),
    }
}

/// Whether masks are refined: what the configuration says comes first.
fn needs_sam(config: &Config, head: Option<&Part>) -> Result<bool> {
    let refiner = config.head.refiner.map_or_else(|| refiner_of(head), Ok)?;
    Ok(refiner != RefinerKind::None)
}

/// The SAM that was typed, or the bundle's, or the configuration's.
fn chosen_sam(typed: Option<Part>, own: Option<PathBuf>, config: &Config) -> Result<Part> {
    match (typed, own, &config.model.sam) {
        (Some(typed), ..) => Ok(typed),
        (None, Some(own), _) => Ok(Part::Local(own)),
        (None, None, Some(path)) => {
            Part::new(path, &format!("give the SAM checkpoint with --sam; public ones: {SAM_SOURCE}"))
        }
        (None, None, None) => Err(Failure::usage(
            "no SAM checkpoint is given",
            format!("add --sam FILE (public ones: {SAM_SOURCE}), or train without: --set head.refiner=none"),
        )),
    }
}
