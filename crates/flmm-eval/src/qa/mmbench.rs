//! MMBench's circular evaluation (`spec/evaluation.md` §6).

use std::collections::BTreeMap;

use flmm::Result;
use serde::{Deserialize, Serialize};

use super::choice;
use crate::judge::READINGS;

/// Copies of an item are numbered this far apart.
pub const ROTATION: u64 = 1_000_000;

/// One copy of an item and the letter that the model's reply means.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copy {
    /// Number of the item, plus a multiple of [`ROTATION`] for its rotated copies.
    pub index: u64,
    /// The right letter.
    pub answer: char,
    /// What the rules read ([`choice::infer`]).
    pub read: Option<char>,
    /// What the judge says where the rules cannot tell.
    #[serde(default)]
    pub judged: Option<char>,
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
    /// Copies that neither the rules nor a judge could tell: they count as wrong.
    pub unclear: usize,
}

/// Circular evaluation: an item counts only if all its copies are right. The order of `copies` does not matter.
///
/// The published harness asks its judge about an item only while no copy is known to be wrong; the accuracy is the same.
pub fn circular(copies: &[Copy]) -> MmBenchScores {
    let mut items: BTreeMap<u64, Vec<&Copy>> = BTreeMap::new();
    for copy in copies {
        items.entry(copy.index % ROTATION).or_default().push(copy);
    }
    let mut groups = [BTreeMap::new(), BTreeMap::new()];
    let (mut right_items, mut unclear) = (0, 0);
    for copies in items.values() {
        let Some(base) = copies.iter().min_by_key(|copy| copy.index) else { continue };
        let letter = |copy: &&&Copy| copy.read.or(copy.judged);
        let right = copies.iter().all(|copy| letter(&copy) == Some(copy.answer));
        unclear += copies.iter().filter(|copy| letter(copy).is_none()).count();
        right_items += usize::from(right);
        for (group, name) in groups.iter_mut().zip([&base.category, &base.l2_category]) {
            let entry: &mut (usize, usize) = group.entry(name.clone()).or_default();
            entry.0 += usize::from(right);
            entry.1 += 1;
        }
    }
    let [category, l2] = groups.map(|group| {
        group.into_iter().map(|(name, (right, all))| (name, right as f64 / all as f64)).collect()
    });
    MmBenchScores { accuracy: right_items as f64 / items.len().max(1) as f64, category, l2, unclear }
}

/// What a judge takes an unclear reply for: `ask` gives the judge's reply to attempt number 0, 1, 2, or `None` if there is
/// no judge or it fails. The first reply that the rules can read counts; after three that they cannot, a letter is drawn,
/// always the same for the same copy.
///
/// # Errors
/// Those of `ask`.
pub fn judged(
    index: u64,
    options: &[(char, String)],
    mut ask: impl FnMut(usize) -> Result<Option<String>>,
) -> Result<Option<char>> {
    for attempt in 0..READINGS {
        let Some(reply) = ask(attempt)? else { return Ok(None) };
        if let Some(letter) = choice::infer(&reply, options) {
            return Ok(Some(letter));
        }
    }
    Ok(drawn(index, options))
}

/// A letter that depends on the copy's number alone, so that repeated runs agree.
fn drawn(index: u64, options: &[(char, String)]) -> Option<char> {
    // One round of splitmix64.
    let mut x = index.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    let count = options.len() as u64;
    (count > 0).then(|| options[((x ^ (x >> 31)) % count) as usize].0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Vec<(char, String)> {
        vec![('A', "cat".to_owned()), ('B', "dog".to_owned())]
    }

    #[test]
    fn every_copy_must_be_right_and_unclear_ones_are_not() {
        let copy = |index, read, judged| Copy {
            index,
            answer: 'A',
            read,
            judged,
            category: format!("c{}", index % 2),
            l2_category: String::new(),
        };
        let copies = [
            copy(1_000_001, Some('A'), None),
            copy(1, None, Some('A')),
            copy(2, Some('A'), None),
            copy(1_000_002, Some('B'), Some('A')),
            copy(4, None, None),
        ];
        let scores = circular(&copies);
        assert_eq!((scores.accuracy, scores.unclear), (1.0 / 3.0, 1));
        assert_eq!(scores.category, BTreeMap::from([("c0".into(), 0.0), ("c1".into(), 1.0)]));
    }

    #[test]
    fn a_judge_is_asked_three_times_then_a_letter_is_drawn() {
        let mut asked = Vec::new();
        let letter = judged(8, &options(), |attempt| {
            asked.push(attempt);
            Ok(Some(if attempt == 2 { "B".into() } else { "no idea".into() }))
        });
        assert_eq!((letter.unwrap(), asked), (Some('B'), vec![0, 1, 2]));
        let draw = || judged(8, &options(), |_| Ok(Some("?".into()))).unwrap();
        assert!(draw().is_some() && draw() == draw());
        assert_eq!(judged(8, &options(), |_| Ok(None)).unwrap(), None);
    }
}
