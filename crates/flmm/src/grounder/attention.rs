//! Attention alone, for looking at the frozen LMM: neither SAM nor the head is run.

use candle_core::Tensor;
use image::RgbImage;

use super::{Caption, Grounder, Session};
use crate::error::{Error, Result};
use crate::geometry::Geometry;
use crate::layout::{ImageLayout, Merge, Stacking};
use crate::lmm::{GROUNDING_INSTRUCTION, Turn};
use crate::phrases::token_offsets;

/// Where the phrases of a caption look.
#[derive(Debug, Clone)]
pub struct Attention {
    /// Merged attention of every phrase `[N, C, gh, gw]`, f32, in `[0, 1]`.
    pub maps: Tensor,
    /// How the LMM's view lies in its padded square.
    pub geometry: Geometry,
    /// How image tokens became channels ([`ImageLayout::channel_origin`]).
    pub layout: ImageLayout,
}

impl Grounder {
    /// Reads `caption` as [`Grounder::observe`] does and keeps its phrases' attention only.
    pub fn attention(&self, picture: &RgbImage, caption: &Caption) -> Result<Attention> {
        caption.phrases()?;
        let mut caption = caption.clone();
        let mut session = self.start(picture)?.once();
        let prompt = session.prompt(self.lmm(), &[Turn::user(GROUNDING_INSTRUCTION)])?;
        let capture = self.read_caption(&mut session, 0, prompt, &mut caption)?;
        let (maps, input) = session.phrase_maps(0, &capture, &caption.phrases()?)?;
        Ok(Attention { maps, geometry: input.geometry, layout: input.layout.clone() })
    }

    /// Reads `text` as the model's answer to `turns` and returns where chosen tokens of it look in picture number `image`
    /// of the session, exactly as the decoder computed it.
    ///
    /// # Errors
    /// [`Error::Request`] for a blank text, for tokens, layers or heads that there are not, and for more values than
    /// `choice` allows.
    pub fn token_attention(
        &self,
        session: &mut Session,
        image: usize,
        turns: &[Turn],
        text: &str,
        choice: &AttentionChoice,
    ) -> Result<TokenAttention> {
        let planes = session.input(image)?.layout.planes.len();
        let tokenizer = self.lmm.tokenizer();
        let mut caption = Caption::from_segments(tokenizer, [(text, None)])?;
        let spec = self.lmm.spec();
        let layers = chosen("layer", &choice.layers, spec.layers)?;
        let heads = chosen("head", &choice.heads, spec.heads)?;
        let tokens = chosen("token", &choice.tokens, caption.token_ids.len())?;
        let (rows, columns) = session.input(image)?.layout.size();
        let heads_kept = if choice.mean { 1 } else { heads.len() };
        let sizes = [tokens.len(), planes, layers.len(), heads_kept, rows, columns];
        let values = sizes.iter().try_fold(1usize, |all, &size| all.checked_mul(size));
        if values.is_none_or(|values| values > choice.most_values) {
            return Err(Error::request(
                format!(
                    "{} tokens × {} layers × {} heads of {planes} map(s) of {rows}×{columns} are more than {} values",
                    tokens.len(),
                    layers.len(),
                    heads_kept,
                    choice.most_values
                ),
                "choose fewer tokens, layers or heads",
            ));
        }
        let prompt = session.prompt(self.lmm(), turns)?;
        let first = prompt.len();
        let capture = self.read_caption(session, image, prompt, &mut caption)?;
        // Of a text that is too long for the model only the beginning was read.
        let tokens = chosen("token", &choice.tokens, caption.token_ids.len())?;
        let positions: Vec<usize> = tokens.iter().map(|token| first + token).collect();
        let heads_used = heads.iter().map(|&head| head as u32).collect::<Vec<_>>();
        let layout = &session.input(image)?.layout;
        let maps = layout.fold(layers.len(), Merge::Mean, self.lmm.decoder().dtype(), |layer| {
            let rows = capture.image_attention(&session.cache, layers[layer], layout, &positions)?;
            let index = Tensor::from_slice(&heads_used, heads_used.len(), rows.device())?;
            let rows = rows.index_select(&index, 0)?;
            let rows = if choice.mean { rows.mean_keepdim(0)? } else { rows };
            (0..positions.len()).map(|token| Ok(rows.narrow(1, token, 1)?)).collect()
        })?;
        let (n, [_, p, l, h, r, c]) = (tokens.len(), sizes);
        let maps = match layout.stacking {
            Stacking::PlanesOutermost => maps.reshape((n, p, l, h, r * c))?,
            Stacking::PlanesWithinLayers => {
                maps.reshape((n, l, p, h, r * c))?.transpose(1, 2)?.contiguous()?
            }
        };
        let maps = if choice.mean { maps.mean_keepdim(2)? } else { maps };
        let geometry = session.input(image)?.geometry;
        let (text, offsets) = token_offsets(tokenizer, &caption.token_ids);
        Ok(TokenAttention { maps, size: (r, c), text, offsets, tokens, layers, heads, geometry })
    }
}

/// Which attention is read out. Of empty lists, all there are; numbers count from 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttentionChoice {
    /// Tokens of the text.
    pub tokens: Vec<usize>,
    /// Decoder layers.
    pub layers: Vec<usize>,
    /// Query heads, the same in every layer.
    pub heads: Vec<usize>,
    /// Whether the chosen layers and heads are averaged; less memory is needed then.
    pub mean: bool,
    /// Most numbers that may be held at a time.
    pub most_values: usize,
}

/// Where tokens of a text look.
#[derive(Debug, Clone)]
pub struct TokenAttention {
    /// `[tokens, planes, layers, heads, rows · columns]`, f32, in `[0, 1]`: shares of the token's whole attention; one layer
    /// and one head where the mean was asked for. Planes are views of the picture at several scales, coarse first; most
    /// models have one.
    pub maps: Tensor,
    /// Rows and columns of a map.
    pub size: (usize, usize),
    /// The text, as its tokens spell it.
    pub text: String,
    /// First character of every token of the text and the one behind its last.
    pub offsets: Vec<(usize, usize)>,
    /// Numbers of the tokens in `maps`.
    pub tokens: Vec<usize>,
    /// Numbers of the layers.
    pub layers: Vec<usize>,
    /// Numbers of the heads.
    pub heads: Vec<usize>,
    /// How the LMM's view lies in its padded square.
    pub geometry: Geometry,
}

/// `numbers`, or all below `count` if there are none.
fn chosen(name: &str, numbers: &[usize], count: usize) -> Result<Vec<usize>> {
    match numbers.iter().find(|&&number| number >= count) {
        Some(number) => Err(Error::request(
            format!("there is no {name} {number}: there are {count}, counted from 0"),
            format!("choose {name}s below {count}"),
        )),
        None if numbers.is_empty() => Ok((0..count).collect()),
        None => Ok(numbers.to_vec()),
    }
}
