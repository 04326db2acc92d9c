//! Labelled texts as the frozen models see them: where the samples of a run come from.

use candle_core::Tensor;
use flmm::lmm::Turn;
use flmm::{Error, Result};
use flmm_data::{ImageStore, Mask};
use image::RgbImage;

use crate::frozen::Frozen;
use crate::head::HeadSample;
use crate::mixture::Mixture;
use crate::samples::Samples;
use crate::selector::SelectorSample;
use crate::text::LabelledText;

/// The samples of a [`Mixture`], shown to the frozen models afresh every time. The models are opened when the first
/// sample is asked for.
///
/// It gives [`HeadSample`]s, and for training the keyword selector alone [`SelectorSample`]s, which need neither SAM
/// nor attention maps.
pub struct Observed<'a> {
    /// The frozen models.
    pub frozen: &'a Frozen,
    /// Texts and masks.
    pub mixture: &'a Mixture,
    /// Pictures.
    pub images: &'a ImageStore,
}

impl Observed<'_> {
    /// The text of sample `index` in `epoch`, cut to what the model reads.
    pub fn text(&self, index: usize, epoch: u64) -> Result<LabelledText> {
        let lmm = self.frozen.grounder()?.lmm();
        self.mixture.text(index, epoch, lmm.tokenizer(), lmm.spec())
    }

    /// The picture of `text`, which must have the size that the annotations give.
    pub fn picture(&self, text: &LabelledText) -> Result<RgbImage> {
        let picture = self.images.read(&text.picture)?;
        let [height, width] = text.size;
        match picture.dimensions() == (width, height) {
            true => Ok(picture),
            false => Err(Error::image(
                format!(
                    "`{}` is {} × {} pixels, its annotations say {width} × {height}",
                    text.picture,
                    picture.width(),
                    picture.height()
                ),
                "download the pictures or the annotations again: they do not belong together",
            )),
        }
    }

    /// What the frozen models see of `text`.
    pub fn observe(&self, text: &LabelledText) -> Result<HeadSample> {
        let grounder = self.frozen.grounder()?;
        let mut session = grounder.start(&self.picture(text)?)?.once();
        let turns = [Turn::user(text.instruction)];
        let observation = grounder.observe_in(&mut session, &turns, &text.caption)?;
        let device = observation.maps.device();
        let token_labels = match text.is_narrative {
            // The model may have cut the text off.
            true => Some(labels(text, observation.hidden.dim(1)?)?.to_device(device)?),
            false => None,
        };
        let masks = stacked(&text.masks, text.size)?.to_device(device)?;
        Ok(HeadSample { observation, masks, token_labels })
    }

    /// Hidden states and labels of `text`.
    pub fn observe_words(&self, text: &LabelledText) -> Result<SelectorSample> {
        let grounder = self.frozen.grounder()?;
        let mut session = grounder.start(&self.picture(text)?)?;
        let turns = [Turn::user(text.instruction)];
        let hidden = grounder.hidden_in(&mut session, &turns, &text.caption)?;
        let labels = labels(text, hidden.dim(1)?)?.to_device(hidden.device())?;
        Ok(SelectorSample { hidden, labels })
    }
}

impl Samples<HeadSample> for Observed<'_> {
    fn len(&self) -> usize {
        self.mixture.len()
    }

    fn sample(&self, index: usize, epoch: u64) -> Result<HeadSample> {
        self.observe(&self.text(index, epoch)?)
    }

    fn key(&self, index: usize, epoch: u64) -> String {
        self.mixture.key(index, epoch)
    }
}

impl Samples<SelectorSample> for Observed<'_> {
    fn len(&self) -> usize {
        self.mixture.len()
    }

    fn sample(&self, index: usize, epoch: u64) -> Result<SelectorSample> {
        self.observe_words(&self.text(index, epoch)?)
    }

    fn key(&self, index: usize, epoch: u64) -> String {
        self.mixture.key(index, epoch)
    }
}

/// Masks as one u8 tensor `[N, H, W]` of 0 and 1.
pub fn stacked(masks: &[Mask], [height, width]: [u32; 2]) -> Result<Tensor> {
    let values: Vec<u8> =
        masks.iter().flat_map(|mask| mask.data.iter().map(|&inside| u8::from(inside))).collect();
    let shape = (masks.len(), height as usize, width as usize);
    Ok(Tensor::from_vec(values, shape, &candle_core::Device::Cpu)?)
}

/// Per token that was read, 1 if it belongs to a phrase, else 0.
fn labels(text: &LabelledText, read: usize) -> Result<Tensor> {
    let labels: Vec<f32> =
        text.caption.mask_ids.iter().take(read).map(|&id| f32::from(u8::from(id >= 0))).collect();
    Ok(Tensor::from_vec(labels, read, &candle_core::Device::Cpu)?)
}
