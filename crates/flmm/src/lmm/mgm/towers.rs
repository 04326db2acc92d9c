//! The two vision towers, which are published in repositories of their own.

use std::path::{Path, PathBuf};

use crate::config::Config;
use crate::error::{Error, Result};
use crate::lmm::OpenOptions;
use crate::vision::clip::{ClipConfig, ClipVision};
use crate::vision::convnext::ConvNext;
use crate::weights::{Params, files};

/// Where the towers come from.
struct Origin {
    /// Key of `config.json` whose last path component is the folder's name.
    key: &'static str,
    repo: &'static str,
    /// The name where `config.json` gives none.
    name: &'static str,
}

const VISION: Origin = Origin {
    key: "mm_vision_tower",
    repo: "openai/clip-vit-large-patch14-336",
    name: "clip-vit-large-patch14-336",
};

const VISION_AUX: Origin = Origin {
    key: "mm_vision_tower_aux",
    repo: "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup",
    name: "openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup",
};

/// CLIP inside the model's own files.
const OWN_VISION: &str = "model.vision_tower.vision_tower.vision_model";

/// Folders of the towers.
#[derive(Debug)]
pub(super) struct Towers {
    /// CLIP: configuration, preprocessing, and weights unless the model's files hold them.
    pub(super) vision: PathBuf,
    vision_aux: PathBuf,
}

impl Towers {
    /// The folders given, else those found inside or beside `dir`; one error names all that are missing.
    pub(super) fn find(dir: &Path, config: &Config, options: &OpenOptions) -> Result<Self> {
        let vision = find(dir, config, options.vision_tower.as_deref(), &VISION)?;
        let vision_aux = find(dir, config, options.vision_tower_aux.as_deref(), &VISION_AUX)?;
        match (vision, vision_aux) {
            (Ok(vision), Ok(vision_aux)) => Ok(Self { vision, vision_aux }),
            (vision, vision_aux) => {
                let missing: Vec<String> = [vision.err(), vision_aux.err()].into_iter().flatten().collect();
                let what = format!("a vision tower has no folder: {}", missing.join("; "));
                let hint = "download the repository from the hub into a folder of that name, inside or beside the \
                            model's folder, or name the folder when opening the model";
                Err(Error::weights(dir, what, hint))
            }
        }
    }

    /// CLIP; its tensors among the model's own, `params`, win.
    pub(super) fn vision(
        &self,
        config: &Config,
        params: &Params,
        options: &OpenOptions,
    ) -> Result<ClipVision> {
        let own = Config::read(&self.vision.join("config.json"))?;
        let own = if own.get("vision_config").is_some() { own.object("vision_config")? } else { own };
        let clip = ClipConfig::from_config(&own, config.integer_or("mm_vision_select_layer", -2)?)?;
        same_width(config, "mm_hidden_size", clip.hidden_size, &self.vision)?;
        let inside = params.pp(OWN_VISION);
        if inside.has("embeddings.class_embedding") {
            return ClipVision::load(clip, &inside);
        }
        let tensors = options.load(&self.vision)?;
        let params = Params::new(&self.vision, tensors);
        let vision = ClipVision::load(clip, &params.pp("vision_model"))?;
        params.finish(&format!("the folder must hold {}; download it again", VISION.repo))?;
        Ok(vision)
    }

    /// The ConvNeXt of OpenCLIP.
    pub(super) fn vision_aux(&self, config: &Config, options: &OpenOptions) -> Result<ConvNext> {
        if config.flag_or("optimize_vision_tower_aux", false)? {
            let what = "a model with a retrained auxiliary tower is not supported";
            return Err(config.error("optimize_vision_tower_aux", what, "use a published model"));
        }
        let tensors = options.load(&self.vision_aux)?;
        let params = Params::new(&self.vision_aux, tensors);
        let tower = ConvNext::load(&params.pp("visual.trunk"))?;
        params.finish(&format!("the folder must hold {}; download it again", VISION_AUX.repo))?;
        same_width(config, "mm_hidden_size_aux", tower.channels(), &self.vision_aux)?;
        Ok(tower)
    }
}

/// The folder, or what to say about its absence.
fn find(
    dir: &Path,
    config: &Config,
    given: Option<&Path>,
    origin: &Origin,
) -> Result<Result<PathBuf, String>> {
    if let Some(given) = given {
        return Ok(match files::is_dir(given) {
            true => Ok(given.to_owned()),
            false => Err(format!("`{}` ({}) is no folder", given.display(), origin.repo)),
        });
    }
    // Published files name a folder on the machine of the authors.
    let listed = config.text_or(origin.key, origin.name)?.replace('\\', "/");
    let name = Path::new(&listed).file_name().unwrap_or(origin.name.as_ref());
    let beside = match (dir.file_name(), dir.parent()) {
        (Some(_), Some(parent)) => parent.join(name),
        _ => dir.join("..").join(name),
    };
    let found = [dir.join(name), beside].into_iter().find(|folder| files::is_dir(folder));
    Ok(found.ok_or_else(|| format!("`{}` ({})", name.to_string_lossy(), origin.repo)))
}

/// The width that `config` expects of the tower in `folder`.
fn same_width(config: &Config, key: &str, found: usize, folder: &Path) -> Result<()> {
    match config.size_or(key, found)? {
        expected if expected == found => Ok(()),
        expected => Err(config.error(
            key,
            format!(
                "the model expects a tower of width {expected}, the one in {} has {found}",
                folder.display()
            ),
            "give the folder of the tower that the model was trained with",
        )),
    }
}
