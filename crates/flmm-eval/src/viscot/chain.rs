//! Describe, ground, look again: the visual chain of thought of any model (`spec/evaluation.md` §5.2).

use flmm::grounder::{AnswerOptions, Observation, Session};
use flmm::lmm::{Lmm, Turn};
use flmm::masks::Mask;
use flmm::nn::bilinear;
use flmm::{Grounder, Result};
use image::RgbImage;

use super::region::{box_from_mask, crop, side_by_side};
use crate::marks::{observe_reply, one_phrase};
use crate::qa::{reply, reply_in};

/// What is added to the question, without a blank before it, to make the model describe what it should look at.
const LOOK_FOR: &str = "First think which object in this image is most relevant to the question.";
/// What its description is made to begin with.
const OPENING: &str = " The object most relevant to the question is";
/// Most tokens of the description.
const MOST_THOUGHT_TOKENS: usize = 16;

/// How a question is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// Describe the relevant object, ground the description, look again at its box.
    V1,
    /// Ground the question itself, look again at its box.
    V2,
    /// Just answer.
    V3,
}

/// What the chain leaves open.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Protocol {
    /// Whether the mask is refined by SAM before its box is taken; the documented benchmark does not.
    pub sam: bool,
    /// Size of the box relative to the mask's.
    pub box_scale: f64,
}

impl Default for Protocol {
    fn default() -> Self {
        Self { sam: false, box_scale: 1.0 }
    }
}

/// An answer and how it came about.
#[derive(Debug, Clone, PartialEq)]
pub struct Chain {
    /// What the model thought to be relevant; empty but for [`Variant::V1`].
    pub thought: String,
    /// Where it looked again, x0, y0, x1, y1 in pixels: the whole picture where nothing was grounded.
    pub box_in_image: [u32; 4],
    /// The mask behind the box.
    pub mask: Option<Mask>,
    /// The answer.
    pub answer: String,
}

/// Answers `question` about `picture`; `suffix` is added to the question where it is answered, which takes at most
/// `most_tokens` tokens. Greedy.
pub fn answer(
    grounder: &Grounder,
    picture: &RgbImage,
    (question, suffix): (&str, &str),
    variant: Variant,
    protocol: &Protocol,
    most_tokens: usize,
) -> Result<Chain> {
    let (thought, observation) = match variant {
        Variant::V1 => think(grounder, session(grounder, picture, protocol)?, question)?,
        Variant::V2 => {
            (String::new(), read_question(grounder, session(grounder, picture, protocol)?, question)?)
        }
        Variant::V3 => {
            let turn = Turn::user(format!("{question}{suffix}"));
            let answer = reply(grounder, picture, &turn, most_tokens)?;
            let box_in_image = [0, 0, picture.width(), picture.height()];
            return Ok(Chain { thought: String::new(), box_in_image, mask: None, answer });
        }
    };
    let mask = observation.map(|observation| mask(grounder, &observation, protocol.sam)).transpose()?;
    let box_in_image = match &mask {
        Some(mask) => box_from_mask(mask, protocol.box_scale),
        None => [0, 0, picture.width(), picture.height()],
    };
    let answer = look_again(grounder, picture, box_in_image, (question, suffix), most_tokens)?;
    Ok(Chain { thought, box_in_image, mask, answer })
}

/// A session about `picture` in which something is looked for: SAM looks at it only if masks are refined.
fn session(grounder: &Grounder, picture: &RgbImage, protocol: &Protocol) -> Result<Session> {
    let session = grounder.start(picture)?;
    Ok(if protocol.sam { session } else { session.coarse_only() })
}

/// The model's thought and what it looked at while it had it; nothing if it said nothing.
fn think(grounder: &Grounder, mut session: Session, question: &str) -> Result<(String, Option<Observation>)> {
    let turns = [Turn::user(format!("{question}{LOOK_FOR}")), Turn::opening(OPENING)];
    let options = AnswerOptions {
        max_new_tokens: MOST_THOUGHT_TOKENS,
        phrases: None,
        stop_words: vec![".".into()],
        ..AnswerOptions::default()
    };
    let (thought, observation) = observe_reply(grounder, &mut session, &turns, &options)?;
    Ok((thought.trim().to_owned(), observation))
}

/// What the model looks at while it reads the question, up to its last word; nothing where it has no tokens.
///
/// As published, the question's end is found by putting one more image token behind it, which is cut off.
fn read_question(grounder: &Grounder, mut session: Session, question: &str) -> Result<Option<Observation>> {
    let lmm = grounder.lmm();
    let (before, ids) = (wrapped(lmm, "")?, wrapped(lmm, question)?);
    let shared = before.iter().zip(&ids).take_while(|(a, b)| a == b).count();
    let (prompt, question) = ids.split_at(shared);
    if question.is_empty() {
        return Ok(None);
    }
    grounder.observe_tokens(&mut session, 0, prompt, &one_phrase(question.to_vec())).map(Some)
}

/// Ids of the published instruction wrapper (`spec/models.md` §2), with one image token, up to the end of `question`.
pub fn wrapped(lmm: &dyn Lmm, question: &str) -> Result<Vec<u32>> {
    let format = lmm.base().format;
    let (image, between) = (format.image, format.image_end);
    let mut ids =
        lmm.tokenizer().encode(&format!("{}{image}{between}{question}{image}", format.before), true)?;
    if let Some(end) = ids.iter().rposition(|&id| id == lmm.image_token()) {
        ids.truncate(end);
    }
    Ok(ids)
}

/// The mask of the only phrase at the picture's own size. The mask head's logits are brought to that size before SAM
/// sees them.
fn mask(grounder: &Grounder, observation: &Observation, sam: bool) -> Result<Mask> {
    let (height, width) = observation.sam_geometry.original;
    let coarse = grounder.coarse(observation)?;
    let logits = bilinear(&coarse.unsqueeze(0)?, height, width)?.squeeze(0)?;
    let logits = if sam { grounder.refine(observation, &logits)? } else { logits };
    Mask::from_logits(&logits.get(0)?)
}

/// Asks again, with the region beside the whole picture: as a second picture where the model takes several, else in one
/// picture.
fn look_again(
    grounder: &Grounder,
    picture: &RgbImage,
    box_in_image: [u32; 4],
    (question, suffix): (&str, &str),
    most_tokens: usize,
) -> Result<String> {
    let region = crop(picture, box_in_image);
    if !grounder.lmm().spec().several_images {
        let text = format!(
            "The whole image is on the left, the image region that might help you answer the question is on the right: \
             {question}{suffix}"
        );
        return reply(grounder, &side_by_side(picture, &region), &Turn::user(text), most_tokens);
    }
    let mut session = grounder.start_with([picture, &region])?;
    let turn = Turn::user("").show(0).say("the whole image, ").show(1);
    let text = format!("the image region that might help you answer the question: {question}{suffix}");
    session.turns = vec![turn.say(text)];
    reply_in(grounder, session, most_tokens)
}
