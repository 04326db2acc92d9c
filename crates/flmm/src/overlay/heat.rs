//! Attention as colours, and several pictures side by side with titles.

use image::{Rgb, RgbImage, imageops};
use noto_sans_mono_bitmap::{FontWeight, RasterHeight};

use super::blend;
use super::canvas::{self, Font};
use crate::Result;
use crate::clusters::resize;

/// Colours from low to high, dark blue over green to yellow, evenly growing in lightness.
const RAMP: [[u8; 3]; 6] =
    [[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]];
const TITLE: Font = Font { weight: FontWeight::Bold, height: RasterHeight::Size20, zoom: 1 };
const GAP: u32 = 6;

/// The picture under a map of `height × width` values that covers all of it. Values are scaled so that the smallest
/// is dark and the largest is bright. An error if the number of values is not `height · width`.
pub fn heat_map(image: &RgbImage, values: &[f32], size: (usize, usize)) -> Result<RgbImage> {
    let to = (image.height() as usize, image.width() as usize);
    let values = resize(values, size, to)?;
    let finite = || values.iter().copied().filter(|v| v.is_finite());
    let (low, high) = finite().fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    let span = if high > low { high - low } else { 1.0 };
    let mut out = image.clone();
    for (pixel, v) in out.pixels_mut().zip(&values) {
        let level = ((v - low) / span).clamp(0.0, 1.0);
        blend(pixel, ramp(if level.is_nan() { 0.0 } else { level }), 0.35 + 0.4 * level.max(0.0));
    }
    Ok(out)
}

/// Colour of a level, 0 to 1.
pub(super) fn ramp(level: f32) -> [u8; 3] {
    let place = level * (RAMP.len() - 1) as f32;
    let (low, share) = (place as usize, place.fract());
    let (a, b) = (RAMP[low.min(RAMP.len() - 1)], RAMP[(low + 1).min(RAMP.len() - 1)]);
    std::array::from_fn(|i| (f32::from(a[i]) * (1.0 - share) + f32::from(b[i]) * share).round() as u8)
}

/// Rows of pictures with a title above each, all scaled to `width × height` of the first one (small ones are enlarged
/// so that titles fit).
pub fn panels(rows: &[Vec<(String, RgbImage)>]) -> RgbImage {
    let Some((_, first)) = rows.iter().flatten().next() else { return RgbImage::new(1, 1) };
    let factor = 256u32.div_ceil(first.width().max(1)).max(1);
    let (width, height) = (first.width() * factor, first.height() * factor);
    let (letter_width, letter_height) = TITLE.cell();
    let bar = letter_height as u32 + 2 * GAP;
    let columns = rows.iter().map(Vec::len).max().unwrap_or(1) as u32;
    let size = (columns * (width + GAP) + GAP, rows.len() as u32 * (height + bar) + GAP);
    let mut sheet = RgbImage::from_pixel(size.0, size.1, Rgb([250, 250, 248]));
    for (r, row) in rows.iter().enumerate() {
        for (c, (title, picture)) in row.iter().enumerate() {
            let (x, y) = (GAP + c as u32 * (width + GAP), r as u32 * (height + bar));
            let room = (i64::from(width) / letter_width) as usize;
            for (i, letter) in title.chars().take(room).enumerate() {
                let at = (i64::from(x) + i as i64 * letter_width, i64::from(y + GAP));
                canvas::letter(&mut sheet, letter, at, TITLE, [33, 33, 36]);
            }
            let picture = imageops::resize(picture, width, height, imageops::FilterType::CatmullRom);
            imageops::replace(&mut sheet, &picture, i64::from(x), i64::from(y + bar));
        }
    }
    sheet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_value_is_the_brightest() -> Result<()> {
        let image = RgbImage::from_pixel(8, 8, Rgb([128; 3]));
        let drawn = heat_map(&image, &[0.0, 0.0, 0.0, 1.0], (2, 2))?;
        let light = |x, y| drawn.get_pixel(x, y).0.iter().map(|&v| u32::from(v)).sum::<u32>();
        assert!(light(7, 7) > light(0, 0));
        assert!(heat_map(&image, &[0.0; 3], (2, 2)).is_err());
        heat_map(&image, &[f32::NAN, 1.0, 1.0, 1.0], (2, 2))?;
        Ok(())
    }

    #[test]
    fn panels_keep_their_order() {
        let picture = |v: u8| {
            ("a title that is much too long for it".to_owned(), RgbImage::from_pixel(4, 4, Rgb([v; 3])))
        };
        let sheet = panels(&[vec![picture(0), picture(255)], vec![picture(90)]]);
        assert_eq!(sheet.width(), 2 * 256 + 18);
        assert_eq!(sheet.get_pixel(100, 200).0, [0; 3]);
        assert_eq!(sheet.get_pixel(400, 200).0, [255; 3]);
        assert_eq!(panels(&[]).width(), 1);
    }
}
