//! Penn Treebank words, as the tokeniser of the public caption tools makes them.
//!
//! At every place the longest of a list of patterns wins; clitics (`'s`, `n't`) are split from their words. What
//! remains is lower-cased, and punctuation is dropped.

use std::sync::LazyLock;

use regex::Regex;

/// Tokens that the caption tools drop. Brackets are spared, because by then they are written in lower case.
const PUNCTUATION: [&str; 14] = ["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", ""];

/// One word and what may be joined to it by hyphens, slashes and underscores.
const WORD: &str = r"[\p{L}\p{Nd}][\p{L}\p{Nd}\p{M}]*";

/// Patterns, tried at the current place; the longest match is the next token.
static PATTERNS: LazyLock<Vec<Regex>> = LazyLock::new(|| {
    let patterns = [
        // Words: hyphens, slashes and underscores join; so do dots and marks with letters on both sides.
        format!(r"{WORD}(?:[-_/]{WORD})*"),
        r"\p{L}[\p{L}\p{Nd}]*(?:[.!?]\p{L}[\p{L}\p{Nd}]*)+".to_owned(),
        // Words with an apostrophe inside: o'clock, d'ye, O'Neil, ma'am; and cut-off ones: 'em, '80s, 'n', y'all.
        format!(r"[dDoOlL]'{WORD}"),
        r"(?i)ma'am|y'|'n'|'(?:em|tis|twas|cause|til|till|n)\b".to_owned(),
        r"'\d\ds\b".to_owned(),
        // Clitics.
        r"(?i)'(?:s|m|d|re|ve|ll)\b|n't\b".to_owned(),
        // Numbers: 1,000.50, 12:30, 3/4, .5; a sign is not part of them.
        r"\d+(?:[,.:/-]\d+)*|\.\d+".to_owned(),
        // Abbreviations keep their dot, and so do initials: a.m., U.S.-based, J. Smith.
        format!(r"\p{{L}}(?:\.\p{{L}})+\.?(?:-{WORD})*|\p{{Lu}}\."),
        format!(r"(?:{ABBREVIATIONS})\.|(?i)(?:etc|vs)\."),
        // Names of the network.
        r#"(?i)(?:https?://|www\.)[^\s"<>|()]*[^\s"<>|()\[\]{}.,;:!?'-]"#.to_owned(),
        r"[\p{L}\d._%+-]+@[\p{L}\d-]+(?:\.[\p{L}\d-]+)*".to_owned(),
        r"[@#]\p{L}[\p{L}\d_]*".to_owned(),
        r"</?\p{L}[^<>]*>".to_owned(),
        // Letters and signs that belong together: AT&T, C++, US$.
        r"\p{Lu}+(?:&\p{Lu}+)+|[cC]\+\+|[A-Z]{1,2}\$".to_owned(),
        // Runs of marks.
        r"[!?]{2,}|-{2,}|\.{3,}|''|``".to_owned(),
        r"[:;=][-o']?(?:[()]|[DP]\b)".to_owned(),
    ];
    // The patterns are constants that a test compiles.
    patterns.iter().filter_map(|pattern| Regex::new(&format!("^(?:{pattern})")).ok()).collect()
});

/// Titles, months and places that keep their dot where they begin with a capital letter.
const ABBREVIATIONS: &str = "Mr|Mrs|Ms|Messrs|Dr|Drs|Prof|St|Mt|Ft|Sen|Gov|Gen|Rep|Reps|Lt|Col|Maj|Sgt|Capt|Rev|Hon|Pres|\
Jr|Sr|Inc|Co|Corp|Ltd|Bros|Ave|Blvd|Rd|Jan|Feb|Mar|Apr|Aug|Sept?|Oct|Nov|Dec|Ph\\.D";

/// Words that are two, and where they are cut.
const CUT: [(&str, usize); 7] =
    [("cannot", 3), ("gonna", 3), ("gotta", 3), ("wanna", 3), ("gimme", 3), ("lemme", 3), ("'tis", 2)];

/// The words of a caption, lower case, without punctuation.
pub fn tokenise(caption: &str) -> Vec<String> {
    let text = plain(caption);
    let mut tokens = Vec::new();
    let mut at = 0;
    while let Some(next) = text[at..].chars().next() {
        if next.is_whitespace() || next.is_control() {
            at += next.len_utf8();
            continue;
        }
        let length = length_at(&text, at).max(next.len_utf8());
        push(&mut tokens, &text[at..at + length]);
        at += length;
    }
    tokens
}

/// Length in bytes of the token that starts at `at`; 0 where no pattern fits.
fn length_at(text: &str, at: usize) -> usize {
    let rest = &text[at..];
    let longest = PATTERNS.iter().filter_map(|pattern| pattern.find(rest)).map(|found| found.end()).max();
    let length = longest.unwrap_or(0);
    // `couldn` + `'t` is `could` + `n't`.
    let tail = &rest[length..];
    let negated = tail.get(..2).is_some_and(|t| t.eq_ignore_ascii_case("'t"))
        && !tail[2..].starts_with(char::is_alphanumeric)
        && rest[..length].ends_with(['n', 'N']);
    if negated && length > 1 { length - 1 } else { length }
}

/// Adds a token in the form that the tools compare, unless it is punctuation.
fn push(tokens: &mut Vec<String>, token: &str) {
    let lower = token.to_lowercase();
    if let Some((word, cut)) = CUT.iter().find(|(word, _)| *word == lower) {
        tokens.extend([word[..*cut].to_owned(), word[*cut..].to_owned()]);
        return;
    }
    if lower == "'twas" {
        tokens.extend(["'t".to_owned(), "was".to_owned()]);
        return;
    }
    let written = match lower.as_str() {
        "\"" => return,
        "€" => "$".to_owned(),
        "£" => "#".to_owned(),
        _ if lower.contains("--") && lower.trim_matches('-').is_empty() => return,
        _ if lower.len() > 2 && lower.trim_matches('.').is_empty() => return,
        _ => brackets(&lower),
    };
    if !PUNCTUATION.contains(&written.as_str()) {
        tokens.push(written);
    }
}

/// Brackets as the treebank writes them, in lower case.
fn brackets(token: &str) -> String {
    const NAMES: [(char, &str); 6] =
        [('(', "-lrb-"), (')', "-rrb-"), ('[', "-lsb-"), (']', "-rsb-"), ('{', "-lcb-"), ('}', "-rcb-")];
    let mut out = String::with_capacity(token.len());
    for c in token.chars() {
        match NAMES.iter().find(|(bracket, _)| *bracket == c) {
            Some((_, name)) => out.push_str(name),
            None => out.push(c),
        }
    }
    out
}

/// Typographic marks, character entities and fractions in the form that the patterns know.
fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '‘' | '’' => out.push('\''),
            '“' | '”' | '«' | '»' | '„' => out.push('"'),
            '‹' | '›' => out.push('`'),
            '–' | '—' => out.push_str("--"),
            '…' => out.push_str("..."),
            '½' => out.push_str(" 1/2 "),
            '¼' => out.push_str(" 1/4 "),
            '¾' => out.push_str(" 3/4 "),
            '\u{ad}' => {}
            c => out.push(c),
        }
    }
    for (entity, sign) in
        [("&lt;", " < "), ("&gt;", " > "), ("&quot;", "\""), ("&apos;", "'"), ("&amp;", "&")]
    {
        if out.contains(entity) {
            out = out.replace(entity, sign);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_patterns_are_valid() {
        assert_eq!(PATTERNS.len(), 16);
    }

    #[test]
    fn clitics_and_contractions_are_split() {
        let joined = |text: &str| tokenise(text).join(" ");
        assert_eq!(joined("It's a small child's cake."), "it 's a small child 's cake");
        assert_eq!(joined("They can't, couldn’t've; cannot!"), "they ca n't could n't 've can not");
        assert_eq!(
            joined("a black-and-white dog, 3.5 (red) U.S. flags"),
            "a black-and-white dog 3.5 -lrb- red -rrb- u.s. flags"
        );
        assert_eq!(
            joined("Mr. Smith's 1,000 e-mails at 5 p.m. -- \"really\"?!"),
            "mr. smith 's 1,000 e-mails at 5 p.m. really ?!"
        );
        assert_eq!(joined("dogs' 'n' o'clock '80s"), "dogs 'n' o'clock '80s");
        assert!(tokenise(" .,;").is_empty());
    }
}
