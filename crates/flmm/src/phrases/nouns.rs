//! From noun chunks to the phrases worth a mask (`spec/evaluation.md` §8).

use std::ops::Range;

use super::{char_range, chunker};

/// Chunks that are never an object, lower case.
const NEVER: [&str; 20] = [
    "it", "this", "that", "those", "these", "them", "he", "she", "you", "i", "they", "me", "her", "him", "a",
    "what", "which", "whose", "who", "",
];

/// Character ranges of the noun phrases of an English text, by rules alone.
///
/// A stand-in for a parser where a head has no keyword selector: closed word classes, a few endings, no dictionary of
/// nouns. It finds "the small red car"; it mistakes unknown verbs for nouns and does not resolve names or gerunds.
pub fn noun_phrases(text: &str) -> Vec<Range<usize>> {
    let chunks: Vec<&str> = chunker::chunks(text).into_iter().map(|range| &text[range]).collect();
    match chunks.is_empty() {
        true => Vec::new(),
        false => pick_chunks(text, &chunks),
    }
}

/// Which of a parser's noun chunks become phrases, as character ranges of `answer` in order of occurrence.
///
/// The chunks are a set; if it is empty the whole answer is one chunk. Chunks about the image itself, pronouns, and
/// parts of other chunks are dropped; what is left is taken at its first occurrence unless that overlaps the last one.
pub fn pick_chunks<S: AsRef<str>>(answer: &str, chunks: &[S]) -> Vec<Range<usize>> {
    let mut set: Vec<&str> = Vec::new();
    for chunk in chunks.iter().map(AsRef::as_ref) {
        if !set.contains(&chunk) {
            set.push(chunk);
        }
    }
    if set.is_empty() {
        set.push(answer);
    }
    let part_of_another = |i: usize| {
        let inside = |(j, other): (usize, &&str)| {
            j != i && other.contains(set[i]) && (set[i].len() < other.len() || j < i)
        };
        set.iter().enumerate().any(inside)
    };
    let about_an_object = |chunk: &str| {
        let lower = chunk.to_lowercase();
        !lower.contains("image") && !NEVER.contains(&lower.as_str())
    };
    let mut found: Vec<Range<usize>> = (0..set.len())
        .filter(|&i| about_an_object(set[i]) && !part_of_another(i))
        .filter_map(|i| answer.find(set[i]).map(|byte| byte..byte + set[i].len()))
        .collect();
    found.sort_by_key(|range| (range.start, range.end));
    let mut end = 0;
    found.retain(|range| {
        let free = range.start >= end;
        if free {
            end = range.end;
        }
        free
    });
    found.into_iter().map(|bytes| char_range(answer, bytes)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phrases(text: &str) -> Vec<String> {
        let chars: Vec<char> = text.chars().collect();
        noun_phrases(text).into_iter().map(|r| chars[r].iter().collect()).collect()
    }

    #[test]
    fn simple_sentences() {
        assert_eq!(
            phrases("A small red car is parked to the left of the dog."),
            ["A small red car", "the left", "the dog"]
        );
        assert_eq!(
            phrases("There are two cats and a tennis ball on a wooden table."),
            ["two cats", "a tennis ball", "a wooden table"]
        );
        assert_eq!(phrases("Yes, there is a banana."), ["a banana"]);
        assert_eq!(phrases("The man is quickly riding his bike"), ["The man", "his bike"]);
        assert_eq!(phrases("It is the image of a dog’s tail."), ["a dog’s tail"]);
    }

    #[test]
    fn nothing_to_ground() {
        assert!(phrases("Yes.").is_empty());
        assert!(phrases("").is_empty());
        assert!(phrases("It is not.").is_empty());
    }
}
