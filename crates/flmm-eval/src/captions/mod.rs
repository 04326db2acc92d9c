//! Caption metrics as the public COCO caption tools compute them: CIDEr-D, BLEU, ROUGE-L, METEOR
//! (`spec/evaluation.md` §4).
//!
//! All of them see the same tokens ([`tokens::tokenise`]): Penn Treebank words in lower case without punctuation.

pub mod bleu;
pub mod cider;
pub mod meteor;
mod ngrams;
pub mod rouge;
pub mod tokens;

use flmm::{Error, Result};
use serde::Serialize;

use meteor::{Meteor, MeteorData, Statistics};

/// One picture: what was said about it and what should have been said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptionPair {
    /// The caption to be scored.
    pub candidate: String,
    /// One or more true captions.
    pub references: Vec<String>,
}

/// One metric of a split.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Scored {
    /// The number that tables show, a fraction (CIDEr: 0 to 10). METEOR's is computed from statistics summed over
    /// the pictures, the others are means.
    pub all: f64,
    /// Per picture, in the order given.
    pub per_image: Vec<f64>,
}

impl Scored {
    fn mean_of(per_image: Vec<f64>) -> Self {
        let all = per_image.iter().sum::<f64>() / per_image.len().max(1) as f64;
        Self { all, per_image }
    }
}

/// All caption metrics of a split.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CaptionScores {
    /// METEOR 1.5, or what [`CaptionScores::meteor_label`] says.
    pub meteor: Scored,
    /// "METEOR" with the full tables; otherwise a name that says what was missing.
    pub meteor_label: &'static str,
    /// The others.
    #[serde(flatten)]
    pub words: WordScores,
}

/// The metrics that compare words only.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WordScores {
    /// CIDEr-D, 0 to 10.
    pub cider: Scored,
    /// BLEU-1 to BLEU-4 of the whole split.
    pub bleu: [f64; 4],
    /// ROUGE-L.
    pub rouge_l: Scored,
}

/// A picture's candidate and references as words.
#[derive(Debug, Clone)]
pub(crate) struct Words {
    pub(crate) candidate: Vec<String>,
    pub(crate) references: Vec<Vec<String>>,
}

/// Scores captions with all metrics. Document frequencies of CIDEr are those of `pairs`, so its value depends on
/// which pictures are scored together.
///
/// # Errors
/// [`Error::Request`] if there is no picture or one without a reference; whatever reading METEOR's tables gives.
pub fn score(pairs: &[CaptionPair], data: &MeteorData) -> Result<CaptionScores> {
    if pairs.is_empty() {
        return Err(Error::request("there are no captions to score", "check the predictions and the split"));
    }
    if let Some(lonely) = pairs.iter().position(|pair| pair.references.is_empty()) {
        return Err(Error::request(
            format!("caption {} (`{}`) has no reference", lonely + 1, pairs[lonely].candidate),
            "every picture needs at least one true caption",
        ));
    }
    let meteor =
        Meteor::new(data.clone(), pairs.iter().flat_map(|pair| &pair.references).map(String::as_str))?;
    let mut sum = Statistics::default();
    let compare = |pair: &CaptionPair| {
        let found = meteor.compare(&pair.candidate, &pair.references);
        sum.add(&found);
        found.score()
    };
    let per_image = pairs.iter().map(compare).collect();
    Ok(CaptionScores {
        meteor: Scored { all: sum.score(), per_image },
        meteor_label: data.label(),
        words: by_words(pairs),
    })
}

/// CIDEr, BLEU and ROUGE-L, which need no tables. Every picture needs a reference.
pub fn by_words(pairs: &[CaptionPair]) -> WordScores {
    let words: Vec<Words> = pairs
        .iter()
        .map(|pair| Words {
            candidate: tokens::tokenise(&pair.candidate),
            references: pair.references.iter().map(|text| tokens::tokenise(text)).collect(),
        })
        .collect();
    WordScores { cider: cider::cider(&words), bleu: bleu::bleu(&words), rouge_l: rouge::rouge_l(&words) }
}
