//! Text that grows token by token.

use super::tokenizer::Tokenizer;

/// Decodes ids as they come and gives out text that later ids cannot change.
///
/// Characters of several tokens appear when complete. The pieces together are the text that decoding all ids at
/// once gives (except for byte tokens that never become valid UTF-8: what was valid before them stays).
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    ids: Vec<u32>,
    told: String,
}

impl<'a> TextStream<'a> {
    /// An empty stream.
    pub fn new(tokenizer: &'a Tokenizer, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, ids: Vec::new(), told: String::new() }
    }

    /// The text that became certain with `id`; often a word, sometimes nothing.
    pub fn push(&mut self, id: u32) -> String {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids, self.skip_special);
        let certain = certain(&text, self.tokenizer.cleans_up()).to_owned();
        self.tell(&certain)
    }

    /// What is left when no more ids come.
    pub fn finish(mut self) -> String {
        let text = self.tokenizer.decode(&self.ids, self.skip_special);
        self.tell(&text)
    }

    /// The ids so far.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    fn tell(&mut self, text: &str) -> String {
        let new = text.strip_prefix(self.told.as_str()).unwrap_or_default().to_owned();
        self.told.push_str(&new);
        new
    }
}

/// The part of `text` that more tokens cannot change.
fn certain(text: &str, cleans_up: bool) -> &str {
    let text = text.trim_end_matches('\u{fffd}');
    // A space is removed again if punctuation or a contraction (up to three characters) follows.
    match text.rfind(' ') {
        Some(space) if cleans_up && text.len() - space <= 4 => &text[..space],
        _ => text,
    }
}
