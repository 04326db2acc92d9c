//! A mask at drawing size: its tint, outline and the place of its number.

use image::RgbImage;

use super::{blend, canvas};
use crate::Result;
use crate::clusters::resize;
use crate::masks::Mask;

/// Light enough that the colour of what lies below can still be told.
const TINT: f32 = 0.38;

/// A mask enlarged with smooth borders.
pub(super) struct Shape {
    mask: Mask,
    /// For every pixel inside the mask the chessboard distance to the nearest pixel outside; 0 outside.
    depth: Vec<u32>,
    pub(super) area: usize,
}

impl Shape {
    pub(super) fn new(mask: &Mask, factor: usize) -> Result<Self> {
        let (w, h) = (mask.width(), mask.height());
        let mask = match factor {
            1 => mask.clone(),
            _ => {
                let soft: Vec<f32> = mask.bits().iter().map(|&bit| f32::from(u8::from(bit))).collect();
                let soft = resize(&soft, (h, w), (h * factor, w * factor))?;
                Mask::new(w * factor, h * factor, soft.into_iter().map(|v| v > 0.5).collect())?
            }
        };
        Ok(Self { depth: depth(&mask), area: mask.area(), mask })
    }

    fn depth_at(&self, x: i64, y: i64) -> u32 {
        let (w, h) = (self.mask.width() as i64, self.mask.height() as i64);
        if (0..w).contains(&x) && (0..h).contains(&y) { self.depth[(y * w + x) as usize] } else { 0 }
    }

    pub(super) fn fill(&self, canvas: &mut RgbImage, colour: [u8; 3]) {
        for (pixel, _) in canvas.pixels_mut().zip(self.mask.bits()).filter(|(_, inside)| **inside) {
            blend(pixel, colour, TINT);
        }
    }

    /// A line of `width` pixels inside the border, and a thin white one around it.
    pub(super) fn outline(&self, canvas: &mut RgbImage, colour: [u8; 3], width: usize) {
        for (x, y, pixel) in canvas.enumerate_pixels_mut() {
            let (x, y) = (i64::from(x), i64::from(y));
            let depth = self.depth_at(x, y);
            let touches = || {
                [(-1, 0), (1, 0), (0, -1), (0, 1)].iter().any(|(dx, dy)| self.depth_at(x + dx, y + dy) > 0)
            };
            if depth == 0 && touches() {
                blend(pixel, [255; 3], 0.7);
            } else if (1..=width as u32).contains(&depth) {
                blend(pixel, colour, 1.0);
            }
        }
    }

    /// Centre of a number badge: the deepest point of the mask if the badge fits there, else above the mask's topmost
    /// pixel; moved away from the places already taken.
    pub(super) fn badge_place(&self, radius: i64, taken: &[(i64, i64)]) -> (i64, i64) {
        let (w, h) = (self.mask.width(), self.mask.height());
        let deepest = self.depth.iter().enumerate().max_by_key(|(_, depth)| **depth);
        let place = match deepest {
            Some((i, &depth)) if i64::from(depth) > radius * 3 / 2 => ((i % w) as i64, (i / w) as i64),
            _ => {
                let top = self.depth.iter().position(|&depth| depth > 0).unwrap_or(0);
                ((top % w) as i64, (top / w) as i64 - radius - 4)
            }
        };
        canvas::free_place(place, radius + 2, (w as i64, h as i64), taken)
    }
}

/// Two-pass chessboard distance transform; the world outside the picture counts as inside, so that masks that leave the
/// picture have no line along its edge.
fn depth(mask: &Mask) -> Vec<u32> {
    let (w, h) = (mask.width(), mask.height());
    let far = (w + h) as u32;
    let mut depth: Vec<u32> = mask.bits().iter().map(|&inside| if inside { far } else { 0 }).collect();
    let relax = |depth: &mut [u32], x: usize, y: usize, steps: [(i64, i64); 4]| {
        for (dx, dy) in steps {
            let (nx, ny) = (x as i64 + dx, y as i64 + dy);
            if (0..w as i64).contains(&nx) && (0..h as i64).contains(&ny) {
                let near = depth[ny as usize * w + nx as usize] + 1;
                let here = &mut depth[y * w + x];
                *here = (*here).min(near);
            }
        }
    };
    for y in 0..h {
        for x in 0..w {
            relax(&mut depth, x, y, [(-1, 0), (-1, -1), (0, -1), (1, -1)]);
        }
    }
    for y in (0..h).rev() {
        for x in (0..w).rev() {
            relax(&mut depth, x, y, [(1, 0), (1, 1), (0, 1), (-1, 1)]);
        }
    }
    depth
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_counts_steps_to_the_border() {
        let mask = Mask::from_fn(7, 7, |x, y| (1..6).contains(&x) && (1..6).contains(&y));
        let depth = depth(&mask);
        assert_eq!((depth[0], depth[8], depth[3 * 7 + 3]), (0, 1, 3));
    }
}
