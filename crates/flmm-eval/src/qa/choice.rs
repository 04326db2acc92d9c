//! Which option a free reply means: AI2D and MMBench (`spec/evaluation.md` §6).

/// Letters that options can have.
const LETTERS: [char; 5] = ['A', 'B', 'C', 'D', 'E'];

/// AI2D's reading of a reply: one that begins, after blanks, with a capital letter and a dot is that letter; any
/// other stays as it is.
pub fn leading_letter(reply: &str) -> &str {
    let text = reply.trim_start();
    let bytes = text.as_bytes();
    match bytes {
        [letter, b'.', ..] if letter.is_ascii_uppercase() => &text[..1],
        _ => reply,
    }
}

/// MMBench's rules A to C: the option that the reply means, or `None` if they cannot tell.
///
/// `options` are (letter, text) of those that the question has.
pub fn infer(reply: &str, options: &[(char, String)]) -> Option<char> {
    infer_letter(reply).or_else(|| infer_text(reply, options))
}

/// Rules A and B: exactly one of the letters A to E stands in the reply as a word, bare or decorated. E is looked
/// for even where there is no such option: it is a wrong answer then, not an unclear one.
pub fn infer_letter(reply: &str) -> Option<char> {
    let words: Vec<&str> = reply.split_whitespace().collect();
    let only = |before: &str, after: &str| {
        let named = |letter: &&char| words.contains(&format!("{before}{letter}{after}").as_str());
        let mut found = LETTERS.iter().filter(named);
        match (found.next(), found.next()) {
            (Some(&letter), None) => Some(letter),
            _ => None,
        }
    };
    // In a longer reply "A" may be an article.
    let article = words.contains(&"A") && words.len() > 3;
    if let (Some(letter), false) = (only("", ""), article) {
        return Some(letter);
    }
    const DECORATIONS: [(&str, &str); 12] = [
        ("", "."),
        ("", ","),
        ("", ":"),
        ("", ")"),
        ("", ")."),
        ("(", ")"),
        ("(", ")."),
        (":", ""),
        (":", ","),
        (":", "."),
        (":", ")"),
        (":", ")."),
    ];
    DECORATIONS.iter().find_map(|(before, after)| only(before, after))
}

/// Rule C: the reply contains the text of exactly one option.
pub fn infer_text(reply: &str, options: &[(char, String)]) -> Option<char> {
    let reply = reply.to_lowercase();
    let mut found = options.iter().filter(|(_, text)| reply.contains(&text.to_lowercase()));
    match (found.next(), found.next()) {
        (Some(&(letter, _)), None) => Some(letter),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_capital_letter_with_a_dot_leads() {
        assert_eq!(leading_letter(" \nC. stem"), "C");
        assert_eq!(leading_letter("Ä. x"), "Ä. x");
        assert_eq!(leading_letter(""), "");
    }
}
