//! Sprite pictures: each Twemoji drawing is rasterised once per process at a few sizes and then only resampled.

use super::catalog::{Level, Sprite, classes};
use resvg::{tiny_skia, usvg};
use std::sync::OnceLock;

/// Longest side of the rasters, pixels. A scene takes the smallest one that is not smaller than the object,
/// so that one bilinear sample per pixel neither blurs nor aliases.
const RASTER_SIZES: [u32; 7] = [48, 64, 80, 96, 120, 152, 192];

/// A premultiplied RGBA picture, cropped to what is drawn, with a border of one transparent pixel.
pub(super) struct Raster {
    pub(super) width: u32,
    pub(super) height: u32,
    /// Row-major premultiplied RGBA in 0..=255.
    pub(super) pixels: Vec<[f32; 4]>,
}

/// All rasters of one sprite.
pub(super) struct SpriteRasters {
    rasters: Vec<Raster>,
}

impl SpriteRasters {
    /// Rasterises one drawing.
    pub(super) fn new(sprite: &Sprite) -> Self {
        let rasters = RASTER_SIZES.iter().map(|&size| rasterise(sprite, size)).collect();
        Self { rasters }
    }

    /// The raster to sample from for an object whose longest side is `side` pixels.
    pub(super) fn for_side(&self, side: f64) -> &Raster {
        let found = self.rasters.iter().find(|raster| f64::from(raster.side()) >= side);
        found.unwrap_or(&self.rasters[self.rasters.len() - 1])
    }
}

impl Raster {
    /// Longest side of the drawing, without the border.
    pub(super) fn side(&self) -> u32 {
        self.width.max(self.height) - 2
    }
}

/// Draws the sprite so that the longest side of what is visible has `side` pixels.
fn rasterise(sprite: &Sprite, side: u32) -> Raster {
    // The drawings are compiled in and a test rasterises every one of them: neither step can fail at run time.
    let svg: &str = sprite.svg;
    let tree =
        usvg::Tree::from_str(svg, &usvg::Options::default()).expect("an embedded drawing is valid SVG");
    let draw = |scale: f32, dx: f32, dy: f32, width: u32, height: u32| {
        let mut pixmap = tiny_skia::Pixmap::new(width, height).expect("raster sizes are positive");
        let transform = tiny_skia::Transform::from_row(scale, 0.0, 0.0, scale, dx, dy);
        resvg::render(&tree, transform, &mut pixmap.as_mut());
        pixmap
    };
    // First find what is drawn at a fixed scale, then draw just that.
    const PROBE: u32 = 256;
    let scale = PROBE as f32 / tree.size().width().max(tree.size().height());
    let probe = draw(scale, 0.0, 0.0, PROBE, PROBE);
    let (mut x0, mut y0, mut x1, mut y1) = (PROBE, PROBE, 0, 0);
    for (i, pixel) in probe.pixels().iter().enumerate() {
        if pixel.alpha() >= 128 {
            let (x, y) = (i as u32 % PROBE, i as u32 / PROBE);
            (x0, y0, x1, y1) = (x0.min(x), y0.min(y), x1.max(x + 1), y1.max(y + 1));
        }
    }
    let (w, h) = ((x1 - x0) as f32, (y1 - y0) as f32);
    let factor = side as f32 / w.max(h);
    let (width, height) = ((w * factor).ceil() as u32 + 2, (h * factor).ceil() as u32 + 2);
    let pixmap = draw(scale * factor, 1.0 - x0 as f32 * factor, 1.0 - y0 as f32 * factor, width, height);
    let pixels = pixmap.pixels().iter();
    let pixels = pixels.map(|p| [p.red(), p.green(), p.blue(), p.alpha()].map(f32::from)).collect();
    Raster { width, height, pixels }
}

impl Raster {
    /// Bilinear sample at (u, v) in raster pixels, pixel centres at whole numbers; `None` where nothing is drawn.
    pub(super) fn sample(&self, u: f32, v: f32) -> Option<[f32; 4]> {
        let (fu, fv) = (u.floor(), v.floor());
        let (w, h) = (self.width as usize, self.height as usize);
        if fu < 0.0 || fv < 0.0 || fu as usize + 1 >= w || fv as usize + 1 >= h {
            return None;
        }
        let (tu, tv) = (u - fu, v - fv);
        let at = fv as usize * w + fu as usize;
        let (a, b, c, d) =
            (self.pixels[at], self.pixels[at + 1], self.pixels[at + w], self.pixels[at + w + 1]);
        let mut out = [0.0; 4];
        for k in 0..4 {
            let top = a[k] + (b[k] - a[k]) * tu;
            let bottom = c[k] + (d[k] - c[k]) * tu;
            out[k] = top + (bottom - top) * tv;
        }
        (out[3] > 0.0).then_some(out)
    }
}

/// The raster of a class's sprite for an object whose longest side is `side` pixels; drawn on first use.
pub(super) fn raster(class: usize, sprite: usize, side: f64) -> &'static Raster {
    static CACHE: OnceLock<Vec<Vec<OnceLock<SpriteRasters>>>> = OnceLock::new();
    let all = classes(Level::Two);
    let cache = CACHE.get_or_init(|| {
        all.iter().map(|class| class.sprites.iter().map(|_| OnceLock::new()).collect()).collect()
    });
    cache[class][sprite].get_or_init(|| SpriteRasters::new(&all[class].sprites[sprite])).for_side(side)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_drawing_is_rasterised_with_something_in_it() {
        for (index, class) in classes(Level::Two).iter().enumerate() {
            for sprite in 0..class.sprites.len() {
                for side in [20.0, 100.0, 500.0] {
                    let raster = raster(index, sprite, side);
                    let drawn = raster.pixels.iter().filter(|pixel| pixel[3] >= 127.5).count();
                    let share = drawn as f64 / f64::from(raster.side() * raster.side());
                    assert!(share > 0.1, "{} covers only {share} of its box", class.name);
                    assert!(side > 192.0 || f64::from(raster.side()) >= side);
                }
            }
        }
    }
}
