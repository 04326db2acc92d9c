//! MMBench's circular evaluation (`spec/evaluation.md` §6).

use std::collections::BTreeMap;

use flmm::Result;
use serde::Serialize;

use super::choice;

/// Copies of an item are numbered this far apart.
pub const ROTATION: u64 = 1_000_000;

/// How often the judge is asked for one reply.
pub const JUDGE_ATTEMPTS: usize = 3;

/// One copy of an item with the model's reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copy {
    /// Number of the item, plus a multiple of [`ROTATION`] for its rotated copies.
    pub index: u64,
    /// The question.
    pub question: String,
    /// The options it has: letter and text.
    pub options: Vec<(char, String)>,
    /// The right letter.
    pub answer: char,
    /// The model's reply.
    pub reply: String,
    /// Ability, the finest grouping.
    pub category: String,
    /// Second-level ability; may be empty.
    pub l2_category: String,
}

/// Accuracy over items, fractions.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct MmBenchScores {
    /// Items of which every copy is right.
    pub accuracy: f64,
    /// The same by category of the base item.
    pub category: BTreeMap<String, f64>,
    /// The same by second-level category of the base item.
    pub l2: BTreeMap<String, f64>,
    /// Copies that the rules could not decide and that mattered.
    pub unclear: usize,
}

/// Asks a judge about an unclear copy: the judge's reply to attempt number 0, 1, 2; `None` without a judge.
pub type AskJudge<'a> = dyn FnMut(&Copy, usize) -> Result<Option<String>> + 'a;

/// Circular evaluation: an item counts only if all its copies are right.
///
/// An item is wrong as soon as a copy that the rules can read is wrong; only where none is, `judge` is asked about
/// the copies that they cannot. Its reply is read by the same rules, at most three times; after that a letter is
/// drawn, always the same for the same copy. Where `judge` gives `None`, an unclear copy is wrong. The order of
/// `copies` does not matter.
///
/// # Errors
/// Those of `judge`.
pub fn circular(copies: &[Copy], judge: &mut AskJudge) -> Result<MmBenchScores> {
    let mut items: BTreeMap<u64, Vec<&Copy>> = BTreeMap::new();
    for copy in copies {
        items.entry(copy.index % ROTATION).or_default().push(copy);
    }
    let mut scores = MmBenchScores::default();
    let mut groups = [BTreeMap::new(), BTreeMap::new()];
    for copies in items.values_mut() {
        copies.sort_by_key(|copy| copy.index);
        let right = item_is_right(copies, judge, &mut scores.unclear)?;
        let Some(base) = copies.first() else { continue };
        for (group, name) in groups.iter_mut().zip([&base.category, &base.l2_category]) {
            let entry: &mut (usize, usize) = group.entry(name.clone()).or_default();
            entry.0 += usize::from(right);
            entry.1 += 1;
        }
    }
    let (right, all) = groups[0].values().fold((0, 0), |sum, group| (sum.0 + group.0, sum.1 + group.1));
    scores.accuracy = right as f64 / all.max(1) as f64;
    let [category, l2] = groups.map(|group| {
        group.into_iter().map(|(name, (right, all))| (name, right as f64 / all as f64)).collect()
    });
    Ok(MmBenchScores { category, l2, ..scores })
}

fn item_is_right(copies: &[&Copy], judge: &mut AskJudge, unclear: &mut usize) -> Result<bool> {
    let read: Vec<Option<char>> =
        copies.iter().map(|copy| choice::infer(&copy.reply, &copy.options)).collect();
    if copies.iter().zip(&read).any(|(copy, &letter)| letter.is_some_and(|letter| letter != copy.answer)) {
        return Ok(false);
    }
    for (copy, _) in copies.iter().zip(&read).filter(|(_, letter)| letter.is_none()) {
        *unclear += 1;
        if judged(copy, judge)? != Some(copy.answer) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn judged(copy: &Copy, judge: &mut AskJudge) -> Result<Option<char>> {
    for attempt in 0..JUDGE_ATTEMPTS {
        let Some(reply) = judge(copy, attempt)? else { return Ok(None) };
        if let Some(letter) = choice::infer(&reply, &copy.options) {
            return Ok(Some(letter));
        }
    }
    Ok(drawn(copy))
}

/// A letter that depends on the copy's number alone, so that repeated runs agree.
fn drawn(copy: &Copy) -> Option<char> {
    // One round of splitmix64.
    let mut x = copy.index.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    let count = copy.options.len() as u64;
    (count > 0).then(|| copy.options[((x ^ (x >> 31)) % count) as usize].0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copy(index: u64, answer: char, reply: &str) -> Copy {
        let options = vec![('A', "cat".to_owned()), ('B', "dog".to_owned())];
        Copy {
            index,
            question: "?".into(),
            options,
            answer,
            reply: reply.into(),
            category: "c".into(),
            l2_category: "l".into(),
        }
    }

    #[test]
    fn the_judge_is_asked_only_where_it_matters() {
        let mut asked = Vec::new();
        let copies = [copy(7, 'A', "?"), copy(1_000_007, 'B', "A"), copy(8, 'A', "?"), copy(9, 'B', "a dog")];
        let scores = circular(&copies, &mut |copy, attempt| {
            asked.push((copy.index, attempt));
            Ok(Some(if attempt == 2 { "A".into() } else { "no idea".into() }))
        });
        let scores = scores.unwrap();
        assert_eq!(asked, [(8, 0), (8, 1), (8, 2)]);
        assert_eq!((scores.accuracy, scores.unclear), (2.0 / 3.0, 1));
    }

    #[test]
    fn without_a_judge_unclear_is_wrong_and_a_lost_judge_draws_the_same_letter() {
        let copies = [copy(8, 'A', "?")];
        assert_eq!(circular(&copies, &mut |_, _| Ok(None)).unwrap().accuracy, 0.0);
        let draw = || circular(&copies, &mut |_, _| Ok(Some("?".into()))).unwrap().accuracy;
        assert_eq!(draw(), draw());
    }
}
