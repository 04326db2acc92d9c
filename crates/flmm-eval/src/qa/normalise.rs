//! Replies and gold answers in the form in which they are compared (`spec/evaluation.md` §6).

use std::collections::HashMap;
use std::sync::LazyLock;

/// Lower case without ASCII punctuation: what GQA and AI2D compare. Blanks count, at the ends too.
pub fn exact(text: &str) -> String {
    text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect()
}

/// Whether `reply` is `gold` but for case and ASCII punctuation.
pub fn exact_match(reply: &str, gold: &str) -> bool {
    exact(reply) == exact(gold)
}

/// What VQA's own evaluation compares: punctuation, number words, articles and contractions made uniform.
pub fn vqa(text: &str) -> String {
    let text: String = text.chars().map(|c| if matches!(c, '\n' | '\t') { ' ' } else { c }).collect();
    let text = without_punctuation(text.trim());
    let words = text.split_whitespace().map(str::to_lowercase).map(|word| digit(&word).unwrap_or(word));
    let words = words.filter(|word| !matches!(word.as_str(), "a" | "an" | "the"));
    let words = words.map(|word| CONTRACTIONS.get(word.as_str()).map_or(word.clone(), |&w| w.to_owned()));
    words.collect::<Vec<_>>().join(" ")
}

/// The marks that are taken out. Dots and apostrophes have rules of their own.
const MARKS: [char; 21] = [
    ';', '/', '[', ']', '"', '{', '}', '(', ')', '=', '+', '\\', '_', '-', '>', '<', '@', '`', ',', '?', '!',
];

fn without_punctuation(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    // Python's `\d` takes the digits of every script.
    let thousands = chars.windows(3).any(|w| w[0].is_numeric() && w[1] == ',' && w[2].is_numeric());
    // Whether a mark vanishes or becomes a blank is decided once for all of its kind, by the text as it came.
    let vanishes = |mark: char| {
        thousands || chars.windows(2).any(|w| (w[0] == mark && w[1] == ' ') || (w[0] == ' ' && w[1] == mark))
    };
    let mut kept = Vec::with_capacity(chars.len());
    for &c in &chars {
        match MARKS.contains(&c) {
            false => kept.push(c),
            true if vanishes(c) => {}
            true => kept.push(' '),
        }
    }
    let is_digit = |at: usize| kept.get(at).is_some_and(|c: &char| c.is_numeric());
    let keep = |&(at, &c): &(usize, &char)| c != '.' || is_digit(at + 1);
    kept.iter().enumerate().filter(keep).map(|(_, &c)| c).collect()
}

fn digit(word: &str) -> Option<String> {
    const WORDS: [&str; 11] =
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"];
    match word {
        "none" => Some("0".into()),
        word => WORDS.iter().position(|&w| w == word).map(|n| n.to_string()),
    }
}

/// Words of an answer that lost their apostrophe, and what they were: the table of the VQA evaluation tools, whose
/// quirks (`somebody'd`) are kept. Its entries with capital letters never apply to lower-cased words.
static CONTRACTIONS: LazyLock<HashMap<&str, &str>> =
    LazyLock::new(|| include_str!("contractions.txt").lines().filter_map(|l| l.split_once(' ')).collect());

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_second_copy_of_a_mark_decides_for_all() {
        assert_eq!(vqa("a-b - c"), "ab c");
        assert_eq!(vqa("red-white, 1,000"), "redwhite 1000");
        assert_eq!(vqa("v1.5 ."), "v1.5");
    }

    #[test]
    fn contractions_come_back() {
        assert_eq!(vqa("Dont"), "don't");
        assert_eq!(vqa("ow's'at"), "'ow's'at");
        assert_eq!(CONTRACTIONS.len(), 114);
    }

    #[test]
    fn exact_match_does_not_trim() {
        assert!(exact_match("T-Shirt.", "tshirt"));
        assert!(!exact_match(" yes", "yes"));
    }
}
