//! Head selection, beyond the paper: which attention maps tell most about where a phrase's object is.
//!
//! An LMM has hundreds to thousands of maps, and the mask head's first convolution and its input grow with them.
//! The maps are judged on a few samples, and a mask head of fewer channels is trained on the best.

use std::path::Path;

use flmm::layout::maps_in_picture;
use flmm::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::head::HeadSample;
use crate::samples::Samples;
use crate::tolerant::is_about_the_sample;

/// How well every attention map agrees with the masks of `samples` number `indices`, on average over phrases.
///
/// The measure is the correlation of the map with the mask (1 inside, 0 outside) over the token grid, the LMM's
/// padding cut off: 1 is the mask itself, 0 says nothing. It does not depend on how much attention a head pays in all,
/// which the mask head does not see either.
///
/// # Errors
/// The first error of a sample; [`Error::Request`] if there is no phrase or samples have different numbers of maps.
pub fn channel_scores(
    samples: &dyn Samples<HeadSample>,
    indices: impl IntoIterator<Item = usize>,
) -> Result<Vec<f64>> {
    let mut scores = Scores::default();
    indices.into_iter().try_for_each(|index| scores.add(&samples.sample(index, 0)?))?;
    scores.means()
}

/// Sums of the maps' scores over phrases.
#[derive(Default)]
struct Scores {
    sums: Vec<f64>,
    phrases: u32,
}

impl Scores {
    fn add(&mut self, sample: &HeadSample) -> Result<()> {
        let (_, channels, ..) = sample.observation.maps.dims4()?;
        if self.phrases == 0 {
            self.sums = vec![0.0; channels];
        }
        if self.sums.len() != channels {
            return Err(Error::request(
                format!("a sample has {channels} attention maps, others have {}", self.sums.len()),
                "all samples must come from one LMM",
            ));
        }
        for phrase in 0..sample.observation.phrases.len() {
            add_scores(sample, phrase, &mut self.sums)?;
            self.phrases += 1;
        }
        Ok(())
    }

    fn means(self) -> Result<Vec<f64>> {
        match self.phrases {
            0 => Err(Error::request("no phrase to judge attention maps by", "give samples with phrases")),
            phrases => Ok(self.sums.into_iter().map(|sum| sum / f64::from(phrases)).collect()),
        }
    }
}

/// The numbers of the `count` best maps, best first; of equals the lower number.
pub fn best_channels(scores: &[f64], count: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
    order.truncate(count);
    order
}

/// Samples that maps are judged on.
const JUDGED_ON: usize = 64;
/// The file in a run's folder that keeps the choice.
const FILE: &str = "maps.json";

/// What a choice of maps depends on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Basis {
    /// Maps that the LMM has.
    pub(crate) channels: usize,
    /// Fingerprint of the LMM.
    pub(crate) lmm: String,
    /// Digests of the annotations.
    pub(crate) data: serde_json::Value,
}

/// The `count` best maps by a few of `samples`, kept in the run's folder `out` so that a resumed run looks at the same
/// ones. They are chosen anew if what they were chosen by has changed. Samples that cannot be used are passed over.
///
/// # Errors
/// [`Error::Request`] if the LMM has not so many maps; the last error of a sample if none can be used.
pub(crate) fn chosen_maps(
    count: usize,
    basis: &Basis,
    samples: &dyn Samples<HeadSample>,
    out: &Path,
) -> Result<Vec<u32>> {
    if count == 0 || count > basis.channels {
        return Err(Error::request(
            format!("`head.maps` is {count}, but the LMM has {} attention maps", basis.channels),
            format!("give a number from 1 to {}", basis.channels),
        ));
    }
    let file = out.join(FILE);
    match std::fs::read(&file) {
        Ok(text) => {
            let kept: Choice = serde_json::from_slice(&text).map_err(|e| {
                Error::config(&file, format!("not a choice of maps: {e}"), "delete it to choose anew")
            })?;
            if kept.maps.len() == count && kept.basis == *basis {
                return Ok(kept.maps);
            }
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(Error::io(&file, e)),
    }
    let len = samples.len();
    let (mut scores, mut last) = (Scores::default(), None);
    for index in (0..JUDGED_ON.min(len)).map(|i| i * len / JUDGED_ON.min(len)) {
        match samples.sample(index, 0) {
            Ok(sample) => scores.add(&sample)?,
            Err(error) if is_about_the_sample(&error) => last = Some(error),
            Err(error) => return Err(error),
        }
    }
    let scores = match (scores.phrases, last) {
        (0, Some(error)) => return Err(error),
        _ => scores.means()?,
    };
    let choice = Choice { maps: best_channels(&scores, count), basis: basis.clone(), scores };
    std::fs::create_dir_all(out).map_err(|e| Error::io(out, e))?;
    let json = serde_json::to_vec(&choice).map_err(|e| Error::io(&file, e.into()))?;
    flmm::atomic::write(&file, |to| to.write_all(&json))?;
    Ok(choice.maps)
}

/// What was chosen and why.
#[derive(Serialize, Deserialize)]
struct Choice {
    maps: Vec<u32>,
    basis: Basis,
    scores: Vec<f64>,
}

/// Adds every map's score for one phrase.
fn add_scores(sample: &HeadSample, phrase: usize, sums: &mut [f64]) -> Result<()> {
    let observation = &sample.observation;
    let (_, _, grid_h, grid_w) = observation.maps.dims4()?;
    let maps = observation.maps.narrow(0, phrase, 1)?;
    let maps = maps_in_picture(&maps, &observation.geometry, grid_h, grid_w)?.squeeze(0)?;
    let (_, height, width) = maps.dims3()?;
    let maps = maps.flatten_from(1)?.to_vec2::<f32>()?;
    let mask = covered(&sample.masks.get(phrase)?.to_vec2::<u8>()?, height, width);
    for (sum, map) in sums.iter_mut().zip(&maps) {
        *sum += correlation(map, &mask);
    }
    Ok(())
}

/// The share of every cell of a `rows × columns` grid that `mask` covers.
fn covered(mask: &[Vec<u8>], rows: usize, columns: usize) -> Vec<f32> {
    let (height, width) = (mask.len(), mask.first().map_or(0, Vec::len));
    // At least one pixel, also where the grid is finer than the picture.
    let span = |i: usize, cells: usize, pixels: usize| {
        let start = (i * pixels / cells).min(pixels.saturating_sub(1));
        start..((i + 1) * pixels / cells).max(start + 1).min(pixels)
    };
    let mut shares = Vec::with_capacity(rows * columns);
    for y in 0..rows {
        for x in 0..columns {
            let (lines, across) = (span(y, rows, height), span(x, columns, width));
            let count = lines.len() * across.len();
            let inside: usize = mask[lines]
                .iter()
                .map(|line| line[across.clone()].iter().filter(|&&pixel| pixel != 0).count())
                .sum();
            shares.push(inside as f32 / count.max(1) as f32);
        }
    }
    shares
}

/// Pearson's correlation; 0 where either side is constant.
fn correlation(a: &[f32], b: &[f32]) -> f64 {
    let mean = |x: &[f32]| x.iter().map(|&v| f64::from(v)).sum::<f64>() / x.len().max(1) as f64;
    let (mean_a, mean_b) = (mean(a), mean(b));
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (&a, &b) in a.iter().zip(b) {
        let (a, b) = (f64::from(a) - mean_a, f64::from(b) - mean_b);
        (ab, aa, bb) = (ab + a * b, aa + a * a, bb + b * b);
    }
    if aa > 0.0 && bb > 0.0 { ab / (aa * bb).sqrt() } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};
    use flmm::Geometry;
    use flmm::grounder::Observation;
    use flmm::sam::SamGeometry;

    use super::*;
    use crate::samples::from_fn;

    /// One phrase in a picture of 2 × 2 pixels; map `shown` of three is its mask.
    fn sample(shown: usize) -> HeadSample {
        let mask = [1u8, 0, 0, 0];
        let maps =
            (0..3).flat_map(|map| mask.map(|inside| if map == shown { f32::from(inside) } else { 0.2 }));
        let zeros = |shape: &[usize]| Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
        HeadSample {
            observation: Observation {
                maps: Tensor::from_iter(maps, &Device::Cpu).unwrap().reshape((1, 3, 2, 2)).unwrap(),
                hidden: zeros(&[1, 1, 1]),
                phrases: vec![vec![0]],
                geometry: Geometry {
                    original: (2, 2),
                    image_shape: (2, 2),
                    before: (0, 0),
                    padded_shape: (2, 2),
                    crop: false,
                },
                sam_embedding: zeros(&[1, 1, 1, 1]),
                sam_geometry: SamGeometry::new((2, 2), 4),
            },
            masks: Tensor::new(&mask, &Device::Cpu).unwrap().reshape((1, 2, 2)).unwrap(),
            token_labels: None,
        }
    }

    fn basis(lmm: &str) -> Basis {
        Basis { channels: 3, lmm: lmm.into(), data: serde_json::json!({ "png": "1" }) }
    }

    #[test]
    fn a_choice_is_kept_until_its_basis_changes_and_passes_over_broken_samples() {
        let dir = tempfile::tempdir().unwrap();
        let broken = |index: usize| -> Result<HeadSample> {
            Err(Error::image(format!("picture {index}"), "look for it"))
        };
        let shows = |map: usize| {
            from_fn(6, move |index, _| if index.is_multiple_of(2) { broken(index) } else { Ok(sample(map)) })
        };
        assert_eq!(chosen_maps(1, &basis("a"), &shows(2), dir.path()).unwrap(), [2]);
        let unasked = from_fn(6, |_, _| panic!("nothing is to be judged"));
        assert_eq!(chosen_maps(1, &basis("a"), &unasked, dir.path()).unwrap(), [2]);
        assert_eq!(chosen_maps(1, &basis("b"), &shows(1), dir.path()).unwrap(), [1]);
        assert_eq!(chosen_maps(2, &basis("b"), &shows(1), dir.path()).unwrap(), [1, 0]);
        for count in [0, 4] {
            let error = chosen_maps(count, &basis("a"), &unasked, dir.path()).unwrap_err().to_string();
            assert!(error.contains("the LMM has 3 attention maps"), "{error}");
        }
        let none = from_fn(6, |index, _| broken(index));
        let error = chosen_maps(1, &basis("c"), &none, dir.path()).unwrap_err().to_string();
        assert!(error.contains("picture 5"), "{error}");
    }

    #[test]
    fn correlation_is_pearsons() {
        let mask = [0.0, 1.0, 0.0, 1.0];
        assert!((correlation(&mask, &mask) - 1.0).abs() < 1e-12);
        // Scale and offset do not matter, sign does.
        assert!((correlation(&[3.0, 1.0, 3.0, 1.0], &mask) + 1.0).abs() < 1e-12);
        assert_eq!(correlation(&[0.5; 4], &mask), 0.0);
        let by_hand = correlation(&[1.0, 2.0, 3.0, 4.0], &mask);
        assert!((by_hand - 1.0 / 5f64.sqrt()).abs() < 1e-12, "{by_hand}");
    }

    #[test]
    fn coverage_counts_pixels() {
        let mask = vec![vec![1, 1, 0, 0], vec![1, 0, 0, 0]];
        assert_eq!(covered(&mask, 1, 2), [0.75, 0.0]);
        assert_eq!(covered(&mask, 4, 4)[..8], [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn the_best_come_first() {
        assert_eq!(best_channels(&[0.1, 0.9, f64::NAN, 0.9, -0.5], 5)[1..], [1, 3, 0, 4]);
        assert_eq!(best_channels(&[0.1, 0.9, 0.3], 2), [1, 2]);
    }
}
