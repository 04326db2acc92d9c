//! Texts with masks, as the builders of `spec/training.md` §3 make them from annotations.

use flmm::Result;
use flmm::grounder::Caption;
use flmm::lmm::GROUNDING_INSTRUCTION;
use flmm::text::tokenizer::Tokenizer;
use flmm_data::Mask;
use flmm_data::narratives::NarrativeSample;
use flmm_data::refcoco::{RefCoco, RefImage, TextMode};

/// A text about a picture, the phrases in it, and the mask of each phrase.
#[derive(Debug, Clone)]
pub struct LabelledText {
    /// Names the sample, whatever its place in the mixture: `png/train/17`, `refcoco+/train/581857`.
    pub key: String,
    /// The picture's path below the data root.
    pub picture: String,
    /// Height and width that the annotations give for the picture, pixels.
    pub size: [u32; 2],
    /// What the user is taken to have asked.
    pub instruction: &'static str,
    /// Pieces of the text, each with the number of its phrase if it is one.
    pub pieces: Vec<(String, Option<usize>)>,
    /// The pieces as tokens.
    pub caption: Caption,
    /// One mask per phrase.
    pub masks: Vec<Mask>,
    /// Whether its tokens teach the keyword selector what is worth a mask: in narratives, but not in lists of
    /// expressions, where every word is part of a phrase.
    pub is_narrative: bool,
}

/// A narrative as the language model reads it: every utterance is encoded alone, without separators.
pub fn narrative(
    tokenizer: &Tokenizer,
    sample: NarrativeSample,
    key: String,
    folder: &str,
    instruction: &'static str,
) -> Result<LabelledText> {
    let pieces = sample.utterances;
    let caption =
        Caption::from_segments(tokenizer, pieces.iter().map(|(text, phrase)| (text.as_str(), *phrase)))?;
    Ok(LabelledText {
        key,
        picture: format!("{folder}/{}", sample.file_name),
        size: sample.size,
        instruction,
        pieces,
        caption,
        masks: sample.phrases.into_iter().map(|phrase| phrase.mask).collect(),
        is_narrative: true,
    })
}

/// All referred objects of a picture in one text: `expression . expression .` (the "concat" builder).
pub fn expressions(
    tokenizer: &Tokenizer,
    data: &RefCoco,
    image: &RefImage,
    mode: TextMode,
    key: String,
) -> Result<LabelledText> {
    let texts = image.expressions(mode);
    let caption = Caption::from_expressions(tokenizer, texts.iter().map(|(text, _)| text.as_str()))?;
    let masks = texts.iter().map(|&(_, object)| data.mask(image, object)).collect::<Result<Vec<_>>>()?;
    let phrases = texts.into_iter().enumerate();
    let pieces = phrases.flat_map(|(number, (text, _))| [(text, Some(number)), (". ".to_owned(), None)]);
    Ok(LabelledText {
        key,
        picture: format!("coco/train2014/{}", image.file_name),
        size: image.size,
        instruction: GROUNDING_INSTRUCTION,
        pieces: pieces.collect(),
        caption,
        masks,
        is_narrative: false,
    })
}
