//! Judges' replies as numbers (`spec/evaluation.md` §5.4, §6).

/// The score in a reply to [`super::Role::VisCot`]: the number behind the only `score: `, at most 1. 0 if there is no such
/// number. Dots behind the number do not count.
pub fn viscot_score(reply: &str) -> f64 {
    const MARK: &str = "score: ";
    let reply = reply.to_lowercase();
    let mut found = reply.match_indices(MARK).filter_map(|(at, _)| {
        let rest = &reply[at + MARK.len()..];
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        (end > 0).then(|| &rest[..end])
    });
    let (Some(number), None) = (found.next(), found.next()) else { return 0.0 };
    number.trim_end_matches('.').parse().map_or(0.0, |score: f64| score.clamp(0.0, 1.0))
}

/// The score in a reply to [`super::Role::MmVet`]: its first word, a number from 0 to 1. `None` if it is not.
pub fn mmvet_score(reply: &str) -> Option<f64> {
    let word = reply.split_whitespace().next()?.trim_end_matches(['.', ',']);
    word.parse().ok().filter(|score| (0.0..=1.0).contains(score))
}

/// The two scores in a reply to [`super::Role::LlavaBench`], of reference and answer: the two numbers of the first line.
/// `None` if it has not just two numbers that are at least 0.
pub fn llavabench_scores(reply: &str) -> Option<(f64, f64)> {
    let line = reply.trim_start().lines().next()?.replace(',', " ");
    let numbers: Option<Vec<f64>> = line.split_whitespace().map(|word| word.parse().ok()).collect();
    match numbers?[..] {
        [reference, answer] if reference >= 0.0 && answer >= 0.0 && (reference + answer).is_finite() => {
            Some((reference, answer))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_end_a_sentence_count() {
        assert_eq!(viscot_score("Score: 0.5."), 0.5);
        assert_eq!(viscot_score("score: 1..2"), 0.0);
        assert_eq!(viscot_score("score: ."), 0.0);
        assert_eq!(viscot_score("İ score: 1"), 1.0);
    }

    #[test]
    fn replies_of_another_form_are_not_guessed() {
        assert_eq!(mmvet_score("0.7\n"), Some(0.7));
        assert_eq!(mmvet_score("1.0."), Some(1.0));
        for reply in ["", "seven", "1.5", "-0.1", "NaN"] {
            assert_eq!(mmvet_score(reply), None, "{reply}");
        }
        assert_eq!(llavabench_scores("8, 9\nBecause 3"), Some((8.0, 9.0)));
        for reply in ["", "8", "8 9 10", "8/10 9/10", "inf 1", "-1 2"] {
            assert_eq!(llavabench_scores(reply), None, "{reply}");
        }
    }
}
