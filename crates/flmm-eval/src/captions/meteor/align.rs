//! The alignment: which words of a candidate match which of a reference.
//!
//! Every possible match is listed first. Then a beam search walks over the reference and keeps the alignments that
//! cover most, break into the fewest pieces, and move words the least.

use rust_stemmers::{Algorithm, Stemmer};

use super::data::{Paraphrases, Synonyms};
use super::{MODULES, WEIGHTS};

/// Alignments kept at every step.
const BEAM: usize = 40;

/// Words `at..at + at_length` of the candidate match words `start..start + length` of the reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Match {
    pub(super) module: usize,
    pub(super) start: usize,
    pub(super) length: usize,
    pub(super) at: usize,
    pub(super) at_length: usize,
}

/// Matches in order of the reference, no word used twice.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Alignment {
    pub(super) matches: Vec<Match>,
    /// Runs of matches that lie next to each other in both sentences.
    pub(super) chunks: usize,
}

/// Finds alignments with the tables at hand.
pub(super) struct Aligner<'a> {
    stemmer: Stemmer,
    synonyms: Option<&'a Synonyms>,
    paraphrases: Option<&'a Paraphrases>,
}

/// All matches, by where they start in the reference, and how many cover each word.
struct Candidates {
    starting: Vec<Vec<Match>>,
    cover: Vec<usize>,
    cover_at: Vec<usize>,
}

impl Candidates {
    fn add(&mut self, found: Match) {
        self.starting[found.start].push(found);
        self.cover[found.start..found.start + found.length].iter_mut().for_each(|n| *n += 1);
        self.cover_at[found.at..found.at + found.at_length].iter_mut().for_each(|n| *n += 1);
    }
}

impl<'a> Aligner<'a> {
    pub(super) fn new(synonyms: Option<&'a Synonyms>, paraphrases: Option<&'a Paraphrases>) -> Self {
        Self { stemmer: Stemmer::create(Algorithm::English), synonyms, paraphrases }
    }

    /// The best alignment the beam finds.
    pub(super) fn align(&self, candidate: &[String], reference: &[String]) -> Alignment {
        let found = self.candidates(candidate, reference);
        let matches = search(&found);
        let chunks = count_chunks(&matches);
        Alignment { matches, chunks }
    }

    /// Every match of every kind. Sentences that are the same match word by word only.
    fn candidates(&self, candidate: &[String], reference: &[String]) -> Candidates {
        let mut found = Candidates {
            starting: vec![Vec::new(); reference.len()],
            cover: vec![0; reference.len()],
            cover_at: vec![0; candidate.len()],
        };
        let single = |module, start, at| Match { module, start, length: 1, at, at_length: 1 };
        let pairs = || (0..reference.len()).flat_map(|start| (0..candidate.len()).map(move |at| (start, at)));
        for (start, at) in pairs().filter(|&(start, at)| reference[start] == candidate[at]) {
            found.add(single(0, start, at));
        }
        if candidate == reference {
            return found;
        }
        let stems =
            |words: &[String]| words.iter().map(|word| self.stemmer.stem(word).into_owned()).collect();
        let (stems, stems_at): (Vec<String>, Vec<String>) = (stems(reference), stems(candidate));
        let differ = |&(start, at): &(usize, usize)| reference[start] != candidate[at];
        for (start, at) in pairs().filter(differ).filter(|&(start, at)| stems[start] == stems_at[at]) {
            found.add(single(1, start, at));
        }
        if let Some(synonyms) = self.synonyms {
            let senses = |words: &[String]| words.iter().map(|word| synonyms.senses(word)).collect();
            let (senses, senses_at): (Vec<Vec<u32>>, Vec<Vec<u32>>) = (senses(reference), senses(candidate));
            let related = |&(start, at): &(usize, usize)| {
                let other: &Vec<u32> = &senses_at[at];
                senses[start].iter().any(|sense| other.contains(sense))
            };
            for (start, at) in pairs().filter(differ).filter(related) {
                found.add(single(2, start, at));
            }
        }
        if let Some(paraphrases) = self.paraphrases {
            // The table is read in both directions; an entry that is in it both ways counts twice.
            paraphrases.find(reference, candidate, |start, length, at, at_length| {
                found.add(Match { module: 3, start, length, at, at_length });
            });
            paraphrases.find(candidate, reference, |at, at_length, start, length| {
                found.add(Match { module: 3, start, length, at, at_length });
            });
        }
        found
    }
}

/// An alignment of the first words of the reference.
#[derive(Clone)]
struct Path {
    matches: Vec<Option<Match>>,
    used: Vec<bool>,
    used_at: Vec<bool>,
    /// Weighted covered words of both sentences, cut to whole numbers after every addition as METEOR 1.5 does: a
    /// single stem or synonym adds nothing.
    covered: [usize; 2],
    chunks: usize,
    distance: usize,
    /// First word of the reference that is not decided.
    next: usize,
    /// Behind the last match in the candidate, if the previous word of the reference was matched.
    last_end: Option<usize>,
}

impl Path {
    fn occupy(&mut self, m: &Match) {
        self.used[m.start..m.start + m.length].iter_mut().for_each(|u| *u = true);
        self.used_at[m.at..m.at + m.at_length].iter_mut().for_each(|u| *u = true);
        self.matches[m.start] = Some(*m);
    }

    fn is_free(&self, m: &Match) -> bool {
        !self.used[m.start..m.start + m.length].contains(&true)
            && !self.used_at[m.at..m.at + m.at_length].contains(&true)
    }

    /// Counts a match at the current word.
    fn take(&mut self, m: &Match) {
        let add = |sum: usize, words: usize| (sum as f64 + words as f64 * WEIGHTS[m.module]) as usize;
        self.covered = [add(self.covered[0], m.at_length), add(self.covered[1], m.length)];
        if self.last_end.is_some_and(|end| end != m.at) {
            self.chunks += 1;
        }
        self.next = m.start + m.length;
        self.last_end = Some(m.at + m.at_length);
    }

    /// Ends the current chunk, if there is one.
    fn close(&mut self) {
        self.chunks += usize::from(self.last_end.take().is_some());
    }

    /// Smaller is better.
    fn rank(&self) -> (std::cmp::Reverse<usize>, usize, usize) {
        (std::cmp::Reverse(self.covered[0] + self.covered[1]), self.chunks, self.distance)
    }
}

/// Beam search from the first to the last word of the reference. Equal alignments keep their order.
fn search(found: &Candidates) -> Vec<Match> {
    let words = found.starting.len();
    let mut first = Path {
        matches: vec![None; words],
        used: vec![false; words],
        used_at: vec![false; found.cover_at.len()],
        covered: [0; 2],
        chunks: 0,
        distance: 0,
        next: 0,
        last_end: None,
    };
    // Matches without any rival are part of every alignment.
    for list in &found.starting {
        if let [only] = list.as_slice()
            && found.cover[only.start..only.start + only.length].iter().all(|&n| n == 1)
            && found.cover_at[only.at..only.at + only.at_length].iter().all(|&n| n == 1)
        {
            first.occupy(only);
        }
    }
    let mut paths = vec![first];
    for (word, list) in found.starting.iter().enumerate() {
        paths.sort_by_key(Path::rank);
        paths.truncate(BEAM);
        let mut longer = Vec::with_capacity(paths.len() * 2);
        for mut path in paths {
            extend(&mut path, word, list, &mut longer);
            longer.push(path);
        }
        paths = longer;
    }
    paths.sort_by_key(Path::rank);
    paths.truncate(BEAM);
    paths.iter_mut().for_each(Path::close);
    paths.sort_by_key(Path::rank);
    let best = paths.into_iter().next();
    best.map(|path| path.matches.into_iter().flatten().collect()).unwrap_or_default()
}

/// Adds the ways to match `word` to `longer` and turns `path` into the way that goes on without one of them.
fn extend(path: &mut Path, word: usize, list: &[Match], longer: &mut Vec<Path>) {
    if path.used[word] {
        // Inside a longer match there is nothing to decide; at a match without rivals it is counted.
        if word >= path.next
            && let Some(settled) = path.matches[path.next]
        {
            path.take(&settled);
            path.distance += settled.start.abs_diff(settled.at);
        }
        return;
    }
    for m in list {
        if path.is_free(m) {
            let mut other = path.clone();
            other.occupy(m);
            other.take(m);
            longer.push(other);
            // METEOR 1.5 adds the distance to the path that goes on without the match, not to the one with it.
            path.distance += m.start.abs_diff(m.at);
        }
    }
    path.close();
    path.next += 1;
}

/// Runs of matches that are neighbours in both sentences.
fn count_chunks(matches: &[Match]) -> usize {
    let joined = |pair: &&[Match]| {
        pair[0].start + pair[0].length == pair[1].start && pair[0].at + pair[0].at_length == pair[1].at
    };
    matches.len() - matches.windows(2).filter(joined).count()
}

const _: () = assert!(MODULES == WEIGHTS.len());

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn fewest_chunks_win() {
        let aligner = Aligner::new(None, None);
        let found = aligner.align(&words("the cat on the mat"), &words("on the mat the cat"));
        assert_eq!((found.matches.len(), found.chunks), (5, 2));
        let stems = aligner.align(&words("dogs play"), &words("a dog plays"));
        assert_eq!((stems.matches.len(), stems.chunks), (2, 1));
        assert_eq!(stems.matches[0].module, 1);
        assert_eq!(aligner.align(&[], &words("a")), Alignment::default());
    }
}
