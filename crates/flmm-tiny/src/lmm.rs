//! The trainable LMM: batches of packed scenes in, answer loss out; and how well it answers and looks.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Result;
use candle_core::{Device, Tensor};
use flmm::Geometry;
use flmm::nn::cross_entropy;
use flmm::weights::Params;
use flmm_data::world::{Scene, SegmentRef};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use crate::alignment;
use crate::block::PackedMask;
use crate::config::LmmSizes;
use crate::decoder::{Decoder, Output};
use crate::pack::{Kind, Packed, Packer};
use crate::symbolic::{self, Codes, Thing};
use crate::tower::{self, Projector, Tower};

/// Where the image tokens of a batch come from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Source {
    /// Noisy codes on a grid of this side (see [`crate::symbolic`]).
    Codes {
        /// Patches along one side.
        grid: usize,
        /// Noise, in units of a code's length.
        noise: f32,
    },
    /// Rendered pictures through the tower and the projector.
    Pixels,
}

/// A scene prepared for one forward pass.
pub(crate) struct Sample {
    /// The packed conversations.
    pub(crate) packed: Packed,
    /// The thing under every image token.
    pub(crate) things: Vec<Thing>,
    /// Codes `[tokens · width]` or patches `[tokens · 3 · p · p]`.
    pub(crate) image: Vec<f32>,
}

/// Everything that does not change during training.
pub(crate) struct Setting {
    /// Sizes.
    pub(crate) sizes: LmmSizes,
    /// The code book.
    pub(crate) codes: Codes,
    /// The packer for the full grid.
    pub(crate) packer: Packer,
    /// Picture preprocessing.
    pub(crate) processor: flmm::vision::preprocess::LlavaProcessor,
}

impl Setting {
    /// Prepares `scene` with the packed sequence `packed`.
    pub(crate) fn sample(
        &self,
        scene: &Scene,
        packed: Packed,
        source: Source,
        rng: &mut ChaCha8Rng,
    ) -> Result<Sample> {
        let (things, image) = match source {
            Source::Codes { grid, noise } => {
                let geometry = self.geometry(scene)?;
                let things = symbolic::things(scene, &geometry, grid);
                let mut image = self.codes.tokens(scene, &things, &geometry);
                symbolic::add_noise(&mut image, self.sizes.width, noise, rng);
                self.codes.mark_image(&mut image);
                (things, image)
            }
            Source::Pixels => self.pixels(scene)?,
        };
        Ok(Sample { packed, things, image })
    }

    /// The things under the patches of `scene` and its patches.
    pub(crate) fn pixels(&self, scene: &Scene) -> Result<(Vec<Thing>, Vec<f32>)> {
        let (pixels, geometry) = self.processor.process(&scene.image)?;
        let things = symbolic::things(scene, &geometry, self.sizes.grid());
        let pixels = pixels.flatten_all()?.to_vec1::<f32>()?;
        Ok((things, tower::patches(&pixels, self.sizes.image_size, self.sizes.patch_size)))
    }

    /// The geometry of a scene's picture.
    pub(crate) fn geometry(&self, scene: &Scene) -> Result<Geometry> {
        Ok(self.processor.geometry((scene.image.height() as usize, scene.image.width() as usize))?)
    }
}

/// Tower, projector and decoder over one set of tensors.
pub(crate) struct Lmm {
    tower: Tower,
    projector: Projector,
    decoder: Decoder,
}

impl Lmm {
    /// Reads all tensors.
    pub(crate) fn load(sizes: &LmmSizes, params: &Params) -> Result<Self> {
        let lmm = Self {
            tower: Tower::load(sizes, params)?,
            projector: Projector::load(sizes, params)?,
            decoder: Decoder::load(sizes, params)?,
        };
        params.finish("rerun the stage that writes these tensors")?;
        Ok(lmm)
    }

    /// Runs a batch; keeps the attention of `heads` (layer, head) to the image.
    pub(crate) fn forward(
        &self,
        samples: &[Sample],
        source: Source,
        heads: &[(usize, usize)],
    ) -> Result<Output> {
        let batch = samples.len();
        let prefix = &samples[0].packed.prefix;
        let tokens = samples[0].things.len();
        let text = samples.iter().map(|s| s.packed.text.len()).max().unwrap_or(0);
        let rows = prefix.len() + tokens + text;
        let (mut ids, mut positions, mut starts) = (Vec::new(), Vec::new(), Vec::new());
        for Sample { packed, .. } in samples {
            let padding = text - packed.text.len();
            ids.extend(packed.text.iter().copied().chain(std::iter::repeat_n(0, padding)));
            positions.extend(packed.positions.iter().copied().chain(std::iter::repeat_n(0, padding)));
            starts.extend(packed.starts.iter().copied().chain((rows - padding) as u32..rows as u32));
        }
        let image: Vec<f32> = samples.iter().flat_map(|s| s.image.iter().copied()).collect();
        let image = Tensor::from_vec(image, (batch, tokens, samples[0].image.len() / tokens), &Device::Cpu)?;
        let image = match source {
            Source::Codes { .. } => image,
            Source::Pixels => self.projector.forward(&self.tower.forward(&image)?)?,
        };
        let before = self.decoder.embed(&prefix.repeat(batch), batch)?;
        let x = Tensor::cat(&[&before, &image, &self.decoder.embed(&ids, batch)?], 1)?;
        let mask = Arc::new(PackedMask { prefix: prefix.len() + tokens, starts });
        self.decoder.forward(&x, &positions, &mask, prefix.len(), heads)
    }

    /// Logits `[targets, vocab]` at the supervised rows of all samples, in order, and what should follow.
    pub(crate) fn supervised(&self, samples: &[Sample], output: &Output) -> Result<(Tensor, Vec<u32>)> {
        let (batch, rows, width) = output.hidden.dims3()?;
        let (mut at, mut targets) = (Vec::new(), Vec::new());
        for (index, sample) in samples.iter().enumerate() {
            at.extend(sample.packed.targets.iter().map(|(row, _)| (index * rows) as u32 + row));
            targets.extend(sample.packed.targets.iter().map(|(_, id)| *id));
        }
        let at = Tensor::new(at, &Device::Cpu)?;
        let hidden = output.hidden.reshape((batch * rows, width))?.index_select(&at, 0)?;
        Ok((self.decoder.logits(&hidden)?, targets))
    }

    /// Weighted mean answer loss of a batch plus `alignment` times the [contrastive loss](crate::alignment).
    pub(crate) fn loss(&self, samples: &[Sample], source: Source, alignment: f64) -> Result<Tensor> {
        let heads = if alignment > 0.0 { &alignment::HEADS[..] } else { &[] };
        let output = self.forward(samples, source, heads)?;
        let (logits, targets) = self.supervised(samples, &output)?;
        let answers = samples.iter().flat_map(|sample| &sample.packed.answers);
        let weights = answers.flat_map(|a| std::iter::repeat_n(a.kind.weight(), a.targets.len())).collect();
        let answers = cross_entropy(&logits, targets, Some(weights))?;
        match alignment::loss(samples, &output.attention)? {
            Some(aligned) if alignment > 0.0 => Ok((answers + (aligned * alignment)?)?),
            _ => Ok(answers),
        }
    }
}

/// What an evaluation counts.
#[derive(Debug, Default)]
pub(crate) struct Report {
    /// Right and all answers, per kind of question (teacher-forced argmax equals greedy exact match).
    pub(crate) answers: BTreeMap<Kind, (usize, usize)>,
    /// Right and all closed questions.
    pub(crate) closed: (usize, usize),
    /// Right and all phrases of closed answers that had to be seen in the picture.
    pub(crate) seen: (usize, usize),
    /// Right and all phrases of closed answers that the question had said already.
    pub(crate) copied: (usize, usize),
    /// Per head (layer-major): phrases whose strongest patch lies on the named thing.
    pub(crate) pointing: Vec<usize>,
    /// Phrases of objects.
    pub(crate) phrases: usize,
    loss: f64,
    batches: usize,
}

impl Report {
    /// Adds the outcome of one batch.
    pub(crate) fn add(&mut self, lmm: &Lmm, samples: &[Sample], source: Source) -> Result<()> {
        let output = lmm.forward(samples, source, &lmm.decoder.heads())?;
        let (logits, targets) = lmm.supervised(samples, &output)?;
        let best = logits.argmax(1)?.to_vec1::<u32>()?;
        self.loss += f64::from(cross_entropy(&logits, targets.clone(), None)?.to_scalar::<f32>()?);
        self.batches += 1;
        let mut base = 0;
        for sample in samples {
            for answer in &sample.packed.answers {
                let range = base + answer.targets.start..base + answer.targets.end;
                let right = usize::from(best[range.clone()] == targets[range]);
                let count = self.answers.entry(answer.kind).or_default();
                *count = (count.0 + right, count.1 + 1);
                if answer.closed {
                    self.closed = (self.closed.0 + right, self.closed.1 + 1);
                    for (phrase, from_image) in sample.packed.supervised_phrases(answer) {
                        let range = base + phrase.start..base + phrase.end;
                        let right = usize::from(best[range.clone()] == targets[range]);
                        let count = if from_image { &mut self.seen } else { &mut self.copied };
                        *count = (count.0 + right, count.1 + 1);
                    }
                }
            }
            base += sample.packed.targets.len();
        }
        self.point(samples, &output)
    }

    fn point(&mut self, samples: &[Sample], output: &Output) -> Result<()> {
        self.pointing.resize(output.attention.len(), 0);
        for (at, maps) in output.attention.values().enumerate() {
            let (_, rows, tokens) = maps.dims3()?;
            let probs = maps.flatten_all()?.to_vec1::<f32>()?;
            for (sample, probs) in samples.iter().zip(probs.chunks_exact(rows * tokens)) {
                for phrase in &sample.packed.phrases {
                    if !phrase.segments.iter().all(|s| matches!(s, SegmentRef::Object(_))) {
                        continue;
                    }
                    if at == 0 {
                        self.phrases += 1;
                    }
                    let mut map = vec![0f32; tokens];
                    for row in phrase.rows.clone() {
                        map.iter_mut().zip(&probs[row * tokens..]).for_each(|(m, p)| *m += p);
                    }
                    let peak = (0..tokens).fold(0, |best, i| if map[i] > map[best] { i } else { best });
                    let hit = phrase.segments.iter().any(|segment| match (segment, sample.things[peak]) {
                        (SegmentRef::Object(a), Thing::Object(b)) => *a == b,
                        _ => false,
                    });
                    self.pointing[at] += usize::from(hit);
                }
            }
        }
        Ok(())
    }

    /// Mean loss per batch.
    pub(crate) fn loss(&self) -> f64 {
        self.loss / self.batches.max(1) as f64
    }

    /// The best head's index and its pointing accuracy.
    pub(crate) fn best_head(&self) -> (usize, f64) {
        let best = (0..self.pointing.len()).max_by_key(|i| self.pointing[*i]).unwrap_or(0);
        (best, self.pointing.get(best).map_or(0.0, |n| *n as f64 / self.phrases.max(1) as f64))
    }

    /// Pointing accuracy, mean over all heads.
    fn mean_pointing(&self) -> f64 {
        self.pointing.iter().sum::<usize>() as f64 / (self.pointing.len() * self.phrases).max(1) as f64
    }

    /// A point of the learning curves: everything counted, as numbers right and asked.
    pub(crate) fn point_of_curve(&self, step: usize, source: Source) -> serde_json::Value {
        let count = |(right, all): (usize, usize)| json!({ "right": right, "all": all });
        let kinds = self.answers.iter().map(|(kind, counts)| (kind.name(), count(*counts)));
        let (head, pointing) = self.best_head();
        json!({
            "step": step,
            "source": format!("{source:?}"),
            "loss": self.loss(),
            "closed": count(self.closed),
            "phrases_from_image": count(self.seen),
            "phrases_from_question": count(self.copied),
            "best_head": head,
            "pointing_best": pointing,
            "pointing_mean": self.mean_pointing(),
            "kinds": kinds.collect::<serde_json::Map<_, _>>(),
        })
    }

    /// One line: loss, closed questions, their phrases, pointing, then every kind.
    pub(crate) fn line(&self) -> String {
        let percent = |(right, all): (usize, usize)| 100.0 * right as f64 / all.max(1) as f64;
        let (head, pointing) = self.best_head();
        let mean = self.mean_pointing();
        let mut line = format!(
            "loss {:.3} closed {:.1} (phrases seen {:.1}, copied {:.1}) pointing {:.1} (head {head}, mean {:.1})",
            self.loss(),
            percent(self.closed),
            percent(self.seen),
            percent(self.copied),
            100.0 * pointing,
            100.0 * mean
        );
        for (kind, counts) in &self.answers {
            line += &format!(" {} {:.0}/{}", kind.name(), percent(*counts), counts.1);
        }
        line
    }
}

/// A random generator that depends only on what it is for, so that a resumed run draws what the
/// uninterrupted one would have drawn.
pub(crate) fn rng_for(seed: u64, step: usize, worker: usize) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed ^ ((step as u64) << 20) ^ ((worker as u64) << 56))
}
