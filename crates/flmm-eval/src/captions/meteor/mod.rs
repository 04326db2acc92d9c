//! METEOR 1.5 for English: aligned words weighted by how they match, precision and recall weighted by alpha, and a
//! penalty for alignments in many pieces (Denkowski and Lavie, 2014).

mod align;
mod data;
mod normalise;

use flmm::Result;
use serde::{Deserialize, Serialize};

use super::tokens::tokenise;
use align::{Aligner, Alignment};
use data::Paraphrases;

pub use data::MeteorData;

/// How words can match: the same, the same stem, synonyms, paraphrases.
pub(crate) const MODULES: usize = 4;
/// What a match of each kind counts.
pub(crate) const WEIGHTS: [f64; MODULES] = [1.0, 0.6, 0.8, 0.6];
/// Weight of recall against precision.
const ALPHA: f64 = 0.85;
/// Shape of the fragmentation penalty.
const BETA: f64 = 0.20;
/// Height of the fragmentation penalty.
const GAMMA: f64 = 0.60;
/// Weight of content words against function words.
const DELTA: f64 = 0.75;

/// Counts that a score is made of; the score of a split is made of their sum over the pictures.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    candidate: Side,
    reference: Side,
    chunks: usize,
}

/// One sentence's counts. Matches are words, by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Side {
    words: usize,
    function_words: usize,
    content_matches: [usize; MODULES],
    function_matches: [usize; MODULES],
}

impl Side {
    fn new(is_function: &[bool], matched: impl Iterator<Item = (usize, usize)>) -> Self {
        let function_words = is_function.iter().filter(|&&f| f).count();
        let mut side = Self { words: is_function.len(), function_words, ..Self::default() };
        for (word, module) in matched {
            match is_function[word] {
                true => side.function_matches[module] += 1,
                false => side.content_matches[module] += 1,
            }
        }
        side
    }

    fn add(&mut self, other: &Self) {
        self.words += other.words;
        self.function_words += other.function_words;
        for module in 0..MODULES {
            self.content_matches[module] += other.content_matches[module];
            self.function_matches[module] += other.function_matches[module];
        }
    }

    fn matches(&self) -> usize {
        self.content_matches.iter().chain(&self.function_matches).sum()
    }

    /// Weighted share of the words that are matched.
    fn share(&self) -> f64 {
        let content = (self.words - self.function_words) as f64;
        let length = DELTA * content + (1.0 - DELTA) * self.function_words as f64;
        let weighted = |matches: &[usize; MODULES], share: f64| {
            matches.iter().zip(WEIGHTS).map(|(&n, weight)| n as f64 * weight * share).sum::<f64>()
        };
        (weighted(&self.content_matches, DELTA) + weighted(&self.function_matches, 1.0 - DELTA)) / length
    }
}

impl Statistics {
    fn new(candidate: &[bool], reference: &[bool], alignment: &Alignment) -> Self {
        let in_candidate =
            alignment.matches.iter().flat_map(|m| (m.at..m.at + m.at_length).map(|word| (word, m.module)));
        let in_reference =
            alignment.matches.iter().flat_map(|m| (m.start..m.start + m.length).map(|word| (word, m.module)));
        Self {
            candidate: Side::new(candidate, in_candidate),
            reference: Side::new(reference, in_reference),
            chunks: alignment.chunks,
        }
    }

    /// Adds the counts of another picture.
    pub fn add(&mut self, other: &Self) {
        self.candidate.add(&other.candidate);
        self.reference.add(&other.reference);
        self.chunks += other.chunks;
    }

    /// The score, 0 to 1. Sentences without words or matches score 0.
    pub fn score(&self) -> f64 {
        let (precision, recall) = (self.candidate.share(), self.reference.share());
        let mean = 1.0 / ((1.0 - ALPHA) / precision + ALPHA / recall);
        let (own, wanted) = (self.candidate.matches(), self.reference.matches());
        let whole = own == self.candidate.words && wanted == self.reference.words && self.chunks == 1;
        let pieces = if whole { 0.0 } else { self.chunks as f64 / ((own + wanted) as f64 / 2.0) };
        let score = mean * (1.0 - GAMMA * pieces.powf(BETA));
        if score.is_nan() { 0.0 } else { score.max(0.0) }
    }
}

/// Scores captions one by one.
pub struct Meteor {
    data: MeteorData,
    paraphrases: Option<Paraphrases>,
}

impl Meteor {
    /// Reads of the paraphrase table what can match the given true captions.
    ///
    /// # Errors
    /// [`flmm::Error::Io`] and [`flmm::Error::Config`] for an unreadable or cut-off table.
    pub fn new<'a>(data: MeteorData, references: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let sentences: Vec<Vec<String>> = references.into_iter().map(|text| words(text, &data)).collect();
        Ok(Self { paraphrases: data.paraphrases_of(&sentences)?, data })
    }

    /// What the scores may be called ([`MeteorData::label`]).
    pub fn label(&self) -> &'static str {
        self.data.label()
    }

    /// Statistics of a caption with the reference that it scores highest with, the first one among equals. All zero
    /// without a reference.
    pub fn compare<S: AsRef<str>>(&self, candidate: &str, references: &[S]) -> Statistics {
        let aligner = Aligner::new(self.data.synonyms(), self.paraphrases.as_ref());
        let function = |words: &[String]| -> Vec<bool> {
            words.iter().map(|word| self.data.function_words().contains(word)).collect()
        };
        let candidate = words(candidate, &self.data);
        let mut best: Option<(f64, Statistics)> = None;
        for reference in references {
            let reference = words(reference.as_ref(), &self.data);
            let alignment = aligner.align(&candidate, &reference);
            let found = Statistics::new(&function(&candidate), &function(&reference), &alignment);
            let score = found.score();
            if best.is_none_or(|(highest, _)| score > highest) {
                best = Some((score, found));
            }
        }
        best.unwrap_or_default().1
    }
}

/// The words METEOR compares: those of the treebank, looked at once more.
fn words(text: &str, data: &MeteorData) -> Vec<String> {
    normalise::normalise(&tokenise(text).join(" "), data.kept_dots())
}
