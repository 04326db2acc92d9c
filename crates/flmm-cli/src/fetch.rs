//! Models that are named instead of pointed to.

use std::path::{Path, PathBuf};

use flmm::hub::{Hub, Plan, Progress, RepoId};
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

/// Downloads what `plan` lacks, with bars on terminals. A model of an unknown family is refused before its weights.
pub(crate) fn download(hub: &Hub, repo: &RepoId, plan: &Plan, talk: &Talk) -> Result<PathBuf> {
    let mut bar = talk.bytes_bar(0);
    let mut ready = |folder: &Path| {
        let lmm = if plan.is_bundle() { folder.join("lmm") } else { folder.to_owned() };
        flmm::lmm::recognise(&lmm).map(drop)
    };
    let mut progress = |event: Progress<'_>| match event {
        Progress::Begin { files, bytes } => {
            let files = if files == 1 { "1 file".to_owned() } else { format!("{files} files") };
            talk.note(format_args!("downloading {repo}: {files}, {}", HumanBytes(bytes)));
        }
        Progress::At { file, bytes, size } => {
            if bar.message() != file {
                bar = talk.bytes_bar(size.unwrap_or(0)).with_message(file.to_owned());
            }
            bar.set_position(bytes);
        }
        Progress::Done { .. } => bar.finish_and_clear(),
    };
    let folder = hub.download(plan, &mut ready, &mut progress);
    bar.finish_and_clear();
    Ok(folder?)
}
