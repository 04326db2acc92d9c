//! Which judge grades free answers.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use flmm::hub::user_cache;
use flmm_eval::judge::{Judge, JudgeSettings};

use crate::failure::{Failure, Result};

/// The judge that the published scores of visual chain of thought are from.
const DEFAULT_MODEL: &str = "gpt-3.5-turbo-1106";

/// A judge for free answers; its key is taken from the environment variable OPENAI_API_KEY.
#[derive(Debug, Args)]
#[command(next_help_heading = "Judge of free answers (viscot, mmvet, llavabench, mmbench)")]
pub(super) struct JudgeArgs {
    /// Address of a server that speaks OpenAI's chat protocol, for example https://api.openai.com/v1. Its key is taken from
    /// OPENAI_API_KEY. Without a judge there are offline numbers only.
    #[arg(long, value_name = "URL")]
    judge_url: Option<String>,
    /// The judge's name on that server.
    #[arg(long, value_name = "NAME", default_value = DEFAULT_MODEL, requires = "judge_url")]
    judge_model: String,
    /// Folder for its replies: no question is asked twice [default: flmm/judge in the user's cache folder].
    #[arg(long, value_name = "DIR", requires = "judge_url")]
    judge_cache: Option<PathBuf>,
    /// Folder with prompt files that replace flmm's own: viscot.txt, mmvet.txt, llavabench.txt, mmbench.txt.
    #[arg(long, value_name = "DIR", requires = "judge_url")]
    judge_prompts: Option<PathBuf>,
}

impl JudgeArgs {
    /// The judge, if there is to be one. Nothing is sent yet.
    pub(super) fn open(&self) -> Result<Option<Arc<Judge>>> {
        let Some(url) = &self.judge_url else { return Ok(None) };
        if let Some(folder) = self.judge_prompts.as_ref().filter(|folder| !folder.is_dir()) {
            let what = format!("`{}`: no such folder", folder.display());
            return Err(Failure::usage(what, "name a folder with prompt files"));
        }
        let key = std::env::var("OPENAI_API_KEY").ok().map(|key| key.trim().to_owned());
        let judge = Judge::new(JudgeSettings {
            key: key.filter(|key| !key.is_empty()),
            cache: self.judge_cache.clone().or_else(|| Some(user_cache()?.join("flmm/judge"))),
            prompts: self.judge_prompts.clone(),
            ..JudgeSettings::new(url, &self.judge_model)
        })?;
        Ok(Some(Arc::new(judge)))
    }
}
