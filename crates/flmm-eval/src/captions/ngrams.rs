//! Counting runs of words.

use std::collections::BTreeMap;

/// Longest run that BLEU and CIDEr look at.
pub(crate) const LONGEST: usize = 4;

/// How often each run of one to four words occurs. Ordered, so that sums over it are the same on every run.
pub(crate) type Counts<'a> = BTreeMap<&'a [String], usize>;

/// Runs of one to [`LONGEST`] words of `words`.
pub(crate) fn count(words: &[String]) -> Counts<'_> {
    let mut counts = Counts::new();
    for run in (1..=LONGEST).flat_map(|n| words.windows(n)) {
        *counts.entry(run).or_default() += 1;
    }
    counts
}
