//! Head selection, beyond the paper: which attention maps tell most about where a phrase's object is.
//!
//! An LMM has hundreds to thousands of maps, and the mask head's first convolution and its input grow with them.
//! The maps are judged on a few samples, and a mask head of fewer channels is trained on the best.

use std::path::Path;

use flmm::{Error, Result};

use crate::head::HeadSample;
use crate::samples::Samples;

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
    let (mut sums, mut phrases) = (Vec::new(), 0);
    for index in indices {
        let sample = samples.sample(index, 0)?;
        let (_, channels, ..) = sample.observation.maps.dims4()?;
        if sums.is_empty() {
            sums.resize(channels, 0.0);
        }
        if sums.len() != channels {
            return Err(Error::request(
                format!("sample {index} has {channels} attention maps, others have {}", sums.len()),
                "all samples must come from one LMM",
            ));
        }
        for phrase in 0..sample.observation.phrases.len() {
            add_scores(&sample, phrase, &mut sums)?;
            phrases += 1;
        }
    }
    if phrases == 0 {
        return Err(Error::request("no phrase to judge attention maps by", "give samples with phrases"));
    }
    sums.iter_mut().for_each(|sum| *sum /= f64::from(phrases));
    Ok(sums)
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

/// The `count` best maps by a few of `samples`, kept in the run's folder `out` so that a resumed run looks at the same
/// ones; `None` if all maps are used.
pub(crate) fn chosen_maps(
    count: Option<usize>,
    samples: &dyn Samples<HeadSample>,
    out: &Path,
) -> Result<Option<Vec<u32>>> {
    let Some(count) = count else { return Ok(None) };
    let file = out.join(FILE);
    match std::fs::read(&file) {
        Ok(text) => {
            let kept: Choice = serde_json::from_slice(&text).map_err(|e| {
                Error::config(&file, format!("not a choice of maps: {e}"), "delete it to choose anew")
            })?;
            if kept.maps.len() == count {
                return Ok(Some(kept.maps));
            }
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(Error::io(&file, e)),
    }
    let len = samples.len();
    let judged = (0..JUDGED_ON.min(len)).map(|i| i * len / JUDGED_ON.min(len));
    let scores = channel_scores(samples, judged)?;
    if count == 0 || count > scores.len() {
        return Err(Error::request(
            format!("`head.maps` is {count}, but the LMM has {} attention maps", scores.len()),
            format!("give a number from 1 to {}", scores.len()),
        ));
    }
    let choice = Choice { maps: best_channels(&scores, count), scores };
    std::fs::create_dir_all(out).map_err(|e| Error::io(out, e))?;
    let json = serde_json::to_vec(&choice).map_err(|e| Error::io(&file, e.into()))?;
    flmm::atomic::write(&file, |to| to.write_all(&json))?;
    Ok(Some(choice.maps))
}

/// What was chosen and why.
#[derive(serde::Serialize, serde::Deserialize)]
struct Choice {
    maps: Vec<u32>,
    scores: Vec<f64>,
}

/// Adds every map's score for one phrase.
fn add_scores(sample: &HeadSample, phrase: usize, sums: &mut [f64]) -> Result<()> {
    let observation = &sample.observation;
    let (_, _, grid_h, grid_w) = observation.maps.dims4()?;
    let rect = observation.geometry.picture_rect(grid_h, grid_w);
    let maps =
        observation.maps.get(phrase)?.narrow(1, rect.y0, rect.height)?.narrow(2, rect.x0, rect.width)?;
    let maps = maps.flatten_from(1)?.to_vec2::<f32>()?;
    let mask = covered(&sample.masks.get(phrase)?.to_vec2::<u8>()?, rect.height, rect.width);
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
    use super::*;

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
