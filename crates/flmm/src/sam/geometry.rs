//! Frames of the refiner: original picture, resized picture, padded square, low-resolution masks.

use candle_core::{Device, Tensor};

use crate::error::Result;
use crate::vision::preprocess::sam_size;

/// Sizes `(height, width)` of a picture before and after SAM's resize (`spec/pipeline.md` §5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SamGeometry {
    /// Size of the picture as the user gave it.
    pub original: (usize, usize),
    /// Size after the longer side was brought to SAM's input size; the rest of the square is padding.
    pub resized: (usize, usize),
}

impl SamGeometry {
    /// The geometry of an `original` picture for a SAM of input side `image_size`.
    pub fn new(original: (usize, usize), image_size: usize) -> Self {
        Self { original, resized: sam_size(original, image_size) }
    }

    /// Box `(x0, y0, x1, y1)` from picture pixels to pixels of SAM's input (f64, as published).
    pub fn sam_from_image(&self, [x0, y0, x1, y1]: [f64; 4]) -> [f64; 4] {
        let sy = self.resized.0 as f64 / self.original.0 as f64;
        let sx = self.resized.1 as f64 / self.original.1 as f64;
        [x0 * sx, y0 * sy, x1 * sx, y1 * sy]
    }
}

/// The two source positions and weights of each output position of a bilinear resize.
type Taps = Vec<[(usize, f64); 2]>;

/// Half-pixel bilinear resize by ratio (`spec/pipeline.md` §3.2). Positions are computed in f32 as published.
fn taps(input: usize, output: usize) -> Taps {
    let scale = input as f32 / output as f32;
    (0..output)
        .map(|i| {
            if input == output {
                return [(i, 1.0), (i, 0.0)];
            }
            let source = scale.mul_add(i as f32 + 0.5, -0.5).max(0.0);
            let first = (source as usize).min(input - 1);
            let fraction = source - first as f32;
            [(first, f64::from(1.0 - fraction)), ((first + 1).min(input - 1), f64::from(fraction))]
        })
        .collect()
}

/// One axis of a chain of two resizes as a matrix: the second resize sees only the first `kept` rows of what the
/// first one made. Also returns how much weight each output takes from those rows.
fn chain(first: &Taps, kept: usize, second: &Taps, input: usize) -> (Vec<f32>, Vec<f64>) {
    let mut matrix = vec![0f32; second.len() * input];
    let mut inside = Vec::with_capacity(second.len());
    for (row, outer) in matrix.chunks_mut(input).zip(second) {
        let mut exact = [(0, 0.0); 4];
        let mut covered = 0.0;
        for (k, &(middle, outer_weight)) in outer.iter().enumerate().filter(|(_, (middle, _))| *middle < kept)
        {
            covered += outer_weight;
            for (j, &(source, weight)) in first[middle].iter().enumerate() {
                exact[2 * k + j] = (source, outer_weight * weight);
            }
        }
        inside.push(covered);
        for (source, weight) in exact {
            row[source] += weight as f32;
        }
    }
    (matrix, inside)
}

/// `x [N, h, w]` → `rows [H, h] · x · colsᵀ [w, W]` = `[N, H, W]`.
fn separable(x: &Tensor, rows: &Tensor, cols: &Tensor) -> Result<Tensor> {
    let (n, h, w) = x.dims3()?;
    let (out_h, out_w) = (rows.dim(0)?, cols.dim(0)?);
    let x = x.reshape((n * h, w))?.matmul(&cols.t()?)?.reshape((n, h, out_w))?;
    let x = x.transpose(1, 2)?.contiguous()?.reshape((n * out_w, h))?.matmul(&rows.t()?)?;
    Ok(x.reshape((n, out_w, out_h))?.transpose(1, 2)?.contiguous()?)
}

/// Mask prompts from cropped CNN logits (`spec/pipeline.md` §5.2): resize `[N, mh, mw]` to the resized picture, pad
/// with `pad` to the square of `image_size`, resize to `low_res`. Both resizes are linear, so they are one product
/// per axis and the padding is a constant. Differentiable in `logits`.
pub(super) fn mask_prompt(
    logits: &Tensor,
    geometry: &SamGeometry,
    image_size: usize,
    low_res: usize,
    pad: f32,
) -> Result<Tensor> {
    let (_, mh, mw) = logits.dims3()?;
    let device = logits.device();
    let shrink = taps(image_size, low_res);
    let axis = |len: usize, resized: usize| {
        let (matrix, inside) = chain(&taps(len, resized), resized, &shrink, len);
        Ok::<_, crate::Error>((Tensor::from_vec(matrix, (low_res, len), device)?, inside))
    };
    let (rows, inside_y) = axis(mh, geometry.resized.0)?;
    let (cols, inside_x) = axis(mw, geometry.resized.1)?;
    let outside = |y: f64| inside_x.iter().map(move |x| (f64::from(pad) * (1.0 - y * x)) as f32);
    let padding: Vec<f32> = inside_y.iter().flat_map(|&y| outside(y)).collect();
    let padding = Tensor::from_vec(padding, (1, low_res, low_res), device)?;
    Ok(separable(logits, &rows, &cols)?.broadcast_add(&padding)?)
}

/// Low-resolution masks `[N, l, l]` to the picture's own size `[N, H, W]` (`spec/pipeline.md` §5.3): resize to the
/// square of `image_size`, crop to the resized picture, resize to the original. Differentiable.
pub(super) fn upscale(masks: &Tensor, geometry: &SamGeometry, image_size: usize) -> Result<Tensor> {
    let (_, lh, lw) = masks.dims3()?;
    let axis = |len: usize, resized: usize, original: usize| {
        let (matrix, _) = chain(&taps(len, image_size), resized, &taps(resized, original), len);
        Ok::<_, crate::Error>(Tensor::from_vec(matrix, (original, len), masks.device())?)
    };
    let rows = axis(lh, geometry.resized.0, geometry.original.0)?;
    let cols = axis(lw, geometry.resized.1, geometry.original.1)?;
    separable(masks, &rows, &cols)
}

/// Thresholded CNN masks at the size of the picture, one per phrase, and the boxes around them.
///
/// The sigmoid comes before the resize and the threshold is strict (`spec/pipeline.md` §5.2). No gradient.
pub(super) fn coarse_masks(logits: &Tensor, original: (usize, usize)) -> Result<Vec<Vec<bool>>> {
    let (n, mh, mw) = logits.dims3()?;
    let values = logits.detach().to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
    let probs: Vec<f32> = values.into_iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect();
    let (ys, xs) = (taps(mh, original.0), taps(mw, original.1));
    let mask = |phrase: usize| {
        let probs = &probs[phrase * mh * mw..][..mh * mw];
        let mut mask = Vec::with_capacity(original.0 * original.1);
        for &[(y0, wy0), (y1, wy1)] in &ys {
            let (upper, lower) = (&probs[y0 * mw..][..mw], &probs[y1 * mw..][..mw]);
            mask.extend(xs.iter().map(|&[(x0, wx0), (x1, wx1)]| {
                let (wx0, wx1) = (wx0 as f32, wx1 as f32);
                let top = wx0 * upper[x0] + wx1 * upper[x1];
                let bottom = wx0 * lower[x0] + wx1 * lower[x1];
                wy0 as f32 * top + wy1 as f32 * bottom > 0.5
            }));
        }
        mask
    };
    Ok((0..n).map(mask).collect())
}

/// The box `(x0, y0, x1, y1)` around a mask of `(height, width)`, ends exclusive; the whole picture if it is empty.
pub(super) fn bounding_box(mask: &[bool], (height, width): (usize, usize)) -> [f64; 4] {
    let (mut x0, mut y0, mut x1, mut y1) = (width, height, 0, 0);
    for (y, row) in mask.chunks(width.max(1)).enumerate() {
        let Some(first) = row.iter().position(|&set| set) else { continue };
        let last = row.iter().rposition(|&set| set).unwrap_or(first);
        (x0, x1) = (x0.min(first), x1.max(last + 1));
        (y0, y1) = (y0.min(y), y + 1);
    }
    if x1 == 0 {
        return [0.0, 0.0, width as f64, height as f64];
    }
    [x0 as f64, y0 as f64, x1 as f64, y1 as f64]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resized_sizes_match_the_published_test_vectors() {
        // spec/models.md §11.
        for (original, resized) in [
            ((480, 640), (768, 1024)),
            ((640, 427), (1024, 683)),
            ((333, 500), (682, 1024)),
            ((425, 640), (680, 1024)),
        ] {
            assert_eq!(SamGeometry::new(original, 1024).resized, resized);
        }
    }

    #[test]
    fn boxes_have_exclusive_ends_and_fall_back_to_the_picture() {
        let mut mask = vec![false; 12];
        assert_eq!(bounding_box(&mask, (3, 4)), [0.0, 0.0, 4.0, 3.0]);
        mask[4 + 2] = true;
        assert_eq!(bounding_box(&mask, (3, 4)), [2.0, 1.0, 3.0, 2.0]);
        mask[8] = true;
        assert_eq!(bounding_box(&mask, (3, 4)), [0.0, 1.0, 3.0, 3.0]);
    }

    #[test]
    fn the_threshold_is_strict() -> Result<()> {
        let logits = Tensor::zeros((1, 2, 2), candle_core::DType::F32, &Device::Cpu)?;
        assert!(coarse_masks(&logits, (4, 4))?[0].iter().all(|&set| !set));
        Ok(())
    }

    #[test]
    fn chained_resizes_equal_the_resizes_one_after_another() -> Result<()> {
        let geometry = SamGeometry::new((5, 9), 64);
        let x: Vec<f32> = (0..35).map(|i| ((i * 7919) % 101) as f32 / 50.0 - 1.0).collect();
        let x = Tensor::from_vec(x, (1, 5, 7), &Device::Cpu)?;
        let prompt = mask_prompt(&x, &geometry, 64, 16, -3.0)?;
        let (h, w) = geometry.resized;
        let at = |i: usize, tap: &Taps, f: &dyn Fn(usize) -> f64| {
            tap[i].iter().map(|&(s, k)| k * f(s)).sum::<f64>()
        };
        let source = x.to_vec3::<f32>()?;
        let (ty, tx, shrink) = (taps(5, h), taps(7, w), taps(64, 16));
        let padded = |y: usize, x: usize| {
            if y >= h || x >= w {
                return -3.0;
            }
            at(y, &ty, &|sy| at(x, &tx, &|sx| f64::from(source[0][sy][sx])))
        };
        for (y, row) in prompt.to_vec3::<f32>()?[0].iter().enumerate() {
            for (x, value) in row.iter().enumerate() {
                let expected = at(y, &shrink, &|sy| at(x, &shrink, &|sx| padded(sy, sx)));
                assert!(
                    (f64::from(*value) - expected).abs() < 1e-5,
                    "({y}, {x}): {value} instead of {expected}"
                );
            }
        }
        Ok(())
    }
}
