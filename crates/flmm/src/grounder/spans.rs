//! Phrases of a text as characters and tokens, and the text's growth token by token.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::phrases::{PhraseChoice, char_range_to_tokens, noun_phrases, select_keywords};
use crate::text::tokenizer::Tokenizer;

/// A phrase before it is grounded: characters and tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) chars: Range<usize>,
    pub(super) tokens: Range<usize>,
}

/// The phrases of `text`, whose token `t` covers the characters `offsets[t]`.
///
/// `probs` are the tokens' keyword probabilities; the keyword selector takes runs above `lambda`.
pub(super) fn select(
    choice: &PhraseChoice,
    text: &str,
    offsets: &[Range<usize>],
    probs: Option<&[f32]>,
    lambda: f32,
) -> Result<Vec<Span>> {
    let chars: Vec<char> = text.chars().collect();
    let ranges = match choice {
        PhraseChoice::NounPhrases => noun_phrases(text),
        PhraseChoice::Given(phrases) => find_phrases(text, phrases)?,
        PhraseChoice::Keywords => {
            let Some(probs) = probs else {
                return Err(Error::request(
                    "the grounding head has no keyword selector",
                    "choose noun phrases, or name the phrases",
                ));
            };
            let texts: Vec<String> = offsets.iter().map(|range| chars[range.clone()].iter().collect()).collect();
            let spans = select_keywords(probs, &texts, lambda).into_iter().map(|tokens| {
                let covered = offsets[tokens.start].start..offsets[tokens.end - 1].end;
                Span { chars: trimmed(&chars, covered), tokens }
            });
            return Ok(spans.collect());
        }
    };
    let span = |chars: Range<usize>| Span { tokens: char_range_to_tokens(offsets, chars.clone()), chars };
    Ok(ranges.into_iter().map(span).collect())
}

/// Characters of each phrase: its next occurrence behind the previous phrase, else its first.
pub(super) fn find_phrases(text: &str, phrases: &[String]) -> Result<Vec<Range<usize>>> {
    let mut behind = 0;
    let mut found = Vec::with_capacity(phrases.len());
    for phrase in phrases {
        let phrase = phrase.trim();
        let place = if phrase.is_empty() {
            None
        } else {
            text[behind..].find(phrase).map(|at| behind + at).or_else(|| text.find(phrase))
        };
        let Some(start) = place else {
            return Err(Error::request(
                format!("the phrase `{phrase}` is not in the text `{text}`"),
                "write the phrase exactly as it stands in the text",
            ));
        };
        behind = start + phrase.len();
        let first = text[..start].chars().count();
        found.push(first..first + phrase.chars().count());
    }
    Ok(found)
}

/// Whether any two ranges share a character.
pub(super) fn overlapping(ranges: &[Range<usize>]) -> bool {
    let mut sorted = ranges.to_vec();
    sorted.sort_by_key(|range| range.start);
    sorted.windows(2).any(|pair| pair[1].start < pair[0].end)
}

/// The text of `ids` and the characters each token adds to it.
pub(super) fn token_offsets(tokenizer: &Tokenizer, ids: &[u32]) -> (String, Vec<Range<usize>>) {
    let text = tokenizer.decode(ids, false);
    let total = text.chars().count();
    let mut start = 0;
    let offsets = (1..=ids.len()).map(|count| {
        let end = if count == ids.len() {
            total
        } else {
            complete(&tokenizer.decode(&ids[..count], false)).chars().count()
        };
        let range = start..end.clamp(start, total);
        start = range.end;
        range
    });
    (text, offsets.collect())
}

/// `text` without a character at its end that more tokens may complete.
fn complete(text: &str) -> &str {
    text.trim_end_matches('\u{fffd}')
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

/// The text of tokens as they are generated, one token late: the last token is not part of the answer.
pub(super) struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    /// Bytes already told.
    told: usize,
}

impl<'a> TextStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, ids: Vec::new(), told: 0 }
    }

    /// Tells what the token before `id` added to the text.
    pub(super) fn push(&mut self, id: u32, on_text: &mut dyn FnMut(&str)) {
        let text = self.tokenizer.decode(&self.ids, false);
        self.tell(complete(&text), on_text);
        self.ids.push(id);
    }

    /// Tells what is left of the whole answer `text`.
    pub(super) fn finish(mut self, text: &str, on_text: &mut dyn FnMut(&str)) {
        self.tell(text, on_text);
    }

    fn tell(&mut self, text: &str, on_text: &mut dyn FnMut(&str)) {
        if let Some(piece) = text.get(self.told..).filter(|piece| !piece.is_empty()) {
            on_text(piece);
            self.told = text.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phrases_are_found_in_characters() -> Result<()> {
        let phrases = |list: &[&str]| list.iter().map(|phrase| phrase.to_string()).collect::<Vec<_>>();
        let text = "Ein Café, ein Hund, ein Hund.";
        assert_eq!(find_phrases(text, &phrases(&["ein Hund", "ein Hund", "Café"]))?, [10..18, 20..28, 4..8]);
        for missing in ["Katze", " "] {
            let error = find_phrases(text, &phrases(&[missing])).err().map(|error| error.to_string());
            assert!(error.is_some_and(|error| error.contains("is not in the text")));
        }
        assert!(overlapping(&[4..8, 0..5]));
        assert!(!overlapping(&[4..8, 0..4]));
        Ok(())
    }
}
