//! Text that is fed to the model to be grounded, with the phrase each token belongs to.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::text::tokenizer::Tokenizer;

/// Token ids behind the prompt, and for each the number of its phrase or −1.
///
/// Segments are encoded one by one without special tokens and concatenated (`spec/models.md` §3 rule 2).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Caption {
    /// Token ids.
    pub token_ids: Vec<u32>,
    /// Phrase of each token, counted from 0; −1 where a token belongs to none.
    pub mask_ids: Vec<i32>,
}

impl Caption {
    /// A text cut into segments; a segment with a number is (part of) that phrase.
    pub fn from_segments<'a>(
        tokenizer: &Tokenizer,
        segments: impl IntoIterator<Item = (&'a str, Option<usize>)>,
    ) -> Result<Self> {
        let mut caption = Self::default();
        for (text, phrase) in segments {
            let ids = tokenizer.encode(text, false)?;
            if ids.is_empty() && phrase.is_some() {
                return Err(Error::request(
                    format!("the phrase `{text}` has no tokens"),
                    "give phrases that contain at least one word",
                ));
            }
            caption.push(&ids, phrase.map_or(-1, |number| number as i32));
        }
        Ok(caption)
    }

    /// Expressions that are each a phrase, each followed by the separator: the last id of `encode(".")`
    /// (`spec/models.md` §3 rule 3).
    pub fn from_expressions<'a>(
        tokenizer: &Tokenizer,
        expressions: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self> {
        let separator = tokenizer.encode(".", false)?;
        let separator = separator.last().copied().ok_or_else(|| {
            Error::request(
                "the tokenizer has no token for `.`",
                "use the tokenizer that belongs to the model",
            )
        })?;
        let mut caption = Self::default();
        for (number, text) in expressions.into_iter().enumerate() {
            let phrase = Self::from_segments(tokenizer, [(text, Some(number))])?;
            caption.push(&phrase.token_ids, number as i32);
            caption.push(&[separator], -1);
        }
        Ok(caption)
    }

    /// `text` with the character ranges `phrases` (in any order, not overlapping) as phrases: the text between
    /// them is stripped of outer spaces, the phrases are encoded as they are (`spec/evaluation.md` §4).
    pub fn from_ranges(tokenizer: &Tokenizer, text: &str, phrases: &[Range<usize>]) -> Result<Self> {
        let chars: Vec<char> = text.chars().collect();
        let cut = |range: Range<usize>| chars.get(range).map(|part| part.iter().collect::<String>());
        let mut order: Vec<usize> = (0..phrases.len()).collect();
        order.sort_by_key(|&number| phrases[number].start);
        let mut segments: Vec<(String, Option<usize>)> = Vec::new();
        let mut end = 0;
        for number in order {
            let range = phrases[number].clone();
            let (Some(between), Some(phrase)) = (cut(end..range.start), cut(range.clone())) else {
                return Err(Error::request(
                    format!(
                        "the phrases at characters {range:?} and before {end} overlap, or leave the text"
                    ),
                    "give phrases that do not overlap",
                ));
            };
            segments.push((between.trim().to_owned(), None));
            segments.push((phrase, Some(number)));
            end = range.end;
        }
        segments.push((cut(end..chars.len()).unwrap_or_default().trim().to_owned(), None));
        let segments = segments.iter().filter(|(text, phrase)| phrase.is_some() || !text.is_empty());
        Self::from_segments(tokenizer, segments.map(|(text, phrase)| (text.as_str(), *phrase)))
    }

    /// Token numbers of every phrase, in order of phrase number.
    ///
    /// # Errors
    /// [`Error::Request`] if a phrase has no token, or if the lists differ in length.
    pub fn phrases(&self) -> Result<Vec<Vec<usize>>> {
        if self.token_ids.len() != self.mask_ids.len() {
            return Err(Error::request(
                format!("{} token ids but {} mask ids", self.token_ids.len(), self.mask_ids.len()),
                "give one mask id per token, −1 where a token belongs to no phrase",
            ));
        }
        let mut phrases: Vec<Vec<usize>> = Vec::new();
        for (token, &phrase) in self.mask_ids.iter().enumerate() {
            if let Ok(phrase) = usize::try_from(phrase) {
                if phrases.len() <= phrase {
                    phrases.resize_with(phrase + 1, Vec::new);
                }
                phrases[phrase].push(token);
            }
        }
        match phrases.iter().position(Vec::is_empty) {
            Some(empty) => Err(Error::request(
                format!("phrase {empty} of {} has no token", phrases.len()),
                "number phrases from 0 without gaps",
            )),
            None => Ok(phrases),
        }
    }

    /// Drops what lies behind the first `tokens` tokens, for models that cut a sequence off
    /// ([`crate::lmm::Lmm::reads_at_most`]).
    ///
    /// # Errors
    /// [`Error::Request`] if nothing would be left of a phrase: such a sample is skipped (`spec/models.md` §4).
    pub fn cut(&mut self, tokens: usize) -> Result<()> {
        if tokens >= self.token_ids.len() {
            return Ok(());
        }
        let lost = |phrase: &Vec<usize>| phrase.iter().all(|&token| token >= tokens);
        if let Some(number) = self.phrases()?.iter().position(lost) {
            return Err(Error::request(
                format!(
                    "phrase {number} is skipped: the model reads only the first {tokens} tokens of the text"
                ),
                "leave the phrase out, or shorten the text before it",
            ));
        }
        self.token_ids.truncate(tokens);
        self.mask_ids.truncate(tokens);
        Ok(())
    }

    fn push(&mut self, ids: &[u32], mask_id: i32) {
        self.token_ids.extend_from_slice(ids);
        self.mask_ids.extend(std::iter::repeat_n(mask_id, ids.len()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phrases_must_be_numbered_without_gaps() -> Result<()> {
        let caption =
            |mask_ids: &[i32]| Caption { token_ids: vec![7; mask_ids.len()], mask_ids: mask_ids.to_vec() };
        assert_eq!(caption(&[-1, 1, 0, 0, -1, 1]).phrases()?, vec![vec![2, 3], vec![1, 5]]);
        assert!(caption(&[0, 2]).phrases().is_err());
        assert!(Caption { token_ids: vec![1], mask_ids: Vec::new() }.phrases().is_err());
        Ok(())
    }

    #[test]
    fn a_cut_keeps_a_part_of_every_phrase() -> Result<()> {
        let whole = Caption { token_ids: vec![7; 6], mask_ids: vec![-1, 0, 0, 1, 1, -1] };
        for (tokens, left) in [(9, 6), (6, 6), (5, 5), (4, 4)] {
            let mut caption = whole.clone();
            caption.cut(tokens)?;
            assert_eq!((caption.token_ids.len(), caption.phrases()?.len()), (left, 2));
        }
        let mut caption = whole.clone();
        let message = caption.cut(3).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(message.contains("phrase 1 is skipped"), "{message}");
        assert_eq!(caption, whole);
        Ok(())
    }
}
