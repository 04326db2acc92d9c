//! "The conversation ability is preserved", as a test: answers are the same with grounding on and off.

use flmm::grounder::{AnswerOptions, GroundedAnswer, Sampling};
use flmm::lmm::Turn;
use flmm::phrases::PhraseChoice;
use flmm::{Grounder, Result};

use crate::qa::QaSamples;
use crate::task::Samples;

/// A question that is answered differently.
#[derive(Debug, Clone, PartialEq)]
pub struct Difference {
    /// The sample.
    pub id: String,
    /// How tokens were chosen.
    pub sampling: Sampling,
    /// What was asked.
    pub prompt: String,
    /// The answer without grounding.
    pub plain: String,
    /// The answer with it.
    pub grounded: String,
    /// Number of the first token that differs, from 0.
    pub token: usize,
}

/// What was compared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Compared {
    /// Pairs of answers.
    pub answers: usize,
    /// Phrases that the grounded ones have.
    pub phrases: usize,
}

/// Answers question `index` with grounding off and on, once for every way of `sampling`, and adds to `compared`. The
/// first difference in token ids, text or text as it was streamed; `None` if there is none.
pub fn compare(
    samples: &QaSamples,
    index: usize,
    grounder: &Grounder,
    sampling: &[Sampling],
    compared: &mut Compared,
) -> Result<Option<Difference>> {
    let picture = samples.picture(index)?;
    let (prompt, most_tokens) = samples.prompt(index);
    for &sampling in sampling {
        let answer = |phrases: Option<PhraseChoice>| -> Result<(GroundedAnswer, String)> {
            let options = AnswerOptions {
                max_new_tokens: most_tokens + 1,
                sampling,
                phrases,
                ..AnswerOptions::default()
            };
            let mut session = grounder.start(&picture)?;
            session.turns = vec![Turn::user(&prompt)];
            let mut streamed = String::new();
            let answer = grounder.reply(&mut session, &options, &mut |text| streamed.push_str(text))?;
            Ok((answer, streamed))
        };
        let (plain, plain_stream) = answer(None)?;
        let (grounded, grounded_stream) = answer(Some(PhraseChoice::Keywords))?;
        compared.answers += 1;
        compared.phrases += grounded.phrases.len();
        let same = plain.token_ids == grounded.token_ids
            && plain.answer == grounded.answer
            && plain_stream == grounded_stream;
        if !same {
            let token = plain.token_ids.iter().zip(&grounded.token_ids).take_while(|(a, b)| a == b).count();
            return Ok(Some(Difference {
                id: samples.ids()[index].clone(),
                sampling,
                prompt,
                plain: plain.answer,
                grounded: grounded.answer,
                token,
            }));
        }
    }
    Ok(None)
}
