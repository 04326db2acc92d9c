//! Drawing on pixels: discs, rounded boxes, letters.

use image::{Rgb, RgbImage};
use noto_sans_mono_bitmap::{FontWeight, RasterHeight, RasterizedChar, get_raster};

use super::blend;

/// One picture above the other; both have one width.
pub(super) fn stack(above: &RgbImage, below: &RgbImage) -> RgbImage {
    let mut out = RgbImage::new(above.width(), above.height() + below.height());
    for (x, y, pixel) in out.enumerate_pixels_mut() {
        *pixel = match y < above.height() {
            true => *above.get_pixel(x, y),
            false => *below.get_pixel(x.min(below.width() - 1), y - above.height()),
        };
    }
    out
}

/// The pixel at signed coordinates, if it is on the canvas.
fn pixel(canvas: &mut RgbImage, x: i64, y: i64) -> Option<&mut Rgb<u8>> {
    canvas.get_pixel_mut_checked(u32::try_from(x).ok()?, u32::try_from(y).ok()?)
}

/// A disc with smooth edge.
pub(super) fn disc(canvas: &mut RgbImage, (cx, cy): (i64, i64), radius: f32, colour: [u8; 3]) {
    let reach = radius.ceil() as i64 + 1;
    for y in cy - reach..=cy + reach {
        for x in cx - reach..=cx + reach {
            let distance = ((x - cx) as f32).hypot((y - cy) as f32);
            let cover = (radius + 0.5 - distance).clamp(0.0, 1.0);
            if let Some(pixel) = pixel(canvas, x, y).filter(|_| cover > 0.0) {
                blend(pixel, colour, cover);
            }
        }
    }
}

/// A filled box `[x, y, width, height]` with rounded corners.
pub(super) fn rounded_box(canvas: &mut RgbImage, [x0, y0, w, h]: [i64; 4], radius: f32, colour: [u8; 3]) {
    for y in y0..y0 + h {
        for x in x0..x0 + w {
            let inset = |v: i64, from: i64, len: i64| {
                let v = (v - from) as f32 + 0.5;
                (radius - v).max(v - (len as f32 - radius)).max(0.0)
            };
            let cover = (radius + 0.5 - inset(x, x0, w).hypot(inset(y, y0, h))).clamp(0.0, 1.0);
            if let Some(pixel) = pixel(canvas, x, y) {
                blend(pixel, colour, cover);
            }
        }
    }
}

/// One letter with its cell's upper left corner at `(x, y)`, every pixel `zoom` times as large.
pub(super) fn letter(canvas: &mut RgbImage, c: char, (x, y): (i64, i64), font: Font, colour: [u8; 3]) {
    for (dy, row) in font.raster(c).rows().enumerate() {
        for (dx, &cover) in row.iter().enumerate().filter(|(_, cover)| **cover > 0) {
            for (zy, zx) in (0..font.zoom).flat_map(|zy| (0..font.zoom).map(move |zx| (zy, zx))) {
                let at = (x + dx as i64 * font.zoom + zx, y + dy as i64 * font.zoom + zy);
                if let Some(pixel) = pixel(canvas, at.0, at.1) {
                    blend(pixel, colour, f32::from(cover) / 255.0);
                }
            }
        }
    }
}

/// Weight and size of letters.
#[derive(Clone, Copy)]
pub(super) struct Font {
    pub(super) weight: FontWeight,
    pub(super) height: RasterHeight,
    pub(super) zoom: i64,
}

impl Font {
    /// Size of a letter's cell, (width, height).
    pub(super) fn cell(self) -> (i64, i64) {
        let width = noto_sans_mono_bitmap::get_raster_width(self.weight, self.height);
        (width as i64 * self.zoom, self.height.val() as i64 * self.zoom)
    }

    fn raster(self, c: char) -> RasterizedChar {
        let plain = match c {
            '‘' | '’' | '‚' | '′' => '\'',
            '“' | '”' | '„' | '″' => '"',
            '‐' | '‑' | '‒' | '–' | '—' | '−' => '-',
            '…' => '.',
            c if c.is_whitespace() => ' ',
            c => c,
        };
        let found = get_raster(plain, self.weight, self.height);
        // The question mark is part of every build of the font.
        found
            .or_else(|| get_raster('?', self.weight, self.height))
            .unwrap_or_else(|| unreachable!("basic Latin"))
    }
}

/// The place for a disc nearest to the wanted one that is on the canvas and touches none of the others, looking to the
/// right and then further down.
pub(super) fn free_place(
    wanted: (i64, i64),
    radius: i64,
    (width, height): (i64, i64),
    taken: &[(i64, i64)],
) -> (i64, i64) {
    let inside = |v: i64, len: i64| v.clamp(radius.min(len / 2), (len - 1 - radius).max(len / 2));
    let wanted = (inside(wanted.0, width), inside(wanted.1, height));
    let free = |&(x, y): &(i64, i64)| {
        taken.iter().all(|(tx, ty)| (tx - x).pow(2) + (ty - y).pow(2) >= (2 * radius).pow(2))
            && (x, y) == (inside(x, width), inside(y, height))
    };
    let step = 2 * radius;
    let around = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)];
    let candidates = (1..4).flat_map(|ring| {
        around.map(|(dx, dy): (i64, i64)| (wanted.0 + dx * ring * step, wanted.1 + dy * ring * step))
    });
    candidates.into_iter().find(free).unwrap_or(wanted)
}
