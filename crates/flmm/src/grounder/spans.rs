//! Phrases of a text as characters and tokens.

use std::ops::Range;

use crate::error::Result;
use crate::phrases::{PhraseChoice, char_range_to_tokens, cut, find_phrases, noun_phrases, select_keywords};

/// A phrase before it is grounded: characters and tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) chars: Range<usize>,
    pub(super) tokens: Range<usize>,
}

/// The phrases of a text that are to be grounded.
pub(super) struct Chosen<'a> {
    pub(super) text: &'a str,
    pub(super) spans: &'a [Span],
    /// Keyword probability of every token, where the head has a selector.
    pub(super) probs: Option<&'a [f32]>,
}

impl Chosen<'_> {
    /// Mean keyword probability of the tokens of `span`; 1 without a selector.
    pub(super) fn score(&self, span: &Span) -> f32 {
        let mean = |probs: &[f32]| probs.iter().sum::<f32>() / probs.len() as f32;
        self.probs.map_or(1.0, |probs| mean(&probs[span.tokens.clone()]))
    }
}

/// The phrases of `text`, whose token `t` covers the characters `offsets[t]`.
///
/// `probs` are the tokens' keyword probabilities; the keyword selector takes runs above `lambda`. A head without
/// a selector falls back on noun phrases. A given phrase that is not in the text is an error.
pub(super) fn select(
    choice: &PhraseChoice,
    text: &str,
    offsets: &[(usize, usize)],
    probs: Option<&[f32]>,
    lambda: f32,
) -> Result<Vec<Span>> {
    let ranges = match (choice, probs) {
        (PhraseChoice::Keywords, Some(probs)) => {
            let chars: Vec<char> = text.chars().collect();
            let spans = select_keywords(probs, &cut(&chars, offsets), lambda).into_iter().map(|tokens| {
                let covered = offsets[tokens.start].0..offsets[tokens.end - 1].1;
                Span { chars: trimmed(&chars, covered), tokens }
            });
            return Ok(spans.collect());
        }
        (PhraseChoice::Keywords, None) | (PhraseChoice::NounPhrases, _) => noun_phrases(text),
        (PhraseChoice::Given(phrases), _) => find_phrases(text, phrases)?,
    };
    let span = |chars: Range<usize>| Some(Span { tokens: char_range_to_tokens(&chars, offsets)?, chars });
    Ok(ranges.into_iter().filter_map(span).collect())
}

/// Whether any two ranges share a character.
pub(super) fn overlapping(ranges: &[Range<usize>]) -> bool {
    let mut sorted = ranges.to_vec();
    sorted.sort_by_key(|range| range.start);
    sorted.windows(2).any(|pair| pair[1].start < pair[0].end)
}

/// `range` without white space at its ends.
fn trimmed(chars: &[char], mut range: Range<usize>) -> Range<usize> {
    while range.start < range.end && chars[range.start].is_whitespace() {
        range.start += 1;
    }
    while range.start < range.end && chars[range.end - 1].is_whitespace() {
        range.end -= 1;
    }
    range
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_overlap_in_any_order() {
        assert!(overlapping(&[4..8, 0..5]));
        assert!(!overlapping(&[4..8, 0..4]));
    }

    #[test]
    fn white_space_at_the_ends_is_not_part_of_a_phrase() {
        let chars: Vec<char> = " a cat ".chars().collect();
        assert_eq!(trimmed(&chars, 0..7), 1..6);
        assert!(trimmed(&chars, 6..7).is_empty());
    }
}
