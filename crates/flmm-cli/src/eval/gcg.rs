//! Options of the tasks `gcg_val` and `gcg_test`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use flmm_eval::gcg::{CaptionPhrases, Protocol, SimilaritySource};

#[derive(Debug, Args)]
pub(super) struct GcgArgs {
    /// gcg: METEOR 1.5's tables, meteor-1.5.jar or its folder; without, METEOR is approximated under another name.
    #[arg(long, value_name = "DIR|JAR")]
    meteor_data: Option<PathBuf>,
    /// gcg: BERT encoder in the Hugging Face layout that compares phrases for mask recall.
    #[arg(long, value_name = "DIR")]
    similarity_model: Option<PathBuf>,
    /// gcg: similarities of true and predicted phrases made by another program.
    #[arg(long, value_name = "FILE", conflicts_with = "similarity_model")]
    similarity: Option<PathBuf>,
    /// gcg: how phrases are found in the model's caption.
    #[arg(long, value_name = "HOW", value_enum, default_value_t)]
    gcg_phrases: Phrases,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum Phrases {
    /// The head's keyword selector.
    #[default]
    Keywords,
    /// Noun-phrase rules.
    Nouns,
}

impl GcgArgs {
    pub(super) fn protocol(&self) -> Protocol {
        let similarity = match (&self.similarity_model, &self.similarity) {
            (Some(folder), _) => Some(SimilaritySource::Model(folder.clone())),
            (None, Some(file)) => Some(SimilaritySource::File(file.clone())),
            (None, None) => None,
        };
        let phrases = match self.gcg_phrases {
            Phrases::Keywords => CaptionPhrases::Keywords,
            Phrases::Nouns => CaptionPhrases::Nouns,
        };
        Protocol { meteor: self.meteor_data.clone(), similarity, phrases }
    }
}
