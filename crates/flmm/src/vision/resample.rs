//! Pillow's 8-bit resize, bit for bit (`spec/models.md` §10.1), and its bilinear filter on tensors (§10.3).

use candle_core::{D, DType, Tensor};
use image::RgbImage;
use rayon::prelude::*;

use crate::error::Result;

/// Fractional bits of the fixed-point weights.
const BITS: u32 = 22;
const CHANNELS: usize = 3;

/// The interpolation kernel. Both widen when shrinking, so that every source pixel counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// Triangle of radius 1.
    Bilinear,
    /// Catmull–Rom cubic (a = −0.5) of radius 2.
    Bicubic,
}

impl Filter {
    fn radius(self) -> f64 {
        match self {
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        const A: f64 = -0.5;
        let x = x.abs();
        match self {
            Self::Bilinear if x < 1.0 => 1.0 - x,
            Self::Bicubic if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
            Self::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
            _ => 0.0,
        }
    }
}

/// The source pixels of one output pixel: `weights` apply from `first` on.
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

/// The taps of every output pixel along one axis.
fn taps(input: usize, output: usize, filter: Filter) -> Vec<Taps> {
    let scale = input as f64 / output as f64;
    let stretch = scale.max(1.0);
    let support = filter.radius() * stretch;
    let shrink = 1.0 / stretch;
    let tap = |i: usize| {
        let centre = (i as f64 + 0.5) * scale;
        // Conversions saturate: a negative start is 0.
        let first = (centre - support + 0.5) as usize;
        let end = ((centre + support + 0.5) as usize).min(input);
        let raw: Vec<f64> = (first..end).map(|j| filter.weight((j as f64 - centre + 0.5) * shrink)).collect();
        let sum: f64 = raw.iter().sum();
        let fixed = |w: f64| (w / sum * f64::from(1 << BITS)).round() as i32;
        Taps { first, weights: raw.into_iter().map(fixed).collect() }
    };
    (0..output).map(tap).collect()
}

/// Antialiased bilinear resize of `x [.., h, w]`: Pillow's filter, but weights and sums are f32 and nothing is
/// rounded in between (`spec/models.md` §10.3). Returned in the type of `x`.
///
/// # Errors
/// [`crate::Error::Tensor`] if `x` has fewer than two axes or no pixels.
pub fn antialiased_bilinear(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    let (h, w) = (x.dim(D::Minus2)?, x.dim(D::Minus1)?);
    if h * w * height * width == 0 {
        return Err(candle_core::Error::msg("cannot resize an empty map").into());
    }
    let matrix = |input: usize, output: usize| {
        let mut matrix = vec![0f32; output * input];
        // As `taps`, in f32: the reference's weights differ from exact ones by 1e-5, and so do its pictures.
        let scale = input as f32 / output as f32;
        let stretch = scale.max(1.0);
        for (i, row) in matrix.chunks_exact_mut(input).enumerate() {
            let centre = scale * (i as f32 + 0.5);
            let first = (centre - stretch + 0.5) as usize;
            let end = ((centre + stretch + 0.5) as usize).min(input);
            for (j, to) in row.iter_mut().enumerate().take(end).skip(first) {
                *to = (1.0 - ((j as f32 - centre + 0.5) * (1.0 / stretch)).abs()).max(0.0);
            }
            let sum: f32 = row.iter().sum();
            row.iter_mut().for_each(|weight| *weight /= sum);
        }
        Tensor::from_vec(matrix, (output, input), x.device())
    };
    let maps = x.elem_count() / (h * w);
    let narrowed = x.to_dtype(DType::F32)?.reshape((maps * h, w))?.matmul(&matrix(w, width)?.t()?)?;
    let y = matrix(h, height)?.unsqueeze(0)?.broadcast_matmul(&narrowed.reshape((maps, h, width))?)?;
    let mut dims = x.dims()[..x.rank() - 2].to_vec();
    dims.extend([height, width]);
    Ok(y.reshape(dims)?.to_dtype(x.dtype())?)
}

/// Rounds a fixed-point sum to a byte. The shift is arithmetic.
fn clip(sum: i32) -> u8 {
    (sum >> BITS).clamp(0, 255) as u8
}

/// Half a unit, added before [`clip`].
const HALF: i32 = 1 << (BITS - 1);

/// Resizes to `width × height` exactly as Pillow's `Image.resize` does on 8-bit RGB: along the rows, rounded to
/// 8 bits, then along the columns; an axis that keeps its length is not touched.
///
/// A width or height of zero counts as one.
pub fn pillow_resize(image: &RgbImage, width: u32, height: u32, filter: Filter) -> RgbImage {
    let (width, height) = (width.max(1), height.max(1));
    if image.width() == 0 || image.height() == 0 {
        return RgbImage::new(width, height);
    }
    let narrowed = (image.width() != width).then(|| resize_rows(image, width, filter));
    let image = narrowed.as_ref().unwrap_or(image);
    if image.height() == height { image.clone() } else { resize_columns(image, height, filter) }
}

fn resize_rows(image: &RgbImage, width: u32, filter: Filter) -> RgbImage {
    let taps = taps(image.width() as usize, width as usize, filter);
    let mut resized = RgbImage::new(width, image.height());
    let source = image.as_raw().par_chunks(CHANNELS * image.width() as usize);
    let target = resized.par_chunks_mut(CHANNELS * width as usize);
    target.zip(source).for_each_init(Vec::new, |planes: &mut Vec<u8>, (target, source)| {
        // Channel by channel, so that every sum runs over neighbouring bytes.
        planes.clear();
        for channel in 0..CHANNELS {
            planes.extend(source.iter().skip(channel).step_by(CHANNELS));
        }
        for (channel, plane) in planes.chunks_exact(source.len() / CHANNELS).enumerate() {
            for (pixel, taps) in target.chunks_exact_mut(CHANNELS).zip(&taps) {
                let window = &plane[taps.first..taps.first + taps.weights.len()];
                let sum: i32 = window.iter().zip(&taps.weights).map(|(&p, &w)| i32::from(p) * w).sum();
                pixel[channel] = clip(sum + HALF);
            }
        }
    });
    resized
}

fn resize_columns(image: &RgbImage, height: u32, filter: Filter) -> RgbImage {
    let taps = taps(image.height() as usize, height as usize, filter);
    let mut resized = RgbImage::new(image.width(), height);
    let stride = CHANNELS * image.width() as usize;
    let source = image.as_raw();
    resized.par_chunks_mut(stride).zip(&taps).for_each_init(
        Vec::new,
        |sums: &mut Vec<i32>, (target, taps)| {
            sums.clear();
            sums.resize(stride, HALF);
            for (row, &weight) in source[taps.first * stride..].chunks_exact(stride).zip(&taps.weights) {
                for (sum, &p) in sums.iter_mut().zip(row) {
                    *sum += i32::from(p) * weight;
                }
            }
            for (byte, &sum) in target.iter_mut().zip(sums.iter()) {
                *byte = clip(sum);
            }
        },
    );
    resized
}

#[cfg(test)]
mod tests {
    use image::Rgb;
    use proptest::prelude::*;

    use super::*;

    fn picture() -> impl Strategy<Value = RgbImage> {
        (1u32..40, 1u32..40).prop_flat_map(|(w, h)| {
            prop::collection::vec(any::<u8>(), (w * h * 3) as usize)
                .prop_map(move |bytes| RgbImage::from_raw(w, h, bytes).unwrap())
        })
    }

    fn filter() -> impl Strategy<Value = Filter> {
        prop_oneof![Just(Filter::Bilinear), Just(Filter::Bicubic)]
    }

    proptest! {
        #[test]
        fn every_size_works_and_one_colour_stays(image in picture(), w in 1u32..90, h in 1u32..90, filter in filter()) {
            let resized = pillow_resize(&image, w, h, filter);
            prop_assert_eq!(resized.dimensions(), (w, h));
            // Bilinear never leaves the range of the source.
            if filter == Filter::Bilinear {
                prop_assert!(resized.iter().max() <= image.iter().max());
                prop_assert!(resized.iter().min() >= image.iter().min());
            }
            let colour = *image.get_pixel(0, 0);
            let flat = RgbImage::from_pixel(image.width(), image.height(), colour);
            prop_assert!(pillow_resize(&flat, w, h, filter).pixels().all(|p| *p == colour));
        }

        #[test]
        fn weights_cover_the_source_and_sum_to_one(input in 1usize..3000, output in 1usize..400, filter in filter()) {
            let taps = taps(input, output, filter);
            prop_assert_eq!(taps.len(), output);
            for tap in &taps {
                prop_assert!(!tap.weights.is_empty() && tap.first + tap.weights.len() <= input);
                let sum: i64 = tap.weights.iter().map(|&w| i64::from(w)).sum();
                prop_assert!((sum - (1 << BITS)).unsigned_abs() <= tap.weights.len() as u64, "{}", sum);
                // The 32-bit sum of a row of white or of the worst mixture cannot overflow.
                let most: i64 = tap.weights.iter().map(|&w| i64::from(w).abs() * 255).sum();
                prop_assert!(most + i64::from(HALF) < i64::from(i32::MAX));
            }
        }

        #[test]
        fn mirrors(image in picture(), w in 1u32..60, filter in filter()) {
            // The kernel is symmetric: resizing the mirrored picture mirrors the result, up to the rounding of
            // weights that lie exactly between two pixels.
            let there = image::imageops::flip_horizontal(&pillow_resize(&image, w, image.height(), filter));
            let back = pillow_resize(&image::imageops::flip_horizontal(&image), w, image.height(), filter);
            prop_assert!(there.iter().zip(back.iter()).all(|(a, b)| a.abs_diff(*b) <= 1));
        }
    }

    #[test]
    fn halving_two_pixels_averages_them() {
        let mut image = RgbImage::new(2, 1);
        image.put_pixel(0, 0, Rgb([10, 0, 255]));
        image.put_pixel(1, 0, Rgb([21, 1, 255]));
        // 15.5 and 0.5 round up.
        assert_eq!(pillow_resize(&image, 1, 1, Filter::Bilinear).get_pixel(0, 0).0, [16, 1, 255]);
    }

    #[test]
    fn tensors_are_resized_as_pictures_are() {
        let image =
            RgbImage::from_fn(50, 30, |x, y| Rgb([(5 * x) as u8, (8 * y) as u8, (x * y % 251) as u8]));
        let pixels: Vec<f32> = image.as_raw().iter().map(|&p| f32::from(p)).collect();
        let pixels = Tensor::from_vec(pixels, (30, 50, 3), &candle_core::Device::Cpu).unwrap();
        let pixels = pixels.permute((2, 0, 1)).unwrap().contiguous().unwrap();
        for (w, h) in [(20, 17), (71, 30), (50, 44)] {
            let ours = antialiased_bilinear(&pixels, h, w).unwrap().permute((1, 2, 0)).unwrap();
            let ours = ours.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let theirs = pillow_resize(&image, w as u32, h as u32, Filter::Bilinear);
            // Pillow rounds twice.
            assert!(
                ours.iter().zip(theirs.iter()).all(|(a, &b)| (a - f32::from(b)).abs() < 1.1),
                "{w} × {h}"
            );
        }
        assert!(antialiased_bilinear(&pixels, 0, 4).is_err());
    }

    #[test]
    fn empty_pictures_and_sizes_do_not_fail() {
        assert_eq!(pillow_resize(&RgbImage::new(0, 5), 3, 2, Filter::Bicubic).dimensions(), (3, 2));
        assert_eq!(pillow_resize(&RgbImage::new(4, 5), 0, 2, Filter::Bicubic).dimensions(), (1, 2));
    }
}
