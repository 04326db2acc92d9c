//! Models that are named instead of pointed to.

use std::path::{Path, PathBuf};

use flmm::hub::{Hub, PartId, Plan, Progress, RepoId};
use indicatif::HumanBytes;

use crate::failure::{Failure, Result};
use crate::talk::Talk;

/// What `--model` names.
pub(crate) enum Named {
    /// Something on this disk.
    Local(PathBuf),
    /// A repository of the Hugging Face hub.
    Repo(RepoId),
}

/// A path that exists is that path, whatever it looks like; `org/name` is a repository of the hub.
pub(crate) fn named(model: &Path) -> Result<Named> {
    if model.exists() {
        return Ok(Named::Local(model.to_owned()));
    }
    let repo = model.to_str().and_then(|text| text.parse().ok());
    repo.map(Named::Repo).ok_or_else(|| {
        Failure::usage(
            format!("`{}`: no such file or folder", model.display()),
            "check the path, or name a repository of the Hugging Face hub: org/name or org/name@revision",
        )
    })
}

/// A SAM or a grounding head that the user gave.
pub(crate) enum Part {
    /// Something on this disk.
    Local(PathBuf),
    /// A file or folder of a repository of the Hugging Face hub.
    Remote(PartId),
}

impl Part {
    /// A path that exists is that path; `org/name`, `org/name@revision` and `org/name:path` are on the hub. Nothing is
    /// downloaded. `hint` says what else to do about a path that does not exist.
    pub(crate) fn new(path: &Path, hint: &str) -> Result<Self> {
        if path.exists() {
            return Ok(Self::Local(path.to_owned()));
        }
        let part = path.to_str().and_then(|text| text.parse().ok());
        part.map(Self::Remote).ok_or_else(|| {
            let what = format!("`{}`: no such file or folder", path.display());
            Failure::usage(what, format!("{hint}; of the Hugging Face hub: org/name:file"))
        })
    }

    /// Its place on this disk, downloaded if it is not there.
    pub(crate) fn bring(&self, talk: &Talk) -> Result<PathBuf> {
        match self {
            Self::Local(path) => Ok(path.clone()),
            Self::Remote(part) => {
                let hub = Hub::from_env()?;
                let plan = hub.plan_part(part)?;
                brought(&hub, part, &plan, &mut |_| Ok(()), talk)
            }
        }
    }
}

/// Downloads the model that `plan` lacks. One of an unknown family is refused before its weights.
pub(crate) fn download(hub: &Hub, repo: &RepoId, plan: &Plan, talk: &Talk) -> Result<PathBuf> {
    let mut ready = |folder: &Path| {
        let lmm = if plan.is_bundle() { folder.join("lmm") } else { folder.to_owned() };
        flmm::lmm::recognise(&lmm).map(drop)
    };
    brought(hub, repo, plan, &mut ready, talk)
}

/// Downloads what `plan` lacks, with bars on terminals; `name` is what the user calls it.
fn brought(
    hub: &Hub,
    name: &dyn std::fmt::Display,
    plan: &Plan,
    ready: &mut dyn FnMut(&Path) -> flmm::Result<()>,
    talk: &Talk,
) -> Result<PathBuf> {
    let mut bar = talk.bytes_bar(0);
    let mut progress = |event: Progress<'_>| match event {
        Progress::Begin { files, bytes } => {
            let files = if files == 1 { "1 file".to_owned() } else { format!("{files} files") };
            talk.note(format_args!("downloading {name}: {files}, {}", HumanBytes(bytes)));
        }
        Progress::At { file, bytes, size } => {
            if bar.message() != file {
                bar = talk.bytes_bar(size.unwrap_or(0)).with_message(file.to_owned());
            }
            bar.set_position(bytes);
        }
        Progress::Done { .. } => bar.finish_and_clear(),
    };
    let place = hub.download(plan, ready, &mut progress);
    bar.finish_and_clear();
    Ok(place?)
}
