//! Similarity of answers without a judge. These numbers are not comparable with judges' and are always labelled.

use crate::qa::normalise;

/// Whether the answer is the gold answer but for case, ASCII punctuation and blanks around it.
pub fn exact(answer: &str, gold: &str) -> bool {
    normalise::exact(answer).trim() == normalise::exact(gold).trim()
}

/// Average normalised Levenshtein similarity of one answer: 1 − distance / length of the longer text, 0 if that is below
/// one half; case and blanks around do not count.
pub fn anls(answer: &str, gold: &str) -> f64 {
    let [a, b] = [answer, gold].map(|text| text.trim().to_lowercase().chars().collect::<Vec<char>>());
    let longer = a.len().max(b.len());
    if longer == 0 {
        return 1.0;
    }
    let similarity = 1.0 - distance(&a, &b) as f64 / longer as f64;
    if similarity < 0.5 { 0.0 } else { similarity }
}

fn distance(a: &[char], b: &[char]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.iter().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, to) in b.iter().enumerate() {
            let changed = diagonal + usize::from(from != to);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn similarity_below_one_half_is_none() {
        assert_eq!(anls("Hello", "hello "), 1.0);
        assert_eq!(anls("hallo", "hello"), 0.8);
        assert_eq!(anls("abcd", "abzz"), 0.5);
        assert_eq!(anls("abcd", "azzz"), 0.0);
        assert_eq!((anls("", ""), anls("", "a")), (1.0, 0.0));
        assert!(exact(" The Hague.", "the hague") && !exact("Hague", "the hague"));
    }
}
