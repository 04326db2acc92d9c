//! Grounded conversation generation: a caption, its phrases and their masks (`spec/evaluation.md` §4).

pub mod ap;
pub mod bert;
pub mod matching;
pub mod score;
pub mod similarity;
pub mod task;

pub use task::{CaptionPhrases, Protocol, SimilaritySource, tasks};
