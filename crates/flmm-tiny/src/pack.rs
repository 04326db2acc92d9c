//! Turns a scene's texts into one packed training sequence: the image once, then many conversations behind it
//! that do not see one another. One image prefix gives eight conversations' worth of supervision.

use std::ops::Range;

use anyhow::{Result, anyhow};
use flmm_data::world::{Link, Question, QuestionKind, Scene, SegmentRef};
use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;
use tokenizers::Tokenizer;

use crate::stage_head::expressions;
use crate::text::DESCRIBE;

/// How often a scene is narrated; referring expressions and questions fill what is left.
const NARRATIONS: f64 = 0.35;
/// How often a scene's objects are referred to, unless something else is asked for.
pub(crate) const REFERRING: f64 = 0.5;
/// How often a question of an easy kind is kept, unless something else is asked for: a model that knows such kinds
/// needs no more than a reminder, one whose words are new has to learn them.
pub(crate) const EASY: f64 = 0.25;

fn is_easy(kind: QuestionKind) -> bool {
    matches!(
        kind,
        QuestionKind::Exist | QuestionKind::Colour | QuestionKind::Reason | QuestionKind::WhatBackground
    )
}

/// A phrase of an answer and what it refers to.
#[derive(Debug, Clone)]
pub(crate) struct Phrase {
    /// Rows of the packed sequence.
    pub(crate) rows: Range<usize>,
    /// Objects or stuff of the scene.
    pub(crate) segments: Vec<SegmentRef>,
    /// Whether it had to be seen; otherwise the question says it already.
    pub(crate) from_image: bool,
}

/// What kind of conversation a piece of the sequence is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// A question about the picture.
    Question(QuestionKind),
    /// A narration of the whole picture.
    Narration,
    /// Referring expressions after the description instruction.
    Referring,
}

impl Kind {
    /// The name it has in logs.
    pub(crate) fn name(self) -> String {
        match self {
            Self::Question(kind) => format!("{kind:?}"),
            other => format!("{other:?}"),
        }
    }

    /// How much a token of the answer counts in the loss. Nothing in the picture decides which of many narrations
    /// or expressions is given, so most of their loss is noise.
    pub(crate) fn weight(self) -> f32 {
        match self {
            Self::Question(_) => 1.0,
            Self::Narration => 0.5,
            Self::Referring => 0.2,
        }
    }
}

/// One conversation's answer inside the packed sequence.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    /// Its kind.
    pub(crate) kind: Kind,
    /// Whether there is exactly one right answer.
    pub(crate) closed: bool,
    /// Indices into [`Packed::targets`].
    pub(crate) targets: Range<usize>,
}

/// A packed sequence: prefix, image tokens, conversations.
#[derive(Debug, Clone, Default)]
pub(crate) struct Packed {
    /// Ids before the image.
    pub(crate) prefix: Vec<u32>,
    /// Ids behind the image.
    pub(crate) text: Vec<u32>,
    /// Rotary position of every row (prefix, image, text).
    pub(crate) positions: Vec<u32>,
    /// First row of the conversation each row belongs to.
    pub(crate) starts: Vec<u32>,
    /// Supervised rows: (row, id that must follow).
    pub(crate) targets: Vec<(u32, u32)>,
    /// Phrases of the answers.
    pub(crate) phrases: Vec<Phrase>,
    /// Answers: how much they count, and for evaluation.
    pub(crate) answers: Vec<Answer>,
}

impl Packed {
    /// The phrases of `answer` that are supervised from their first to their last token: the indices into
    /// [`Packed::targets`] of these tokens, and whether the phrase had to be seen.
    pub(crate) fn supervised_phrases(&self, answer: &Answer) -> Vec<(Range<usize>, bool)> {
        let targets = &self.targets[answer.targets.clone()];
        let index =
            |row: usize| Some(answer.targets.start + targets.iter().position(|t| t.0 as usize == row)?);
        // A row's target is the token behind it.
        let of = |phrase: &Phrase| Some(index(phrase.rows.start - 1)?..index(phrase.rows.end - 2)? + 1);
        self.phrases.iter().filter_map(|phrase| Some((of(phrase)?, phrase.from_image))).collect()
    }
}

/// A conversation before packing: the prompt and the answer in pieces, each encoded on its own.
struct Conversation {
    kind: Kind,
    closed: bool,
    prompt: String,
    pieces: Vec<(String, Vec<Link>)>,
}

/// Packs conversations of scenes.
pub(crate) struct Packer {
    tokenizer: Tokenizer,
    image_tokens: usize,
    bos: u32,
    eos: u32,
    separator: u32,
    /// Text tokens a sequence may have at most.
    pub(crate) budget: usize,
    /// If not empty: questions of these kinds are drawn, and nothing else.
    pub(crate) kinds: Vec<QuestionKind>,
    /// How often a scene's objects are referred to, 0 to 1.
    pub(crate) referring: f64,
    /// How often a question of an easy kind is kept, 0 to 1.
    pub(crate) easy: f64,
}

impl Packer {
    /// For a tokenizer of [`crate::text`] and a grid of `image_tokens`.
    pub(crate) fn new(tokenizer: Tokenizer, image_tokens: usize, budget: usize) -> Result<Self> {
        let id = |token: &str| tokenizer.token_to_id(token).ok_or_else(|| anyhow!("no token `{token}`"));
        let (bos, eos) = (id("<s>")?, id("</s>")?);
        let separator = *encode(&tokenizer, ".")?.0.last().ok_or_else(|| anyhow!("`.` has no token"))?;
        Ok(Self {
            tokenizer,
            image_tokens,
            bos,
            eos,
            separator,
            budget,
            kinds: Vec::new(),
            referring: REFERRING,
            easy: EASY,
        })
    }

    /// The tokenizer.
    pub(crate) fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The same texts behind another number of image tokens.
    pub(crate) fn with_image_tokens(&self, image_tokens: usize) -> Self {
        Self { image_tokens, tokenizer: self.tokenizer.clone(), kinds: self.kinds.clone(), ..*self }
    }

    /// A random choice of the scene's conversations, kinds drawn evenly, up to the token budget.
    pub(crate) fn pack(&self, scene: &Scene, rng: &mut ChaCha8Rng) -> Result<Packed> {
        let mut packed = self.start()?;
        for conversation in self.draw(scene, rng) {
            self.append(&mut packed, &conversation)?;
        }
        Ok(packed)
    }

    /// All questions of the scene, one sequence each group that fits the budget.
    pub(crate) fn pack_all_questions(&self, scene: &Scene) -> Result<Vec<Packed>> {
        let mut sequences = Vec::new();
        let mut packed = self.start()?;
        for question in scene.texts.questions.iter().chain(&scene.texts.reasoning) {
            if !self.append(&mut packed, &asked(question))? {
                sequences.push(std::mem::replace(&mut packed, self.start()?));
                self.append(&mut packed, &asked(question))?;
            }
        }
        sequences.push(packed);
        Ok(sequences)
    }

    fn draw(&self, scene: &Scene, rng: &mut ChaCha8Rng) -> Vec<Conversation> {
        let texts = &scene.texts;
        let mut drawn = Vec::new();
        if let (true, Some(narration)) = (rng.random_bool(NARRATIONS), texts.narrations.choose(rng)) {
            // Encoded as one text, as the model itself will write it.
            let (mut text, mut links) = (String::new(), Vec::new());
            for segment in &narration.segments {
                let start = text.chars().count();
                text += &segment.utterance;
                if !segment.segments.is_empty() {
                    let range = start..text.chars().count();
                    links.push(Link { range, segments: segment.segments.clone(), from_image: true });
                }
            }
            drawn.push(Conversation {
                kind: Kind::Narration,
                closed: false,
                prompt: DESCRIBE.into(),
                pieces: vec![(text, links)],
            });
        }
        let chosen = if rng.random_bool(self.referring) { expressions(scene, 3, rng) } else { Vec::new() };
        if !chosen.is_empty() {
            let piece = |(text, object): (&str, usize)| {
                let segments = vec![SegmentRef::Object(object)];
                (text.to_owned(), vec![Link { range: 0..text.chars().count(), segments, from_image: true }])
            };
            drawn.push(Conversation {
                kind: Kind::Referring,
                closed: false,
                prompt: DESCRIBE.into(),
                pieces: chosen.into_iter().map(piece).collect(),
            });
        }
        let mut questions: Vec<_> = texts.questions.iter().chain(&texts.reasoning).collect();
        if self.kinds.is_empty() {
            questions.retain(|question| !is_easy(question.kind) || rng.random_bool(self.easy));
        } else {
            drawn.clear();
            questions.retain(|question| self.kinds.contains(&question.kind));
        }
        questions.shuffle(rng);
        // Evenly by kind: every kind once, then every kind twice, ….
        let mut seen = std::collections::BTreeMap::new();
        let mut order: Vec<(usize, &Question)> = questions
            .into_iter()
            .map(|question| {
                let count = seen.entry(question.kind).or_insert(0);
                *count += 1;
                (*count, question)
            })
            .collect();
        order.sort_by_key(|(count, _)| *count);
        drawn.extend(order.into_iter().map(|(_, question)| asked(question)));
        drawn
    }

    fn start(&self) -> Result<Packed> {
        let mut prefix = vec![self.bos];
        prefix.extend(encode(&self.tokenizer, "USER: ")?.0);
        let rows = prefix.len() + self.image_tokens;
        let positions = (0..rows as u32).collect();
        Ok(Packed { prefix, positions, starts: vec![0; rows], ..Packed::default() })
    }

    /// Appends a conversation unless it would exceed the budget.
    fn append(&self, packed: &mut Packed, conversation: &Conversation) -> Result<bool> {
        let (prompt, _) = encode(&self.tokenizer, &format!("\n{} ASSISTANT:", conversation.prompt))?;
        let base = packed.prefix.len() + self.image_tokens;
        let start = base + packed.text.len();
        let mut ids = prompt;
        let mut phrases = Vec::new();
        let answer_start = ids.len();
        for (text, links) in &conversation.pieces {
            let (piece, offsets) = encode(&self.tokenizer, text)?;
            for link in links {
                let inside =
                    |range: &Range<usize>| range.start < link.range.end && range.end > link.range.start;
                let rows: Vec<_> = (0..piece.len()).filter(|i| inside(&offsets[*i])).collect();
                if let (Some(first), Some(last)) = (rows.first(), rows.last()) {
                    phrases.push(Phrase {
                        rows: start + ids.len() + first..start + ids.len() + last + 1,
                        segments: link.segments.clone(),
                        from_image: link.from_image,
                    });
                }
            }
            ids.extend(piece);
            if conversation.kind == Kind::Referring {
                ids.push(self.separator);
            }
        }
        ids.push(self.eos);
        if packed.text.len() + ids.len() > self.budget {
            return Ok(false);
        }
        let first_target = packed.targets.len();
        // How an expression begins is not taught: asked to describe, the model shall narrate, not refer.
        let taught = answer_start + usize::from(conversation.kind == Kind::Referring);
        for (at, id) in ids.iter().enumerate().skip(taught) {
            packed.targets.push(((start + at - 1) as u32, *id));
        }
        packed.positions.extend((0..ids.len() as u32).map(|i| base as u32 + i));
        packed.starts.extend(std::iter::repeat_n(start as u32, ids.len()));
        packed.text.extend(ids);
        packed.phrases.extend(phrases);
        packed.answers.push(Answer {
            kind: conversation.kind,
            closed: conversation.closed,
            targets: first_target..packed.targets.len(),
        });
        Ok(true)
    }
}

fn asked(question: &Question) -> Conversation {
    Conversation {
        kind: Kind::Question(question.kind),
        closed: question.closed,
        prompt: question.question.clone(),
        pieces: vec![(question.answer.clone(), question.links.clone())],
    }
}

/// Ids of `text` without special tokens, and the character range each id covers.
fn encode(tokenizer: &Tokenizer, text: &str) -> Result<(Vec<u32>, Vec<Range<usize>>)> {
    let encoding =
        tokenizer.encode_char_offsets(text, false).map_err(|e| anyhow!("cannot encode {text:?}: {e}"))?;
    let offsets = encoding.get_offsets().iter().map(|(a, b)| *a..*b).collect();
    Ok((encoding.get_ids().to_vec(), offsets))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phrases_are_found_among_their_own_answers_targets() {
        let answer = |targets| Answer { kind: Kind::Narration, closed: true, targets };
        let phrase = |rows, from_image| Phrase { rows, segments: Vec::new(), from_image };
        let packed = Packed {
            targets: vec![(10, 0), (11, 0), (12, 0), (20, 0), (21, 0)],
            // The last one's first token is not supervised.
            phrases: vec![phrase(12..14, true), phrase(22..23, false), phrase(20..22, true)],
            ..Packed::default()
        };
        assert_eq!(packed.supervised_phrases(&answer(0..3)), [(1..3, true)]);
        assert_eq!(packed.supervised_phrases(&answer(3..5)), [(4..5, false)]);
    }
}
