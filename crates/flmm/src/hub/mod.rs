//! Models from the Hugging Face hub, through the cache that all programs of its users share.
//!
//! A model that is complete in the cache is used as it is, without any request. Otherwise the repository's files are
//! listed, those that a model needs are downloaded one by one, and every one of them is complete, checked and in its
//! place before the next begins. Cache layout and environment variables are those of the `huggingface_hub` library.
//!
//! ```no_run
//! use flmm::hub::{Hub, RepoId};
//!
//! let repo: RepoId = "llava-hf/llava-1.5-7b-hf".parse()?;
//! let folder = Hub::from_env()?.resolve(&repo, &mut |_| {})?;
//! # Ok::<(), flmm::Error>(())
//! ```

mod cache;
mod download;
mod http;
mod part;
mod repo;
mod select;
mod settings;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cache::{RepoCache, State};
use download::{Wanted, patiently};
use http::{Client, Fault};

pub use part::PartId;
pub use repo::RepoId;
pub use settings::{HubSettings, user_cache};

use crate::error::{Error, Result};
use crate::weights::checkpoint_files;

/// What a download is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress<'a> {
    /// Files are about to be downloaded; sizes as the hub lists them.
    Begin {
        /// How many.
        files: usize,
        /// How many bytes together; 0 if the hub does not tell.
        bytes: u64,
    },
    /// A file is begun or goes on.
    At {
        /// Its path below the repository.
        file: &'a str,
        /// Bytes that are there.
        bytes: u64,
        /// Bytes that it has, if the hub tells.
        size: Option<u64>,
    },
    /// A file is complete.
    Done {
        /// Its path below the repository.
        file: &'a str,
    },
}

/// Where a model's files are, or what is to be downloaded.
#[derive(Debug)]
pub struct Plan {
    repo: RepoId,
    commit: String,
    folder: PathBuf,
    /// Size of every file of the repository; `None` if nothing needs to be downloaded.
    listing: Option<BTreeMap<String, Option<u64>>>,
    /// What of the repository is wanted, if not a whole model.
    part: Option<PartId>,
}

impl Plan {
    /// Whether everything is in the cache already.
    pub fn is_cached(&self) -> bool {
        self.listing.is_none()
    }

    /// The folder that holds the model, or will.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether the repository is a bundle: an LMM in `lmm/` with its SAM and its grounding head.
    pub fn is_bundle(&self) -> bool {
        let has = |name: &str| match &self.listing {
            Some(files) => files.contains_key(name),
            None => self.folder.join(name).is_file(),
        };
        has("lmm/config.json") && !has("config.json")
    }
}

/// The hub and its cache.
#[derive(Debug)]
pub struct Hub {
    settings: HubSettings,
    client: Client,
}

impl Hub {
    /// The hub that the environment describes; see [`HubSettings::from_env`].
    pub fn from_env() -> Result<Self> {
        HubSettings::from_env().map(Self::new)
    }

    /// The hub with the given settings.
    pub fn new(settings: HubSettings) -> Self {
        Self { client: Client::new(&settings), settings }
    }

    /// The settings in use.
    pub fn settings(&self) -> &HubSettings {
        &self.settings
    }

    /// Folder of the model if it is complete in the cache. Never uses the network.
    pub fn cached(&self, repo: &RepoId) -> Option<PathBuf> {
        let cache = RepoCache::new(&self.settings.cache, repo);
        let folder = cache.snapshot(&cache.commit(repo)?);
        matches!(cache::state(&folder), State::Complete | State::Doubtful).then_some(folder)
    }

    /// Finds out whether something must be downloaded; asks the hub only if the cache is not enough.
    ///
    /// # Errors
    /// [`Error::Hub`]: offline and not in the cache, no such repository or revision, no access, no connection.
    pub fn plan(&self, repo: &RepoId) -> Result<Plan> {
        let cache = RepoCache::new(&self.settings.cache, repo);
        let known = cache.commit(repo).map(|commit| (cache.snapshot(&commit), commit));
        let state = match &known {
            Some((folder, _)) => cache::state(folder),
            None => State::Incomplete(vec!["all files".to_owned()]),
        };
        let here = known.map(|(folder, commit)| Plan {
            repo: repo.clone(),
            commit,
            folder,
            listing: None,
            part: None,
        });
        let missing = match (state, here) {
            (State::Complete, Some(plan)) => return Ok(plan),
            (State::Doubtful, Some(plan)) => match self.settings.offline {
                true => return Ok(plan),
                // Weights are here. If the hub cannot be asked for what may be missing, the loader will tell.
                false => return Ok(self.list(repo, &[]).unwrap_or(plan)),
            },
            (State::Incomplete(missing), _) => missing,
            _ => Vec::new(),
        };
        if self.settings.offline {
            return Err(self.absent(repo, &missing, "the hub may not be asked (HF_HUB_OFFLINE)"));
        }
        self.list(repo, &missing)
    }

    /// Downloads what `plan` lacks and returns [`Plan::place`].
    ///
    /// `ready` is called with that place when configurations and tokenizers are there, before the weights, so that a
    /// model of no use is not downloaded. What has come so far is kept when a download ends early, and used by the next.
    ///
    /// # Errors
    /// [`Error::Hub`] as [`Hub::plan`], and if a file does not have the size and checksum that the hub states;
    /// [`Error::Io`] if the cache cannot be written; whatever `ready` returns.
    pub fn download(
        &self,
        plan: &Plan,
        ready: &mut dyn FnMut(&Path) -> Result<()>,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<PathBuf> {
        let Some(listing) = &plan.listing else {
            ready(&plan.place())?;
            return Ok(plan.place());
        };
        let chosen = plan.selection(listing)?;
        self.fetch(plan, listing, &chosen.small, progress)?;
        let mut weights = chosen.weights.clone();
        for index in chosen.indexes() {
            for shard in checkpoint_files(plan.folder.join(index))? {
                let name = shard.file_name().and_then(|name| name.to_str()).unwrap_or_default();
                let name = match index.rsplit_once('/') {
                    Some((folder, _)) => format!("{folder}/{name}"),
                    None => name.to_owned(),
                };
                if !listing.contains_key(&name) {
                    return Err(Error::hub(
                        format!("{}: `{index}` names `{name}`, which is not in the repository", plan.repo),
                        "its upload is not complete: choose another revision",
                    ));
                }
                weights.push(name);
            }
        }
        ready(&plan.place())?;
        self.fetch(plan, listing, &weights, progress)?;
        Ok(plan.place())
    }

    /// [`Hub::plan`] and [`Hub::download`].
    pub fn resolve(&self, repo: &RepoId, progress: &mut dyn FnMut(Progress<'_>)) -> Result<PathBuf> {
        self.download(&self.plan(repo)?, &mut |_| Ok(()), progress)
    }

    /// Asks the hub for the files of the repository.
    fn list(&self, repo: &RepoId, missing: &[String]) -> Result<Plan> {
        let answer = patiently(&self.settings, &|| 0, || self.client.describe(repo));
        let json = answer.map_err(|fault| self.explain(repo, missing, fault))?;
        let commit = json.get("sha").and_then(|sha| sha.as_str()).filter(|sha| repo::is_plain(sha));
        let files = json.get("siblings").and_then(|files| files.as_array());
        let (Some(commit), Some(files)) = (commit, files) else {
            return Err(Error::hub(
                format!("{repo}: {} does not list files as a Hugging Face hub does", self.settings.endpoint),
                "check HF_ENDPOINT",
            ));
        };
        let files = files.iter().filter_map(|file| {
            let name = file.get("rfilename")?.as_str()?;
            // Names become paths in the cache. Files with stranger ones are never needed.
            let plain = name.split('/').all(repo::is_plain);
            plain.then(|| (name.to_owned(), file.get("size").and_then(|size| size.as_u64())))
        });
        let folder = RepoCache::new(&self.settings.cache, repo).snapshot(commit);
        Ok(Plan {
            repo: repo.clone(),
            commit: commit.to_owned(),
            folder,
            listing: Some(files.collect()),
            part: None,
        })
    }

    /// Brings the files `names` that are not in the snapshot yet.
    fn fetch(
        &self,
        plan: &Plan,
        listing: &BTreeMap<String, Option<u64>>,
        names: &[String],
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<()> {
        let cache = RepoCache::new(&self.settings.cache, &plan.repo);
        cache.set_commit(&plan.repo, &plan.commit)?;
        let absent: Vec<&String> = names.iter().filter(|name| !plan.folder.join(name).is_file()).collect();
        if absent.is_empty() {
            return Ok(());
        }
        let bytes = absent.iter().filter_map(|name| listing.get(*name).copied().flatten()).sum();
        progress(Progress::Begin { files: absent.len(), bytes });
        for file in &absent {
            let explain = |fault| self.explain(&plan.repo, &[(*file).clone()], fault);
            let wanted = Wanted { repo: &plan.repo, commit: &plan.commit, name: file };
            let ask = || self.client.metadata(&plan.repo, &plan.commit, file).map_err(Fault::passing);
            let metadata = patiently(&self.settings, &|| 0, ask).map_err(explain)?;
            let mut at = |bytes| progress(Progress::At { file, bytes, size: metadata.size });
            download::blob(&self.client, &self.settings, &cache, &wanted, &metadata, &mut at)
                .map_err(explain)?;
            cache.link(&plan.commit, file, &metadata.etag)?;
            progress(Progress::Done { file });
        }
        Ok(())
    }

    fn explain(&self, repo: &RepoId, missing: &[String], fault: Fault) -> Error {
        match fault {
            Fault::Final(error) => error,
            Fault::Unreachable(what) => {
                self.absent(repo, missing, &format!("{} cannot be reached ({what})", self.settings.endpoint))
            }
            Fault::Passing(what) => {
                let (endpoint, attempts) = (&self.settings.endpoint, self.settings.attempts);
                self.absent(repo, missing, &format!("{endpoint} failed {attempts} times (last: {what})"))
            }
        }
    }

    /// The error for files that are neither in the cache nor to be had, with all ways to get them.
    fn absent(&self, repo: &RepoId, missing: &[String], why: &str) -> Error {
        let names = match missing {
            [] => "files are".to_owned(),
            [one] if one.starts_with("all") || one.starts_with("the") => format!("{one} are"),
            [one] => format!("`{one}` is"),
            [first, rest @ ..] => format!("`{first}` and {} more files are", rest.len()),
        };
        let revision = match repo.revision() {
            RepoId::MAIN => String::new(),
            revision => format!(" --revision {revision}"),
        };
        Error::hub(
            format!("{repo}: {names} not in the cache {}, and {why}", self.settings.cache.display()),
            format!(
                "with a connection run this command again or `huggingface-cli download {id}{revision}` (newer: `hf \
                 download {id}{revision}`); or set HF_HOME to a folder whose cache has the model; or give a local folder",
                id = repo.id()
            ),
        )
    }
}
