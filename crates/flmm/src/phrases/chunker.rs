//! A small rule-based English noun chunker: closed word classes and a few endings.

use std::ops::Range;

/// Words that may open a noun chunk but not be all of it.
const OPENERS: &[&str] = &[
    "a", "an", "the", "this", "that", "these", "those", "my", "your", "his", "her", "its", "our", "their",
    "some", "any", "each", "every", "both", "several", "many", "few", "another", "other", "no", "all", "one",
    "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
];

/// Words that end a chunk: prepositions, conjunctions, pronouns, auxiliaries, common adverbs and answers.
const BREAKERS: &[&str] = &[
    "about",
    "above",
    "across",
    "after",
    "against",
    "along",
    "alongside",
    "among",
    "around",
    "as",
    "at",
    "before",
    "behind",
    "below",
    "beneath",
    "beside",
    "besides",
    "between",
    "beyond",
    "by",
    "down",
    "during",
    "except",
    "for",
    "from",
    "in",
    "inside",
    "into",
    "like",
    "near",
    "nearby",
    "of",
    "off",
    "on",
    "onto",
    "out",
    "outside",
    "over",
    "past",
    "per",
    "since",
    "than",
    "through",
    "throughout",
    "to",
    "toward",
    "towards",
    "under",
    "underneath",
    "until",
    "up",
    "upon",
    "via",
    "with",
    "within",
    "without",
    "and",
    "or",
    "but",
    "nor",
    "so",
    "yet",
    "because",
    "although",
    "though",
    "while",
    "if",
    "unless",
    "whether",
    "when",
    "where",
    "how",
    "why",
    "i",
    "you",
    "he",
    "she",
    "it",
    "we",
    "they",
    "me",
    "him",
    "us",
    "them",
    "who",
    "whom",
    "whose",
    "which",
    "what",
    "there",
    "here",
    "am",
    "is",
    "are",
    "was",
    "were",
    "be",
    "been",
    "being",
    "has",
    "have",
    "had",
    "having",
    "do",
    "does",
    "did",
    "can",
    "could",
    "will",
    "would",
    "shall",
    "should",
    "may",
    "might",
    "must",
    "not",
    "yes",
    "very",
    "too",
    "also",
    "just",
    "only",
    "then",
    "now",
    "again",
    "together",
    "apart",
    "away",
    "next",
    "close",
    "far",
    "most",
    "more",
    "less",
    "likely",
    "ready",
];

/// Verbs an answer about a picture uses, in the base form.
const VERBS: &[&str] = &[
    "appear", "carry", "contain", "cover", "depict", "drink", "drive", "eat", "face", "feature", "fill",
    "fly", "get", "give", "go", "hang", "hit", "hold", "include", "jump", "keep", "lay", "lean", "lie",
    "look", "make", "mean", "move", "open", "overlap", "place", "pull", "push", "put", "reach", "read",
    "rest", "ride", "run", "say", "see", "seem", "show", "sit", "sleep", "smile", "stand", "stay", "suggest",
    "surround", "take", "talk", "throw", "touch", "turn", "use", "wait", "walk", "wear", "work", "write",
];

/// Forms of [`VERBS`] that no ending rule makes.
const IRREGULAR: &[&str] = &[
    "drank", "drove", "ate", "flew", "gave", "given", "went", "hung", "held", "kept", "laid", "lain", "made",
    "ran", "rode", "said", "sat", "saw", "seen", "shown", "slept", "stood", "took", "taken", "threw", "wore",
    "worn", "wrote", "lying",
];

/// Byte ranges of the noun chunks of `text`, in order.
pub(super) fn chunks(text: &str) -> Vec<Range<usize>> {
    let words = words(text);
    let mut chunks = Vec::new();
    let mut open: Vec<&Range<usize>> = Vec::new();
    let mut last_end = 0;
    for word in &words {
        let lower = text[word.clone()].to_lowercase();
        let punctuated = text[last_end..word.start].chars().any(|c| !c.is_whitespace());
        let opener = OPENERS.contains(&lower.as_str());
        if punctuated || (opener && !only_openers(text, &open)) {
            close(text, &mut open, &mut chunks);
        }
        last_end = word.end;
        if ends_chunk(&lower, open.is_empty(), only_openers(text, &open)) {
            close(text, &mut open, &mut chunks);
        } else {
            open.push(word);
        }
    }
    close(text, &mut open, &mut chunks);
    chunks
}

/// Whether a word cannot be part of a noun chunk here. After an opener an unknown `-ing`/`-ed` word is an adjective
/// ("a parked car"), elsewhere a verb ("is parked", "the man riding").
fn ends_chunk(lower: &str, at_start: bool, after_openers_only: bool) -> bool {
    let after_opener = !at_start && after_openers_only;
    if BREAKERS.contains(&lower) || IRREGULAR.contains(&lower) {
        return true;
    }
    if lower.len() > 3 && lower.ends_with("ly") {
        return !matches!(lower, "family" | "butterfly" | "fly" | "jelly" | "belly" | "lily");
    }
    let base = |ending: &str, put_back: &str| {
        lower
            .strip_suffix(ending)
            .map(|stem| format!("{stem}{put_back}"))
            .is_some_and(|b| VERBS.contains(&b.as_str()))
    };
    let finite = VERBS.contains(&lower) || base("s", "") || base("es", "") || base("ies", "y");
    let verbal =
        (lower.len() > 4 && lower.ends_with("ing") && !matches!(lower, "building" | "string" | "ceiling"))
            || (lower.len() > 4 && lower.ends_with("ed") && !lower.ends_with("eed"));
    !after_opener && (finite || verbal)
}

fn only_openers(text: &str, open: &[&Range<usize>]) -> bool {
    open.iter().all(|word| OPENERS.contains(&text[(*word).clone()].to_lowercase().as_str()))
}

/// Ends the open chunk; it counts if it has more than openers.
fn close(text: &str, open: &mut Vec<&Range<usize>>, chunks: &mut Vec<Range<usize>>) {
    if let (Some(first), Some(last), false) = (open.first(), open.last(), only_openers(text, open)) {
        chunks.push(first.start..last.end);
    }
    open.clear();
}

/// Byte ranges of the words: letters, digits, and apostrophes or hyphens between them.
fn words(text: &str) -> Vec<Range<usize>> {
    let joins = |c: char| matches!(c, '\'' | '’' | '-');
    let mut words: Vec<Range<usize>> = Vec::new();
    let mut joined_to = None;
    for (at, c) in text.char_indices() {
        let end = at + c.len_utf8();
        if c.is_alphanumeric() {
            match words.last_mut() {
                Some(word) if word.end == at || joined_to == Some(at) => word.end = end,
                _ => words.push(at..end),
            }
        } else if joins(c) && words.last().is_some_and(|word| word.end == at) {
            joined_to = Some(end);
        }
    }
    words
}
