//! Which model to open.

use std::path::Path;

use candle_core::{DType, Device};
use flmm::Grounder;
use flmm::grounder::ModelPaths;

use crate::args::{ModelArgs, Precision};
use crate::embedded;
use crate::failure::{Failure, Result};
use crate::talk::Talk;

/// An opened model and what to call it.
pub(crate) struct Model {
    pub(crate) grounder: Grounder,
    pub(crate) name: String,
}

/// Opens the model the user chose, or the embedded one.
pub(crate) fn open(args: &ModelArgs, talk: &Talk) -> Result<Model> {
    let (name, paths) = choose(args)?;
    let dtype = match args.dtype {
        Precision::F32 => DType::F32,
        Precision::Bf16 => DType::BF16,
    };
    let clock = std::time::Instant::now();
    let grounder = {
        let _spinner = talk.during("loading the model");
        Grounder::open(&paths, &Device::Cpu, dtype)?
    };
    talk.detail(format_args!("loaded {name} in {:.1} s", clock.elapsed().as_secs_f64()));
    Ok(Model { grounder, name })
}

/// Name and files of the chosen model.
fn choose(args: &ModelArgs) -> Result<(String, ModelPaths)> {
    let Some(model) = &args.model else {
        let bundle = embedded::bundle().ok_or_else(|| {
            Failure::usage(
                "this build has no embedded model",
                "give --model, --sam and --head, or build with models/flmm-tiny",
            )
        })?;
        return Ok((embedded::NAME.to_owned(), ModelPaths::bundle(&bundle)));
    };
    let bundle = ModelPaths::bundle(model);
    let is_bundle = !model.join("config.json").is_file() && bundle.model.is_dir();
    let (lmm, sam, head) = match is_bundle {
        true => {
            (bundle.model, args.sam.clone().unwrap_or(bundle.sam), args.head.clone().unwrap_or(bundle.head))
        }
        false => match (&args.sam, &args.head) {
            (Some(sam), Some(head)) => (model.clone(), sam.clone(), head.clone()),
            _ => {
                return Err(Failure::usage(
                    format!(
                        "`{}` is not a bundle: its SAM and its grounding head are not known",
                        model.display()
                    ),
                    "add --sam FILE and --head DIR",
                ));
            }
        },
    };
    for path in [&lmm, &sam, &head] {
        if !path.exists() {
            return Err(Failure::usage(
                format!("`{}`: no such file or folder", path.display()),
                "check the path",
            ));
        }
    }
    Ok((name_of(model), ModelPaths { model: lmm, sam, head }))
}

/// The last part of a path, made absolute where that is needed to have one.
fn name_of(path: &Path) -> String {
    let whole = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    path.file_name().or(whole.file_name()).unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}
