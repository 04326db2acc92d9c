//! Texts that end an answer, whatever tokens they are made of.

use super::chat::ends_with;
use super::tokenizer::Tokenizer;

/// Watches generated tokens for texts that end the answer (`spec/models.md` §2): one matches when the decoded text,
/// without CR and LF, ends with it.
#[derive(Debug)]
pub struct StopWords<'a> {
    tokenizer: &'a Tokenizer,
    words: Vec<String>,
    /// How many tokens at the end are looked at: more than the longest word has bytes, and some line breaks.
    window: usize,
    /// The last tokens, at most `window`.
    ids: Vec<u32>,
}

impl<'a> StopWords<'a> {
    /// Nothing is generated yet. Blank words are left out: they would end every answer.
    pub fn new<'w>(tokenizer: &'a Tokenizer, words: impl IntoIterator<Item = &'w str>) -> Self {
        let words: Vec<String> = words.into_iter().map(letters).filter(|word| !word.is_empty()).collect();
        let window = 32 + words.iter().map(String::len).max().unwrap_or(0);
        Self { tokenizer, words, window, ids: Vec::new() }
    }

    /// Counts `id`; whether the answer ends with it.
    pub fn push(&mut self, id: u32) -> bool {
        self.ids.push(id);
        self.ids.drain(..self.ids.len().saturating_sub(self.window));
        let text = self.text(self.ids.len());
        self.words.iter().any(|word| ends_with(&text, word))
    }

    /// How many of the last tokens are part of a stop word, or may become part of one with what comes: at least 1,
    /// because an answer is without its last token.
    pub fn held(&self) -> usize {
        let whole = letters(&self.text(self.ids.len()));
        // A character of which only some bytes are there may become any.
        let whole = whole.trim_end_matches('\u{fffd}');
        let begun = |word: &String| {
            let ends = word.char_indices().map(|(at, c)| at + c.len_utf8());
            ends.filter(|&end| whole.ends_with(&word[..end])).max().unwrap_or(0)
        };
        let begun = self.words.iter().map(begun).max().unwrap_or(0);
        let clear =
            |tokens: &usize| letters(&self.text(self.ids.len() - tokens)).len() + begun <= whole.len();
        (1..self.ids.len()).find(clear).unwrap_or(self.ids.len()).max(1)
    }

    /// The text of the tokens looked at before number `end`.
    fn text(&self, end: usize) -> String {
        match self.words.is_empty() {
            true => String::new(),
            false => self.tokenizer.decode(&self.ids[..end], false),
        }
    }
}

/// `text` without CR and LF.
fn letters(text: &str) -> String {
    text.chars().filter(|c| !matches!(c, '\r' | '\n')).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn tokenizer() -> Tokenizer {
        Tokenizer::load(
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/lmm/deepseek_vl_1_3b/model"),
        )
        .unwrap()
    }

    /// Number of tokens of `text` after which each of `words` ends the answer, and how many are then held back.
    fn stopped(text: &str, words: &[&str]) -> Option<(usize, usize, usize)> {
        let tokenizer = tokenizer();
        let ids = tokenizer.encode(text, false).unwrap();
        let mut stop = StopWords::new(&tokenizer, words.iter().copied());
        let mut released = 0;
        for (at, &id) in ids.iter().enumerate() {
            if stop.push(id) {
                assert!(released + stop.held() <= at + 1, "a part of the stop word was let go");
                return Some((ids.len(), at + 1, stop.held()));
            }
            released = released.max(at + 1 - stop.held());
        }
        None
    }

    #[test]
    fn words_of_several_tokens_end_an_answer() {
        let word = "zq\u{e9}x";
        let tokens = tokenizer().encode(word, false).unwrap().len();
        assert!(tokens > 2);
        let (all, at, held) = stopped(&format!("dog{word}"), &[word]).unwrap();
        assert_eq!((at, held), (all, tokens));
        // Line breaks within it do not count.
        let (all, at, held) = stopped(&format!("dog{}", word.replace('q', "q\n\r\n")), &[word]).unwrap();
        assert!(at == all && held >= tokens);
        assert_eq!(stopped("dog zqx", &[word]), None);
        assert_eq!(stopped("dog\n", &["", "\n"]), None);
        let (_, at, held) = stopped("a dog. b", &["."]).unwrap();
        assert_eq!((at, held), (tokenizer().encode("a dog.", false).unwrap().len(), 1));
    }

    #[test]
    fn what_may_become_a_stop_word_is_held_back() {
        let tokenizer = tokenizer();
        let mut stop = StopWords::new(&tokenizer, ["zqx"]);
        let mut held = Vec::new();
        for id in tokenizer.encode("azqzq\u{e9}b", false).unwrap() {
            assert!(!stop.push(id));
            held.push(stop.held());
        }
        assert!(held.iter().any(|&tokens| tokens > 1), "{held:?}");
        assert_eq!(held.last(), Some(&1), "{held:?}");
    }
}
