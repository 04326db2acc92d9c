//! METEOR's own second look at words: it splits what the treebank joins (`black-and-white`, `U.S.`) before matching.

use std::collections::HashSet;
use std::sync::LazyLock;

use regex::Regex;

/// Letters, and letters with digits, of the western alphabets.
const ALPHA: &str = "A-Za-zŠŽšžŸÀ-ÖØ-öø-žЀ-ӿԀ-ԧꙀ-ꙮ꙾-ꚗᴀ-ᵿ";

/// What is replaced, in this order. Every rule sees what the ones before left.
static RULES: LazyLock<Vec<(Regex, &str)>> = LazyLock::new(|| {
    let a = ALPHA;
    let rules = [
        // Signs stand alone.
        (format!(r"([^0-9{a}\s.'`,\-‘’])"), " $1 "),
        // Commas too, except inside numbers.
        (r"([^0-9]),([^0-9])".to_owned(), "$1 , $2"),
        (r"([0-9]),([^0-9])".to_owned(), "$1 , $2"),
        (r"([^0-9]),([0-9])".to_owned(), "$1 , $2"),
        (r"[`‘’]".to_owned(), "'"),
        (r"[“”]|''".to_owned(), " \" "),
        (r"–|--".to_owned(), " - "),
        // Hyphens between words are blanks.
        (format!(r"([0-9{a}.])-([0-9{a}])"), "$1 $2"),
        // Apostrophes: alone, or with the letters behind them.
        (format!(r"([^{a}])'([^{a}])"), "$1 ' $2"),
        (format!(r"([^{a}0-9])'([{a}])"), "$1 ' $2"),
        (format!(r"([{a}])'([^{a}])"), "$1 ' $2"),
        (format!(r"([{a}])'([{a}])"), "$1 '$2"),
        (r"([0-9])'(s)".to_owned(), "$1 '$2"),
    ];
    rules.into_iter().filter_map(|(pattern, by)| Some((Regex::new(&pattern).ok()?, by))).collect()
});

/// The words METEOR compares. `kept_dots` are abbreviations whose dot belongs to them.
pub(super) fn normalise(line: &str, kept_dots: &HashSet<String>) -> Vec<String> {
    let mut text = format!(" {line} ");
    for (pattern, by) in RULES.iter() {
        if let std::borrow::Cow::Owned(replaced) = pattern.replace_all(&text, *by) {
            text = replaced;
        }
    }
    let mut words: Vec<String> = Vec::new();
    let pieces: Vec<&str> = text.split_whitespace().collect();
    for (i, piece) in pieces.iter().enumerate() {
        let stem = match piece.strip_suffix('.') {
            Some(stem) if !stem.is_empty() => stem,
            _ => {
                words.push((*piece).to_owned());
                continue;
            }
        };
        let continues = pieces.get(i + 1).is_some_and(|next| next.starts_with(char::is_lowercase));
        if stem.contains('.') && stem.contains(char::is_alphabetic) {
            // u.s. → us
            words.push(piece.replace('.', ""));
        } else if kept_dots.contains(stem) || continues {
            words.push((*piece).to_owned());
        } else {
            words.extend([stem.to_owned(), ".".to_owned()]);
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_rules_are_valid() {
        assert_eq!(RULES.len(), 13);
    }

    #[test]
    fn joined_words_are_split() {
        let kept = HashSet::from(["mr".to_owned()]);
        let joined = |text: &str| normalise(text, &kept).join(" ");
        assert_eq!(joined("it 's a small child 's cake do n't"), "it ' s a small child ' s cake do n 't");
        assert_eq!(joined("black-and-white u.s. mr. end."), "black and white us mr. end .");
        assert_eq!(joined("1,000 x,y a/b dogs' 90's"), "1,000 x , y a / b dogs ' 90 's");
    }
}
