//! Pillow's 8-bit bilinear resize, bit for bit (`spec/models.md` §10.1).

use image::RgbImage;

use super::geometry::SamGeometry;

/// Bits behind the binary point of the integer weights.
const FRACTION: u32 = 22;

/// First source position and integer weights of every output position.
fn weights(input: usize, output: usize) -> Vec<(usize, Vec<i64>)> {
    let scale = input as f64 / output as f64;
    let support = scale.max(1.0);
    let at = |i: usize| {
        let centre = (i as f64 + 0.5) * scale;
        let first = (centre - support + 0.5).max(0.0) as usize;
        let end = ((centre + support + 0.5) as usize).min(input);
        let weight = |x: usize| (1.0 - ((x as f64 - centre + 0.5) / support).abs()).max(0.0);
        let raw: Vec<f64> = (first..end).map(weight).collect();
        let sum: f64 = raw.iter().sum();
        (first, raw.iter().map(|w| (w / sum * f64::from(1 << FRACTION)).round() as i64).collect())
    };
    (0..output).map(at).collect()
}

fn blend(weights: &[i64], values: impl Iterator<Item = u8>) -> u8 {
    let sum: i64 = weights.iter().zip(values).map(|(w, v)| w * i64::from(v)).sum();
    ((sum + (1 << (FRACTION - 1))) >> FRACTION).clamp(0, 255) as u8
}

/// `picture` with its longer side brought to `image_size`.
pub(super) fn sam_resize(picture: &RgbImage, image_size: usize) -> RgbImage {
    let (w, h) = (picture.width() as usize, picture.height() as usize);
    let (new_h, new_w) = SamGeometry::new((h, w), image_size).resized;
    let mut wide = picture.clone();
    if new_w != w {
        let columns = weights(w, new_w);
        wide = RgbImage::from_fn(new_w as u32, h as u32, |x, y| {
            let (first, weights) = &columns[x as usize];
            let channel = |c: usize| blend(weights, (*first..).map(|x| picture.get_pixel(x as u32, y).0[c]));
            image::Rgb([channel(0), channel(1), channel(2)])
        });
    }
    if new_h == h {
        return wide;
    }
    let rows = weights(h, new_h);
    RgbImage::from_fn(new_w as u32, new_h as u32, |x, y| {
        let (first, weights) = &rows[y as usize];
        let channel = |c: usize| blend(weights, (*first..).map(|y| wide.get_pixel(x, y as u32).0[c]));
        image::Rgb([channel(0), channel(1), channel(2)])
    })
}
