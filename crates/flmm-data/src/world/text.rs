//! Sentences with links: the types that scenes carry, and the builder that keeps text and links in step.

use serde::{Deserialize, Serialize};
use std::ops::Range;

/// A segment of the scene that words refer to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SegmentRef {
    /// Index into the scene's objects.
    Object(usize),
    /// Index into the scene's stuff regions.
    Stuff(usize),
}

/// A phrase of a text and what it refers to. Phrases carry number and colour words but no article: "two dogs",
/// "red car". An article's meaning depends on words that come after it, so a causal model could not link it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Characters of the text.
    pub range: Range<usize>,
    /// What the phrase means; several segments for a plural.
    pub segments: Vec<SegmentRef>,
    /// Whether the noun has to be seen in the picture, i.e. is not copied from the question.
    pub from_image: bool,
}

/// What a question asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum QuestionKind {
    Exist,
    Count,
    WhatIn,
    Where,
    Rel,
    RelYesNo,
    Largest,
    Smallest,
    Colour,
    Which,
    WhatBackground,
    List,
    Behind,
    Reason,
}

/// A question with its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// What it asks for.
    pub kind: QuestionKind,
    /// The question.
    pub question: String,
    /// The answer, one sentence.
    pub answer: String,
    /// The linked phrases of the answer.
    pub links: Vec<Link>,
    /// Whether this answer, word for word, is the only right one in the world's language.
    pub closed: bool,
}

/// A description in the form of Panoptic Narrative Grounding: utterances whose concatenation is the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Narration {
    /// The utterances in order; each carries its own leading space.
    pub segments: Vec<NarrationSegment>,
}

impl Narration {
    /// The whole description.
    pub fn text(&self) -> String {
        self.segments.iter().map(|segment| segment.utterance.as_str()).collect()
    }
}

/// One utterance of a narration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NarrationSegment {
    /// Its text.
    pub utterance: String,
    /// What it refers to; empty for connecting words.
    pub segments: Vec<SegmentRef>,
    /// Whether more than one object is meant.
    pub plural: bool,
    /// Whether it is a noun phrase.
    pub noun: bool,
}

/// How a referring expression singles out its target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ReferringKind {
    /// By its class alone: "the dog".
    Class,
    /// By its colour: "the red book".
    Colour,
    /// By its place among others of its class: "the dog on the left", "the top dog".
    Position,
    /// By its region of the picture: "the dog in the top left".
    Region,
    /// By its size: "the larger cat", "the largest object".
    Size,
    /// By another object: "the cat to the left of the dog".
    Relation,
}

/// An expression that means exactly one object of the scene.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Referring {
    /// The expression.
    pub text: String,
    /// Index into the scene's objects.
    pub target: usize,
    /// How it singles out the target.
    pub kind: ReferringKind,
    /// Other expressions for the same target, each unambiguous as well.
    pub alternatives: Vec<String>,
}

/// Everything that is said about a scene.
#[derive(Debug, Clone, Default)]
pub struct Texts {
    /// Questions in random order.
    pub questions: Vec<Question>,
    /// Descriptions in different styles.
    pub narrations: Vec<Narration>,
    /// One referring expression per object that can be singled out, in the order of the objects.
    pub referring: Vec<Referring>,
    /// Questions about what things are for.
    pub reasoning: Vec<Question>,
}

/// A text under construction. All words are ASCII, so that bytes and characters are the same.
#[derive(Default)]
pub(super) struct Text {
    pub(super) text: String,
    pub(super) links: Vec<Link>,
}

impl Text {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// Appends words that refer to nothing.
    pub(super) fn say(mut self, words: &str) -> Self {
        debug_assert!(words.is_ascii());
        self.text.push_str(words);
        self
    }

    /// Appends a phrase that refers to segments.
    pub(super) fn link(mut self, words: &str, segments: Vec<SegmentRef>, from_image: bool) -> Self {
        debug_assert!(words.is_ascii() && !words.starts_with(' '));
        let start = self.text.len();
        self.text.push_str(words);
        self.links.push(Link { range: start..self.text.len(), segments, from_image });
        self
    }

    /// Appends `a` or `an`, whichever fits the word that follows, and a space.
    pub(super) fn article(self, next: &str) -> Self {
        let article = article(next);
        self.say(article)
    }

    /// Makes the first letter a capital one.
    pub(super) fn sentence(mut self) -> Self {
        if let Some(first) = self.text.get_mut(..1) {
            first.make_ascii_uppercase();
        }
        self
    }

    /// The answer to a question.
    pub(super) fn answer(self, kind: QuestionKind, question: String, closed: bool) -> Question {
        let answer = self.sentence();
        Question { kind, question, answer: answer.text, links: answer.links, closed }
    }

    /// Splits the text at its links: one utterance per phrase and per stretch between phrases.
    pub(super) fn narration(self) -> Narration {
        let mut segments = Vec::new();
        let mut done = 0;
        let plain = |words: &str| NarrationSegment {
            utterance: words.to_owned(),
            segments: Vec::new(),
            plural: false,
            noun: false,
        };
        for link in self.links {
            // The space before a phrase belongs to the phrase.
            let start = link.range.start;
            let start = if self.text[..start].ends_with(' ') { start - 1 } else { start };
            if start > done {
                segments.push(plain(&self.text[done..start]));
            }
            segments.push(NarrationSegment {
                utterance: self.text[start..link.range.end].to_owned(),
                plural: link.segments.len() > 1,
                segments: link.segments,
                noun: true,
            });
            done = link.range.end;
        }
        if done < self.text.len() {
            segments.push(plain(&self.text[done..]));
        }
        Narration { segments }
    }
}

/// `"a "` or `"an "`.
pub(super) fn article(next: &str) -> &'static str {
    if next.starts_with(['a', 'e', 'i', 'o', 'u']) { "an " } else { "a " }
}
