//! Pictures of grounded answers: translucent masks with outlines and numbers, the answer below with coloured phrases.

mod canvas;
mod caption;
mod heat;
mod shape;
mod table;

use std::ops::Range;
use std::path::Path;

use image::{Rgb, RgbImage};

use crate::masks::Mask;
use crate::{Error, Result};

pub use heat::{heat_map, panels};
pub use table::heat_table;

/// Okabe and Ito's palette without black: told apart with every common kind of colour vision.
pub const PALETTE: [[u8; 3]; 7] = [
    [0, 114, 178],
    [230, 159, 0],
    [0, 158, 115],
    [213, 94, 0],
    [204, 121, 167],
    [86, 180, 233],
    [240, 228, 66],
];

/// Pictures with a shorter long side are enlarged by a whole factor, so that outlines and text stay readable.
const SMALLEST_SIDE: usize = 512;

/// One grounded phrase of an answer.
#[derive(Debug, Clone)]
pub struct Region<'a> {
    /// The phrase's mask at the picture's size.
    pub mask: &'a Mask,
    /// The phrase in the answer, in Unicode scalars.
    pub chars: Range<usize>,
}

/// Colour of phrase number `index`.
pub fn colour(index: usize) -> [u8; 3] {
    PALETTE[index % PALETTE.len()]
}

/// The picture with every region's mask, outline and number, and the answer below it with its phrases in the same
/// colours. Small pictures are enlarged by a whole factor. An error if a mask has another size than the picture.
pub fn draw(image: &RgbImage, answer: &str, regions: &[Region]) -> Result<RgbImage> {
    let (mut canvas, factor) = prepare(image, regions.iter().map(|region| region.mask))?;
    let shapes: Vec<shape::Shape> =
        regions.iter().map(|region| shape::Shape::new(region.mask, factor)).collect::<Result<_>>()?;

    // Large masks first, so that a small one on top of them stays visible.
    let mut order: Vec<usize> = (0..shapes.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(shapes[i].area));
    for &i in &order {
        shapes[i].fill(&mut canvas, colour(i));
    }
    let line = line_width(&canvas);
    for &i in &order {
        shapes[i].outline(&mut canvas, colour(i), line);
    }
    let text = caption::Style::for_width(canvas.width() as usize);
    let mut taken: Vec<(i64, i64)> = Vec::new();
    for (i, shape) in shapes.iter().enumerate().filter(|(_, shape)| shape.area > 0) {
        let at = shape.badge_place(text.badge_radius(), &taken);
        taken.push(at);
        text.badge(&mut canvas, at, i);
    }
    Ok(match answer.trim().is_empty() {
        true => canvas,
        false => {
            let strip = text.strip(canvas.width() as usize, answer, regions);
            canvas::stack(&canvas, &strip)
        }
    })
}

/// The picture with one mask in the colour of phrase number `index`, without number or text; small pictures are
/// enlarged as by [`draw`]. An error if the mask has another size than the picture.
pub fn draw_mask(image: &RgbImage, mask: &Mask, index: usize) -> Result<RgbImage> {
    let (mut canvas, factor) = prepare(image, [mask])?;
    let shape = shape::Shape::new(mask, factor)?;
    shape.fill(&mut canvas, colour(index));
    let width = line_width(&canvas);
    shape.outline(&mut canvas, colour(index), width);
    Ok(canvas)
}

/// The picture at drawing size and by what factor it was enlarged, once it is clear that all masks fit it.
fn prepare<'a>(image: &RgbImage, masks: impl IntoIterator<Item = &'a Mask>) -> Result<(RgbImage, usize)> {
    let (width, height) = (image.width() as usize, image.height() as usize);
    if width == 0 || height == 0 {
        return Err(Error::image("the picture has no pixels", "use a picture of at least 1×1"));
    }
    if let Some(mask) = masks.into_iter().find(|mask| (mask.width(), mask.height()) != (width, height)) {
        return Err(Error::request(
            format!("a {}×{} mask does not fit the {width}×{height} picture", mask.width(), mask.height()),
            "masks must have the size of the picture",
        ));
    }
    let factor = SMALLEST_SIDE.div_ceil(width.max(height)).max(1);
    Ok((enlarge(image, factor), factor))
}

/// Width of outlines that suits a picture.
fn line_width(canvas: &RgbImage) -> usize {
    (canvas.width().max(canvas.height()) as usize).div_ceil(400).max(2)
}

/// Writes a PNG through a temporary file in the same folder, so that no partial picture can be left behind.
pub fn save_png(image: &RgbImage, path: &Path) -> Result<()> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.write_to(&mut bytes, image::ImageFormat::Png).map_err(|e| {
        Error::image(format!("the picture cannot be written as PNG: {e}"), "use a smaller picture")
    })?;
    crate::atomic::write(path, |file| std::io::Write::write_all(file, bytes.get_ref()))
}

fn enlarge(image: &RgbImage, factor: usize) -> RgbImage {
    match factor {
        1 => image.clone(),
        _ => image::imageops::resize(
            image,
            image.width() * factor as u32,
            image.height() * factor as u32,
            image::imageops::FilterType::CatmullRom,
        ),
    }
}

/// `colour` over `pixel` with weight `alpha`.
fn blend(pixel: &mut Rgb<u8>, colour: [u8; 3], alpha: f32) {
    for (old, new) in pixel.0.iter_mut().zip(colour) {
        *old = (f32::from(*old) * (1.0 - alpha) + f32::from(new) * alpha).round() as u8;
    }
}

/// Black or white, whichever is easier to read on `colour`.
fn ink_on(colour: [u8; 3]) -> [u8; 3] {
    let [r, g, b] = colour.map(f32::from);
    if 0.299 * r + 0.587 * g + 0.114 * b > 140.0 { [0; 3] } else { [255; 3] }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scene() -> (RgbImage, Mask) {
        let image = RgbImage::from_pixel(64, 48, Rgb([200, 200, 200]));
        (image, Mask::from_fn(64, 48, |x, y| (10..30).contains(&x) && (8..40).contains(&y)))
    }

    #[test]
    fn a_mask_tints_its_pixels_only_and_the_answer_goes_below() -> Result<()> {
        let (image, mask) = scene();
        let plain = draw(&image, "", &[])?;
        assert_eq!((plain.width(), plain.height()), (512, 384));
        let drawn = draw(&image, "a dog", &[Region { mask: &mask, chars: 0..5 }])?;
        assert_eq!(drawn.width(), 512);
        assert!(drawn.height() > 384 + 20);
        assert_eq!(drawn.get_pixel(400, 100), plain.get_pixel(400, 100));
        assert_ne!(drawn.get_pixel(100, 300), plain.get_pixel(100, 300));
        // The phrase's colour appears in the strip.
        assert!(drawn.rows().skip(384).flatten().any(|p| p.0 == colour(0)));
        Ok(())
    }

    #[test]
    fn odd_input_is_drawn_or_refused() -> Result<()> {
        let (image, mask) = scene();
        let other = RgbImage::new(10, 10);
        assert!(draw(&other, "a", &[Region { mask: &mask, chars: 0..1 }]).is_err());
        assert!(draw(&RgbImage::new(0, 0), "a", &[]).is_err());
        let empty = Mask::empty(64, 48);
        // Unwritable letters, an endless word, ranges past the end, nine regions on one spot.
        let answer = format!("ein Käfer – 猫 {}", "x".repeat(300));
        let regions: Vec<Region> = (0..9)
            .map(|i| Region { mask: if i == 4 { &empty } else { &mask }, chars: i * 3..i * 3 + 500 })
            .collect();
        draw(&image, &answer, &regions)?;
        draw(&RgbImage::new(1, 700), "tall", &[])?;
        Ok(())
    }
}
