//! Benchmarks whose replies are "yes" or "no": POPE and MME (`spec/evaluation.md` §6).

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

/// What a reply to a yes-no question says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Yes.
    Yes,
    /// No.
    No,
    /// Neither: always wrong.
    Other,
}

impl Verdict {
    /// POPE's rule: the whole reply, but for case and blanks around it, is the word. "yes." is neither.
    pub fn strict(reply: &str) -> Self {
        Self::word(&reply.trim().to_lowercase())
    }

    /// MME's rule: dots are left out; a single letter `y` or `n` counts, and else "yes" before "no" anywhere in
    /// the first four characters.
    pub fn lenient(reply: &str) -> Self {
        let text = reply.to_lowercase().trim().replace('.', "");
        let verdict = match text.as_str() {
            "y" => Self::Yes,
            "n" => Self::No,
            text => Self::word(text),
        };
        if verdict != Self::Other {
            return verdict;
        }
        let start: String = text.chars().take(4).collect();
        match (start.contains("yes"), start.contains("no")) {
            (true, _) => Self::Yes,
            (false, true) => Self::No,
            (false, false) => Self::Other,
        }
    }

    fn word(text: &str) -> Self {
        match text {
            "yes" => Self::Yes,
            "no" => Self::No,
            _ => Self::Other,
        }
    }
}

/// POPE's measures, fractions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PopeScores {
    /// Replies that equal the gold answer.
    pub accuracy: f64,
    /// Of the replies "yes", those that are right.
    pub precision: f64,
    /// Of the objects that are there, those found; replies that are neither yes nor no do not count.
    pub recall: f64,
    /// Harmonic mean of precision and recall.
    pub f1: f64,
}

/// POPE's measures of pairs (reply, gold answer), both read by [`Verdict::strict`]. What would be 0/0 is 0.
pub fn pope(rows: impl IntoIterator<Item = (Verdict, Verdict)>) -> PopeScores {
    let mut counts: HashMap<(Verdict, Verdict), usize> = HashMap::new();
    let mut total = 0;
    for row in rows {
        *counts.entry(row).or_default() += 1;
        total += 1;
    }
    let count = |reply, gold| *counts.get(&(reply, gold)).unwrap_or(&0);
    use Verdict::{No, Yes};
    let hits = count(Yes, Yes);
    let precision = share(hits, hits + count(Yes, No));
    let recall = share(hits, hits + count(No, Yes));
    let sum = precision + recall;
    PopeScores {
        accuracy: share(hits + count(No, No), total),
        precision,
        recall,
        f1: if sum == 0.0 { 0.0 } else { 2.0 * precision * recall / sum },
    }
}

fn share(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// The sub-tasks of MME that are about seeing.
pub const MME_PERCEPTION: [&str; 10] = [
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
];

/// The sub-tasks of MME that are about reasoning.
pub const MME_COGNITION: [&str; 4] =
    ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"];

/// One reply of MME.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmeScore {
    /// The picture that the question belongs to; there are two questions about each.
    pub question_id: String,
    /// The sub-task.
    pub category: String,
    /// Whether the reply is right.
    pub right: bool,
}

/// Whether MME counts `reply` as right. One that is neither yes nor no never is.
pub fn mme_right(reply: &str, gold: &str) -> bool {
    let verdict = Verdict::lenient(reply);
    verdict != Verdict::Other && verdict == Verdict::lenient(gold)
}

/// MME's points.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MmeScores {
    /// Sum over the ten sub-tasks of perception, at most 2000.
    pub perception: f64,
    /// Sum over the four sub-tasks of cognition, at most 800.
    pub cognition: f64,
    /// Points of every sub-task that occurs, at most 200 each.
    pub categories: BTreeMap<String, f64>,
}

/// MME's points: per picture 100 × the share of right replies, and 100 more if both are right; averaged over the
/// pictures of a sub-task, then summed. A sub-task of an unknown name counts in neither sum.
pub fn mme(scores: &[MmeScore]) -> MmeScores {
    // Per category and picture: right replies, replies.
    let mut pictures: BTreeMap<&str, BTreeMap<&str, (usize, usize)>> = BTreeMap::new();
    for score in scores {
        let picture = pictures.entry(&score.category).or_default().entry(&score.question_id).or_default();
        picture.0 += usize::from(score.right);
        picture.1 += 1;
    }
    let points =
        |&(right, asked): &(usize, usize)| 100.0 * share(right, asked) + if right == 2 { 100.0 } else { 0.0 };
    let mean = |pictures: &BTreeMap<&str, (usize, usize)>| {
        pictures.values().map(points).sum::<f64>() / pictures.len() as f64
    };
    let categories: BTreeMap<String, f64> =
        pictures.iter().map(|(&category, pictures)| (category.to_owned(), mean(pictures))).collect();
    // The sum of nothing is −0.
    let sum = |names: &[&str]| names.iter().filter_map(|&name| categories.get(name)).sum::<f64>() + 0.0;
    MmeScores { perception: sum(&MME_PERCEPTION), cognition: sum(&MME_COGNITION), categories }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_that_are_neither_are_always_wrong() {
        assert!(!mme_right("maybe", "maybe"));
        let read = |(reply, gold)| (Verdict::strict(reply), Verdict::strict(gold));
        assert_eq!(pope([("maybe", "yes")].map(read)).accuracy, 0.0);
        assert_eq!(pope([]), PopeScores { accuracy: 0.0, precision: 0.0, recall: 0.0, f1: 0.0 });
    }

    #[test]
    fn both_questions_right_count_twice() {
        let score = |right| MmeScore { question_id: "a".into(), category: "OCR".into(), right };
        assert_eq!(mme(&[score(true), score(true)]).perception, 200.0);
        assert_eq!(mme(&[score(true), score(false)]).perception, 50.0);
    }
}
