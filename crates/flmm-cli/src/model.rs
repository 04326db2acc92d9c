//! Which model to open.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use flmm::Grounder;
use flmm::grounder::{HeadSettings, ModelPaths, RefinerKind, Revision};
use flmm::hub::Hub;
use flmm::lmm::{LoadProgress, OpenOptions};
use flmm::weights::rehearse;

use crate::args::{ModelArgs, Precision};
use crate::embedded;
use crate::failure::{Failure, Result};
use crate::fetch::{self, Named, Part, named};
use crate::talk::Talk;

/// An opened model and what to call it.
pub(crate) struct Model {
    pub(crate) grounder: Grounder,
    pub(crate) name: String,
    /// Numbers of the LMM.
    pub(crate) precision: Precision,
    paths: ModelPaths,
    options: OpenOptions,
}

impl Model {
    /// Numbers in the LMM's tensors: those of its parts that it was opened with.
    pub(crate) fn lmm_elements(&self) -> Result<usize> {
        let (opened, findings) = rehearse(|| flmm::lmm::open_with(&self.paths.model, &self.options));
        opened?;
        Ok(findings.used_elements)
    }

    /// Which files it was made of.
    pub(crate) fn revision(&self) -> Result<Revision> {
        Ok(Revision::of(&self.paths, &self.options)?)
    }
}

/// Opens the model the user chose, or the embedded one.
pub(crate) fn open(args: &ModelArgs, talk: &Talk) -> Result<Model> {
    let (name, paths) = choose(args, talk)?;
    let precision = Precision::of(args.dtype, &paths.model)?;
    let (dtype, weights) = precision.parts();
    let device = args.device.open()?;
    let clock = std::time::Instant::now();
    let spinner = talk.during("loading the model");
    let bar = spinner.bar();
    let progress = move |done: u64, total: u64| {
        if let Some(bar) = &bar {
            let gigabytes = |bytes: u64| bytes as f64 / 1e9;
            bar.set_message(format!("loading the model {:.1}/{:.1} GB", gigabytes(done), gigabytes(total)));
        }
    };
    let options = OpenOptions {
        weights,
        sam_dtype: args.sam_dtype.into(),
        vision_tower: args.vision_tower.clone(),
        vision_tower_aux: args.vision_tower_aux.clone(),
        image_size: args.image_size,
        progress: Some(LoadProgress(Arc::new(progress))),
        ..OpenOptions::new(dtype, &device)
    };
    let grounder = Grounder::open_with(&paths, &options)?;
    crate::memory::give_back();
    drop(spinner);
    talk.detail(format_args!("loaded {name} in {:.1} s", clock.elapsed().as_secs_f64()));
    Ok(Model { grounder, name, precision, paths, options })
}

/// Where public SAM checkpoints come from; the method was made with this size.
pub(crate) const SAM_SOURCE: &str = "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_l_0b3195.pth";

/// What is typed for a head where masks are to be made without one.
const NO_HEAD: &str = "none";

/// Name and files of the chosen model.
fn choose(args: &ModelArgs, talk: &Talk) -> Result<(String, ModelPaths)> {
    // Before anything is downloaded.
    let sam = args.sam.as_deref().map(sam_part).transpose()?;
    let without_head = args.head.as_deref().is_some_and(|head| head.as_os_str() == NO_HEAD);
    let head = match without_head {
        true => None,
        false => args.head.as_deref().map(head_part).transpose()?,
    };
    let bring = |part: &Option<Part>| part.as_ref().map(|part| part.bring(talk)).transpose();
    let Some(model) = &args.model else {
        let bundle = embedded::bundle().ok_or_else(|| {
            Failure::usage(
                "this build has no embedded model",
                "give --model, --sam and --head, or build with models/flmm-tiny",
            )
        })?;
        // The embedded model with another head, one that was trained for it.
        let paths = paths(&bundle, true, None, bring(&head)?, without_head);
        return Ok((embedded::NAME.to_owned(), paths));
    };
    let refines = refiner_of(head.as_ref())? != RefinerKind::None;
    let known = (head.is_some() || without_head) && (sam.is_some() || !refines);
    let check = |is_bundle: bool| match is_bundle || known {
        true => Ok(()),
        false => Err(Failure::usage(
            format!("`{}` is not a bundle: its SAM and its grounding head are not known", model.display()),
            format!("add --sam FILE (public checkpoints: {SAM_SOURCE}) and --head DIR, its grounding head"),
        )),
    };
    match named(model)? {
        Named::Local(folder) => {
            let is_bundle = is_bundle(&folder);
            check(is_bundle)?;
            let paths = paths(&folder, is_bundle, bring(&sam)?, bring(&head)?, without_head);
            let needs_sam = match &paths.head {
                Some(head) => HeadSettings::read(head)?.refiner != RefinerKind::None,
                None => true,
            };
            for path in needs_sam.then_some(&paths.sam).into_iter().chain(&paths.head) {
                if !path.exists() {
                    let what = format!("`{}`: no such file or folder", path.display());
                    return Err(Failure::usage(
                        what,
                        "the bundle is not complete: add the part, or --sam and --head",
                    ));
                }
            }
            Ok((name_of(&folder), paths))
        }
        Named::Repo(repo) => {
            let hub = Hub::from_env()?;
            let plan = hub.plan(&repo)?;
            // A model that cannot be used for want of its parts is not downloaded.
            check(plan.is_bundle())?;
            let paths = paths(plan.folder(), plan.is_bundle(), bring(&sam)?, bring(&head)?, without_head);
            fetch::download(&hub, &repo, &plan, talk)?;
            Ok((repo.to_string(), paths))
        }
    }
}

/// The SAM that `path` names.
pub(crate) fn sam_part(path: &Path) -> Result<Part> {
    Part::new(path, &format!("check the path; public SAM checkpoints: {SAM_SOURCE}"))
}

/// The head that `path` names.
pub(crate) fn head_part(path: &Path) -> Result<Part> {
    Part::new(path, "check the path; `flmm convert head` makes a folder of a released head")
}

/// What refines the masks of `head`. One on the hub is taken to need SAM, which nearly all do.
pub(crate) fn refiner_of(head: Option<&Part>) -> Result<RefinerKind> {
    match head {
        Some(Part::Local(head)) => Ok(HeadSettings::read(head)?.refiner),
        _ => Ok(RefinerKind::default()),
    }
}

/// Whether `folder` holds the parts of a model rather than an LMM.
pub(crate) fn is_bundle(folder: &Path) -> bool {
    !folder.join("config.json").is_file() && ModelPaths::bundle(folder).model.is_dir()
}

/// The three parts of the model in `folder`: its own, or those given, or no head.
fn paths(
    folder: &Path,
    is_bundle: bool,
    sam: Option<PathBuf>,
    head: Option<PathBuf>,
    without_head: bool,
) -> ModelPaths {
    let bundle = ModelPaths::bundle(folder);
    ModelPaths {
        model: if is_bundle { bundle.model } else { folder.to_owned() },
        sam: sam.unwrap_or(bundle.sam),
        head: if without_head { None } else { head.or(bundle.head) },
    }
}

/// The last part of a path, made absolute where that is needed to have one.
fn name_of(path: &Path) -> String {
    let whole = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    path.file_name().or(whole.file_name()).unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}
