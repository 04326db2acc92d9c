//! Which words of an answer are grounded: keyword runs, given substrings, noun phrases; and their tokens.

mod chunker;
mod nouns;
mod tokens;

use std::ops::Range;

use crate::{Error, Result};

pub use nouns::{noun_phrases, pick_chunks};
pub(crate) use tokens::cut;
pub use tokens::{average_precision, token_offsets, token_texts, true_ranges};

/// Keyword threshold λ of the published method (`spec/training.md` §8.2).
pub const LAMBDA: f32 = 0.3;

/// How the phrases of an answer are chosen.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum PhraseChoice {
    /// The head's keyword selector; noun-phrase rules where the head has none.
    #[default]
    Keywords,
    /// The rule-based chunker ([`noun_phrases`]).
    NounPhrases,
    /// These substrings of the text, in this order ([`find_phrases`]).
    Given(Vec<String>),
}

/// Maximal runs of tokens with `probs > lambda`, without special tokens, blanks and punctuation at their two ends
/// (`spec/training.md` §8.2, steps 1–3). `texts[i]` is token `i` as text; both slices have one entry per token.
pub fn select_keywords<S: AsRef<str>>(probs: &[f32], texts: &[S], lambda: f32) -> Vec<Range<usize>> {
    let count = probs.len().min(texts.len());
    let mut runs = Vec::new();
    let mut at = 0;
    while at < count {
        let end = at + probs[at..count].iter().take_while(|&&p| p > lambda).count();
        let mut run = at..end;
        while !run.is_empty() && !has_content(texts[run.start].as_ref()) {
            run.start += 1;
        }
        while !run.is_empty() && !has_content(texts[run.end - 1].as_ref()) {
            run.end -= 1;
        }
        if !run.is_empty() {
            runs.push(run);
        }
        at = end + 1;
    }
    runs
}

/// Whether a token is more than a special token, white space or punctuation.
fn has_content(text: &str) -> bool {
    let special = text.len() > 2 && text.starts_with('<') && text.ends_with('>');
    !special && text.chars().any(char::is_alphanumeric)
}

/// Character ranges (Unicode scalars) of given substrings. The same substring given twice means its first and
/// second occurrence. An error names the first one that is not there.
pub fn find_phrases<S: AsRef<str>>(text: &str, phrases: &[S]) -> Result<Vec<Range<usize>>> {
    let mut found: Vec<Range<usize>> = Vec::with_capacity(phrases.len());
    for phrase in phrases.iter().map(AsRef::as_ref) {
        if phrase.trim().is_empty() {
            return Err(Error::request(
                "a phrase is empty",
                "give a part of the text, for example `the dog`",
            ));
        }
        let next = text
            .match_indices(phrase)
            .map(|(byte, _)| char_range(text, byte..byte + phrase.len()))
            .find(|range| !found.contains(range));
        found.push(next.ok_or_else(|| {
            Error::request(
                format!("the phrase `{phrase}` does not occur in `{text}`"),
                "phrases are exact parts of the text: check spelling and capital letters",
            )
        })?);
    }
    Ok(found)
}

/// A byte range of `text` in characters. Both ends must lie on character borders.
pub(crate) fn char_range(text: &str, bytes: Range<usize>) -> Range<usize> {
    let start = text[..bytes.start].chars().count();
    start..start + text[bytes].chars().count()
}

/// Tokens that cover a character range, given every token's `[start, end)` in characters
/// (`spec/evaluation.md` §8, "fix"): from the token with the first character to before the first token that starts
/// at or after the end. `None` if the range is empty or lies behind the last token.
pub fn char_range_to_tokens(chars: &Range<usize>, offsets: &[(usize, usize)]) -> Option<Range<usize>> {
    if chars.is_empty() {
        return None;
    }
    let start = offsets.iter().position(|&(_, end)| end > chars.start)?;
    let end = offsets.iter().position(|&(begin, _)| begin >= chars.end).unwrap_or(offsets.len());
    (end > start).then_some(start..end)
}

/// [`char_range_to_tokens`] as the published code does it: the end is the token that contains the character after the
/// phrase, so a phrase before a gap between tokens reaches to the end of the answer (`spec/evaluation.md` §8, quirk).
pub fn char_range_to_tokens_reference(
    chars: &Range<usize>,
    offsets: &[(usize, usize)],
) -> Option<Range<usize>> {
    let token_of = |c: usize| offsets.iter().position(|&(start, end)| start <= c && c < end);
    let start = token_of(chars.start)?;
    let end = token_of(chars.end).unwrap_or(offsets.len());
    Some(start..end.max(start + 1))
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "lists of ranges are what is tested")]
mod tests {
    use super::*;

    #[test]
    fn runs_lose_punctuation_at_their_ends_only() {
        let texts = ["The", " cat", "-", "dog", ",", " and", ".", "</s>"];
        let probs = [0.1, 0.9, 0.31, 0.8, 0.9, 0.3, 0.9, 0.9];
        assert_eq!(select_keywords(&probs, &texts, LAMBDA), [1..4]);
        let all = [0.9; 8];
        assert_eq!(select_keywords(&all, &texts, LAMBDA), [0..6]);
        assert_eq!(select_keywords(&[f32::NAN, 0.9], &["a", "b"], LAMBDA), [1..2]);
    }

    #[test]
    fn given_phrases_are_found_by_characters() -> Result<()> {
        let text = "Ein Käfer, ein Käfer.";
        assert_eq!(find_phrases(text, &["Käfer", "Käfer"])?, [4..9, 15..20]);
        let missing = find_phrases(text, &["Hund"]).unwrap_err();
        assert!(missing.to_string().contains("`Hund` does not occur"));
        assert!(find_phrases(text, &[" "]).is_err());
        Ok(())
    }

    #[test]
    fn a_range_behind_the_tokens_has_none() {
        assert_eq!(char_range_to_tokens(&(9..12), &[(0, 4), (4, 8)]), None);
        assert_eq!(char_range_to_tokens(&(3..3), &[(0, 4)]), None);
    }
}
