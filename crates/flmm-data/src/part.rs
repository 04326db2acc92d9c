//! Work shared out: part `i` of `n` of a list of samples, as `--shard i/n` names it.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

/// One of several parts, each of samples that follow each other: neighbours often share their picture.
///
/// Written `i/n` with `i` from 1 to `n`; the default is the whole, `1/1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// From 0.
    pub index: usize,
    /// How many there are, at least 1.
    pub count: usize,
}

impl Default for Part {
    fn default() -> Self {
        Self { index: 0, count: 1 }
    }
}

impl Part {
    /// The numbers of its samples among `samples`.
    pub fn range(self, samples: usize) -> Range<usize> {
        let start = |part: usize| (part as u128 * samples as u128 / self.count.max(1) as u128) as usize;
        start(self.index)..start(self.index + 1)
    }
}

/// `i-of-n`, as it stands in names of files.
impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-of-{}", self.index + 1, self.count)
    }
}

impl FromStr for Part {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split_once('/');
        let numbers = numbers.and_then(|(i, n)| Some((i.trim().parse().ok()?, n.trim().parse().ok()?)));
        match numbers {
            Some((number @ 1.., count)) if number <= count => Ok(Self { index: number - 1, count }),
            _ => Err("expected i/n with i from 1 to n, for example 2/8".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_share_out_all_samples() {
        for samples in [0, 1, 7, 100] {
            for count in 1..9 {
                let parts = (0..count).flat_map(|index| Part { index, count }.range(samples));
                assert!(parts.eq(0..samples));
            }
        }
        let last = Part { index: usize::MAX - 1, count: usize::MAX };
        assert_eq!(last.range(usize::MAX), usize::MAX - 1..usize::MAX);
    }

    #[test]
    fn parts_are_counted_from_one() {
        let part: Part = "2/4".parse().unwrap();
        assert_eq!((part, part.to_string()), (Part { index: 1, count: 4 }, "2-of-4".to_owned()));
        for wrong in ["", "1", "0/3", "4/3", "a/b", "1/0", "-1/2"] {
            assert!(wrong.parse::<Part>().is_err(), "{wrong}");
        }
    }
}
