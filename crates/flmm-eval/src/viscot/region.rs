//! The part of a picture that a mask means (`spec/evaluation.md` §5.3).

use flmm::masks::Mask;
use image::imageops::{self, FilterType};
use image::{Rgb, RgbImage};

/// Half the side of the smallest box, pixels, before it is scaled.
const SMALLEST_HALF: f64 = 8.0;
/// What surrounds a region beside its picture: the grey that models pad with.
const SURROUND: Rgb<u8> = Rgb([127, 127, 127]);

/// The box x0, y0, x1, y1 (pixels, the last two behind it) around a mask's foreground, scaled about its centre. The whole
/// picture for an empty mask.
///
/// With a scale of 1 the foreground's last row and column are just outside, as published.
pub fn box_from_mask(mask: &Mask, scale: f64) -> [u32; 4] {
    let (width, height) = (mask.width() as f64, mask.height() as f64);
    let [x, y, w, h] = mask.bbox();
    if w == 0 {
        return [0, 0, mask.width() as u32, mask.height() as u32];
    }
    let range = |first: usize, length: usize, size: f64| {
        let (first, last) = (first as f64, (first + length - 1) as f64);
        let half = ((last - first) / 2.0).max(SMALLEST_HALF) * scale;
        let centre = (last + first) / 2.0;
        ((centre - half).max(0.0) as u32, (centre + half).min(size) as u32)
    };
    let ((x0, x1), (y0, y1)) = (range(x, w, width), range(y, h, height));
    [x0, y0, x1, y1]
}

/// The pixels of a box, at least one.
pub fn crop(picture: &RgbImage, [x0, y0, x1, y1]: [u32; 4]) -> RgbImage {
    let (x0, y0) = (x0.min(picture.width().saturating_sub(1)), y0.min(picture.height().saturating_sub(1)));
    let (width, height) = (x1.saturating_sub(x0).max(1), y1.saturating_sub(y0).max(1));
    imageops::crop_imm(picture, x0, y0, width, height).to_image()
}

/// A picture twice as wide: `whole` on the left, and on the right `region`, as large as fits.
///
/// For models that take one picture per conversation.
pub fn side_by_side(whole: &RgbImage, region: &RgbImage) -> RgbImage {
    let (width, height) = whole.dimensions();
    let factor = (f64::from(width) / f64::from(region.width().max(1)))
        .min(f64::from(height) / f64::from(region.height().max(1)));
    let side = |side: u32, most: u32| ((f64::from(side) * factor).round() as u32).clamp(1, most.max(1));
    let (w, h) = (side(region.width(), width), side(region.height(), height));
    let region = imageops::resize(region, w, h, FilterType::CatmullRom);
    let mut both = RgbImage::from_pixel(2 * width, height, SURROUND);
    imageops::replace(&mut both, whole, 0, 0);
    imageops::replace(&mut both, &region, i64::from(width + (width - w) / 2), i64::from((height - h) / 2));
    both
}

/// Intersection over union of two boxes x0, y0, x1, y1; 0 where there is no union.
pub fn box_iou(a: [f64; 4], b: [f64; 4]) -> f64 {
    let area = |[x0, y0, x1, y1]: [f64; 4]| (x1 - x0).max(0.0) * (y1 - y0).max(0.0);
    let both = area([a[0].max(b[0]), a[1].max(b[1]), a[2].min(b[2]), a[3].min(b[3])]);
    let either = area(a) + area(b) - both;
    if either > 0.0 { both / either } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_stay_inside_and_are_not_empty() {
        assert_eq!(box_from_mask(&Mask::empty(30, 20), 1.0), [0, 0, 30, 20]);
        let corner = Mask::from_fn(30, 20, |x, y| x == 29 && y == 0);
        assert_eq!(box_from_mask(&corner, 1.0), [21, 0, 30, 8]);
        let picture = RgbImage::new(30, 20);
        assert_eq!(crop(&picture, box_from_mask(&corner, 0.001)).dimensions(), (1, 1));
        assert_eq!(crop(&picture, [40, 40, 50, 50]).dimensions(), (1, 1));
    }

    #[test]
    fn the_region_stands_right_of_the_whole() {
        let whole = RgbImage::from_pixel(40, 20, Rgb([255, 0, 0]));
        let both = side_by_side(&whole, &RgbImage::from_pixel(5, 5, Rgb([0, 0, 255])));
        assert_eq!(both.dimensions(), (80, 20));
        assert_eq!(both.get_pixel(39, 10).0, [255, 0, 0]);
        assert_eq!(both.get_pixel(45, 10).0, SURROUND.0);
        assert_eq!((both.get_pixel(50, 0).0, both.get_pixel(69, 19).0), ([0, 0, 255], [0, 0, 255]));
    }

    #[test]
    fn boxes_overlap() {
        assert_eq!(box_iou([0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 3.0, 2.0]), 1.0 / 3.0);
        assert_eq!(box_iou([0.0; 4], [0.0; 4]), 0.0);
    }
}
