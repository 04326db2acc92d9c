//! `flmm eval ranks`: does a model that chats well also ground well?

use std::path::PathBuf;

use clap::Args;
use flmm::Error;
use flmm_eval::ranks::{RankInput, Ranks, as_published, average_ranks};
use serde_json::json;

use crate::failure::{Failure, Result};
use crate::talk::Talk;

#[derive(Debug, Args)]
pub(crate) struct RanksArgs {
    /// Scores of other models than the paper's ten: JSON with `models`, `chat` and `grounding`; the last two are lists of
    /// {"name", "scores"}, higher is better.
    #[arg(long, value_name = "FILE")]
    scores: Option<PathBuf>,
    /// Repeat the published table with its two slips, to compare with it.
    #[arg(long)]
    as_published: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &RanksArgs, talk: &Talk) -> Result<()> {
    let input = match &args.scores {
        None => RankInput::published(args.as_published)?,
        Some(file) => {
            let text = std::fs::read_to_string(file).map_err(|e| Error::io(file, e))?;
            serde_json::from_str(&text).map_err(|e| {
                Error::config(file, format!("not scores of models: {e}"), "see `flmm eval ranks --help`")
            })?
        }
    };
    let ranks = if args.as_published { as_published(&input)? } else { average_ranks(&input)? };
    if args.as_published {
        talk.note("as published: row k is the mean index of the k-th best models, not a model's rank");
    }
    match args.json {
        true => {
            let text = serde_json::to_string_pretty(&json!(ranks));
            talk.print(&text.map_err(|e| Failure::other(format!("cannot write JSON: {e}")))?)
        }
        false => talk.print(&table(&ranks, args.as_published)),
    }
}

/// Two digits; the published ones are cut off.
fn table(ranks: &Ranks, cut: bool) -> String {
    let digits = |v: f64| if cut { (v * 100.0 + 1e-6).floor() / 100.0 } else { v };
    let mut text = String::from("| Model | Chat | Ground |\n|---|---|---|\n");
    for ((model, chat), ground) in ranks.models.iter().zip(&ranks.chat).zip(&ranks.grounding) {
        text += &format!("| {model} | {:.2} | {:.2} |\n", digits(*chat), digits(*ground));
    }
    text + &format!("\nPearson {:.3}, Spearman {:.3}\n", ranks.pearson, ranks.spearman)
}
