//! The training-free view of attention: K-means of a phrase's maps (`spec/evaluation.md` §9).

use candle_core::{DType, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::geometry::Geometry;
use crate::masks::Mask;
use crate::nn::bilinear_scaled;
use crate::{Error, Result};

/// Longer side of the mask head's logits, which maps are brought to.
const LOGIT_SIDE: f64 = 64.0;
const RESTARTS: usize = 10;
const MAX_ITERATIONS: usize = 300;
const TOLERANCE: f64 = 1e-4;

/// A partition of points and how tight it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Clusters {
    /// Cluster of every point.
    pub labels: Vec<usize>,
    /// Sum of squared distances to the cluster centres.
    pub inertia: f64,
}

/// One of two clusters, compared with a reference mask.
#[derive(Debug, Clone, PartialEq)]
pub struct Side {
    /// Pixels where the resized indicator map is above 0, so borders grow by the interpolation.
    pub mask: Mask,
    /// Soft intersection over union with the reference.
    pub soft_iou: f64,
}

/// K-means++ with ten restarts, at most 300 iterations each, keeping the best inertia. `points` is `[count, dims]`
/// row-major. The same seed gives the same partition.
pub fn kmeans(points: &[f32], dims: usize, clusters: usize, seed: u64) -> Result<Clusters> {
    if dims == 0 || clusters == 0 || !points.len().is_multiple_of(dims) || points.len() / dims < clusters {
        return Err(Error::request(
            format!("cannot make {clusters} clusters of {} numbers in rows of {dims}", points.len()),
            "give at least one point per cluster",
        ));
    }
    if points.iter().any(|v| !v.is_finite()) {
        return Err(Error::request("a point to cluster is not finite", "check the attention maps for NaN"));
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let stop = TOLERANCE * mean_variance(points, dims);
    let mut best = lloyd(points, dims, start(points, dims, clusters, &mut rng), stop);
    for _ in 1..RESTARTS {
        let next = lloyd(points, dims, start(points, dims, clusters, &mut rng), stop);
        if next.inertia < best.inertia {
            best = next;
        }
    }
    Ok(best)
}

/// Two clusters of the pixels of an attention stack `[C, h, w]` (resized and cropped, not normalised per map): each
/// pixel's C values, L2-normalised. Row-major, `true` = same cluster as pixel (0, 0).
pub fn attention_partition(stack: &Tensor, seed: u64) -> Result<(Vec<bool>, f64)> {
    let (channels, _, _) = stack.dims3()?;
    let points = stack.to_dtype(DType::F32)?.flatten_from(1)?.t()?.contiguous()?;
    let mut points = points.flatten_all()?.to_vec1::<f32>()?;
    for point in points.chunks_exact_mut(channels.max(1)) {
        let norm = point.iter().map(|v| v * v).sum::<f32>().sqrt().max(1e-12);
        point.iter_mut().for_each(|v| *v /= norm);
    }
    let found = kmeans(&points, channels, 2, seed)?;
    let first = found.labels[0];
    Ok((found.labels.iter().map(|&label| label == first).collect(), found.inertia))
}

/// Attention maps `[C, gh, gw]` of one phrase at the size of the mask head's logits, the LMM's padding cut off:
/// `[C, h, w]`, not normalised.
pub fn at_logit_size(maps: &Tensor, geometry: &Geometry) -> Result<Tensor> {
    let (_, grid_height, grid_width) = maps.dims3()?;
    let scale = LOGIT_SIDE / grid_height.max(grid_width).max(1) as f64;
    // As the mask head does: larger maps stay as they are.
    let maps = if scale > 1.0 { bilinear_scaled(maps, scale)? } else { maps.clone() };
    let (_, height, width) = maps.dims3()?;
    let rect = geometry.picture_rect(height, width);
    Ok(maps.narrow(1, rect.y0, rect.height)?.narrow(2, rect.x0, rect.width)?)
}

/// The training-free mask of a phrase: of the two clusters of its attention `stack [C, h, w]` ([`at_logit_size`]) the one
/// that fits `reference` better by soft IoU, at the size of `reference`. The same seed gives the same mask.
///
/// `reference` is the ground truth, or a predicted mask where there is none.
pub fn better_side(stack: &Tensor, reference: &Mask, seed: u64) -> Result<Side> {
    let (_, height, width) = stack.dims3()?;
    let (partition, _) = attention_partition(stack, seed)?;
    let [first, other] = sides(&partition, (height, width), reference)?;
    Ok(if first.soft_iou > other.soft_iou { first } else { other })
}

/// Both sides of a partition of `height × width` pixels at the size of `reference`: the side with pixel (0, 0), then
/// the other one. `reference` is the ground truth, or a predicted mask where there is none.
pub fn sides(partition: &[bool], (height, width): (usize, usize), reference: &Mask) -> Result<[Side; 2]> {
    let indicator =
        |wanted: bool| partition.iter().map(|&p| f32::from(u8::from(p == wanted))).collect::<Vec<_>>();
    let side = |wanted: bool| -> Result<Side> {
        let to = (reference.height(), reference.width());
        let soft = resize(&indicator(wanted), (height, width), to)?;
        let (mut both, mut sum) = (0f64, 0f64);
        for (&a, &g) in soft.iter().zip(reference.bits()) {
            let g = f64::from(u8::from(g));
            both += f64::from(a) * g;
            sum += f64::from(a) + g;
        }
        let union = sum - both;
        let mask = Mask::new(to.1, to.0, soft.iter().map(|&a| a > 0.0).collect())?;
        Ok(Side { mask, soft_iou: if union > 0.0 { both / union } else { 0.0 } })
    };
    Ok([side(true)?, side(false)?])
}

/// Bilinear resize of one row-major plane by the ratio rule of `spec/pipeline.md` §3.2. Sizes are (height, width).
pub fn resize(values: &[f32], from: (usize, usize), to: (usize, usize)) -> Result<Vec<f32>> {
    if from.0 * from.1 != values.len() || values.is_empty() {
        return Err(Error::request(
            format!("a {}×{} map cannot have {} values", from.1, from.0, values.len()),
            "give one value per cell, row by row",
        ));
    }
    let (rows, columns) = (taps(from.0, to.0), taps(from.1, to.1));
    let mut out = Vec::with_capacity(to.0 * to.1);
    for &(y0, y1, fy) in &rows {
        for &(x0, x1, fx) in &columns {
            let along = |y: usize| values[y * from.1 + x0] * (1.0 - fx) + values[y * from.1 + x1] * fx;
            out.push(along(y0) * (1.0 - fy) + along(y1) * fy);
        }
    }
    Ok(out)
}

/// For every output position the two source positions and the weight of the second one.
fn taps(from: usize, to: usize) -> Vec<(usize, usize, f32)> {
    let scale = from as f32 / to as f32;
    let tap = |i: usize| {
        let source = (scale * (i as f32 + 0.5) - 0.5).max(0.0);
        let first = (source as usize).min(from - 1);
        (first, (first + 1).min(from - 1), source - first as f32)
    };
    (0..to).map(tap).collect()
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum()
}

/// Mean over the features of their variance, which makes the tolerance relative.
fn mean_variance(points: &[f32], dims: usize) -> f64 {
    let count = (points.len() / dims) as f64;
    let variance = |d: usize| {
        let column = || points.iter().skip(d).step_by(dims).map(|&v| f64::from(v));
        let mean = column().sum::<f64>() / count;
        column().map(|v| (v - mean).powi(2)).sum::<f64>() / count
    };
    (0..dims).map(variance).sum::<f64>() / dims as f64
}

/// K-means++: centres drawn with probability proportional to the squared distance to the nearest one so far.
fn start(points: &[f32], dims: usize, clusters: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
    let count = points.len() / dims;
    let point = |i: usize| &points[i * dims..(i + 1) * dims];
    let mut centres = point(rng.random_range(0..count)).to_vec();
    let mut nearest: Vec<f64> = (0..count).map(|i| distance(point(i), &centres)).collect();
    while centres.len() < clusters * dims {
        let total: f64 = nearest.iter().sum();
        let mut left = rng.random::<f64>() * total;
        let chosen = nearest.iter().position(|&d| {
            left -= d;
            left < 0.0
        });
        let centre = point(chosen.unwrap_or(count - 1)).to_vec();
        for (i, near) in nearest.iter_mut().enumerate() {
            *near = near.min(distance(point(i), &centre));
        }
        centres.extend(centre);
    }
    centres
}

fn lloyd(points: &[f32], dims: usize, mut centres: Vec<f32>, stop: f64) -> Clusters {
    let assign = |centres: &[f32]| -> Clusters {
        let mut inertia = 0.0;
        let nearest = |point: &[f32]| {
            let (label, d) = centres
                .chunks_exact(dims)
                .map(|centre| distance(point, centre))
                .enumerate()
                .fold((0, f64::INFINITY), |best, (k, d)| if d < best.1 { (k, d) } else { best });
            inertia += d;
            label
        };
        let labels = points.chunks_exact(dims).map(nearest).collect();
        Clusters { labels, inertia }
    };
    let mut now = assign(&centres);
    for _ in 0..MAX_ITERATIONS {
        let moved = recentre(points, dims, &now.labels, &mut centres);
        let next = assign(&centres);
        let same = next.labels == now.labels;
        now = next;
        if same || moved <= stop {
            break;
        }
    }
    now
}

/// Moves every centre to the mean of its points (an empty cluster stays) and returns the squared way they went.
fn recentre(points: &[f32], dims: usize, labels: &[usize], centres: &mut [f32]) -> f64 {
    let mut sums = vec![0f64; centres.len()];
    let mut counts = vec![0usize; centres.len() / dims];
    for (point, &label) in points.chunks_exact(dims).zip(labels) {
        counts[label] += 1;
        for (sum, &v) in sums[label * dims..].iter_mut().zip(point) {
            *sum += f64::from(v);
        }
    }
    let mut moved = 0.0;
    for (k, centre) in centres.chunks_exact_mut(dims).enumerate().filter(|(k, _)| counts[*k] > 0) {
        for (value, sum) in centre.iter_mut().zip(&sums[k * dims..]) {
            let mean = (sum / counts[k] as f64) as f32;
            moved += (f64::from(mean) - f64::from(*value)).powi(2);
            *value = mean;
        }
    }
    moved
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn separates_two_groups() -> Result<()> {
        let points = [0.0, 0.0, 0.1, 0.0, 5.0, 5.0, 5.1, 5.0, 0.0, 0.1f32];
        let found = kmeans(&points, 2, 2, 7)?;
        let group = |i: usize| found.labels[i] == found.labels[0];
        assert_eq!((0..5).map(group).collect::<Vec<_>>(), [true, true, false, false, true]);
        assert!(kmeans(&points, 2, 6, 7).is_err());
        assert!(kmeans(&[f32::NAN, 1.0], 1, 2, 7).is_err());
        Ok(())
    }

    /// As the mask head does it: the longer side becomes 64, then padding goes; larger maps are only cut.
    #[test]
    fn maps_come_to_the_size_of_logits() -> Result<()> {
        let geometry = Geometry {
            original: (8, 16),
            image_shape: (8, 16),
            before: (4, 0),
            padded_shape: (16, 16),
            crop: true,
        };
        let size = |grid: (usize, usize), geometry: &Geometry| -> Result<_> {
            let maps = Tensor::zeros((3, grid.0, grid.1), DType::F32, &Device::Cpu)?;
            Ok(at_logit_size(&maps, geometry)?.dims3()?)
        };
        assert_eq!(size((4, 4), &geometry)?, (3, 32, 64));
        assert_eq!(size((96, 96), &geometry)?, (3, 48, 96));
        let whole = Geometry { crop: false, ..geometry };
        assert_eq!(size((32, 48), &whole)?, (3, 42, 64));
        Ok(())
    }

    #[test]
    fn equal_points_do_not_hang_or_fail() -> Result<()> {
        assert_eq!(kmeans(&[1.0; 8], 2, 2, 0)?.inertia, 0.0);
        Ok(())
    }
}
