//! Masks in the forms that clients ask for.

use std::collections::HashMap;
use std::io::Cursor;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use flmm::grounder::GroundedPhrase;
use flmm::masks::Mask;
use image::{GrayImage, ImageFormat, Luma};

use crate::api::{Annotation, MaskData, MaskFormat};
use crate::error::ApiError;

/// How phrases become annotations.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Form {
    pub(crate) image: usize,
    pub(crate) mask: MaskFormat,
    pub(crate) coarse: bool,
}

impl Form {
    /// Annotation number `index`.
    pub(crate) fn annotation(self, index: usize, phrase: &GroundedPhrase) -> Result<Annotation, ApiError> {
        let coarse = match self.coarse {
            true => data(&phrase.coarse_mask, self.mask)?,
            false => None,
        };
        Ok(Annotation {
            r#type: "grounding",
            index,
            phrase: phrase.text.clone(),
            start: phrase.start,
            end: phrase.end,
            tokens: [phrase.tokens.0, phrase.tokens.1],
            // Six digits: more than the number means, fewer than the noise of another machine.
            score: (f64::from(phrase.score) * 1e6).round() / 1e6,
            image: self.image,
            bbox: phrase.mask.bbox(),
            area: phrase.mask.area(),
            segmentation: data(&phrase.mask, self.mask)?,
            coarse,
        })
    }
}

fn data(mask: &Mask, format: MaskFormat) -> Result<Option<MaskData>, ApiError> {
    Ok(match format {
        MaskFormat::Rle => Some(MaskData::Rle(mask.to_coco()?)),
        MaskFormat::Polygons => Some(MaskData::Polygons(outlines(mask))),
        MaskFormat::Png => {
            let grey = GrayImage::from_fn(mask.width() as u32, mask.height() as u32, |x, y| {
                Luma([if mask.get(x as usize, y as usize) { 255 } else { 0 }])
            });
            let mut bytes = Cursor::new(Vec::new());
            grey.write_to(&mut bytes, ImageFormat::Png).map_err(|_| ApiError::internal())?;
            Some(MaskData::Png(format!("data:image/png;base64,{}", STANDARD.encode(bytes.get_ref()))))
        }
        MaskFormat::None => None,
    })
}

/// A corner between pixels.
type Corner = (usize, usize);

/// Outer outlines of the connected parts of a mask along the edges of its pixels, `[x0, y0, x1, y1, …]`; pixels that touch
/// at a corner alone are not connected.
pub(crate) fn outlines(mask: &Mask) -> Vec<Vec<f64>> {
    // Edges of foreground pixels towards background, the foreground on the right: at most two leave a corner.
    let mut edges: HashMap<Corner, Vec<Corner>> = HashMap::new();
    let mut starts = Vec::new();
    for y in 0..mask.height() {
        for x in 0..mask.width() {
            if !mask.get(x, y) {
                continue;
            }
            let outside = |x: usize, y: usize| !mask.get(x, y);
            let mut edge = |from: Corner, to: Corner| edges.entry(from).or_default().push(to);
            if y == 0 || outside(x, y - 1) {
                edge((x, y), (x + 1, y));
                starts.push((x, y));
            }
            if outside(x + 1, y) {
                edge((x + 1, y), (x + 1, y + 1));
            }
            if outside(x, y + 1) {
                edge((x + 1, y + 1), (x, y + 1));
            }
            if x == 0 || outside(x - 1, y) {
                edge((x, y + 1), (x, y));
            }
        }
    }
    let mut polygons = Vec::new();
    for start in starts {
        // Every outline has an edge to the right; those that were walked along already are gone.
        let right = (start.0 + 1, start.1);
        if edges.get(&start).is_none_or(|ends| !ends.contains(&right)) {
            continue;
        }
        let corners = walk(&mut edges, start, right);
        // Outer outlines run clockwise, those of holes do not.
        if area(&corners) > 0 {
            polygons.push(corners.iter().flat_map(|&(x, y)| [x as f64, y as f64]).collect());
        }
    }
    polygons
}

/// Follows edges from `start` over `next` until back, removing them; returns the corners at which the direction changes.
fn walk(edges: &mut HashMap<Corner, Vec<Corner>>, start: Corner, next: Corner) -> Vec<Corner> {
    let mut corners = Vec::new();
    let (mut from, mut to) = (start, next);
    loop {
        let ends = edges.get(&to).map_or(&[][..], Vec::as_slice);
        // Where two pixels touch at a corner, turning right stays at the same pixel. Left of 0 there is no end.
        let right =
            (to.0.wrapping_add(from.1).wrapping_sub(to.1), to.1.wrapping_add(to.0).wrapping_sub(from.0));
        let Some(&after) = ends.iter().find(|&&end| end == right).or(ends.first()) else { break };
        let straight = (after.0 + from.0, after.1 + from.1) == (2 * to.0, 2 * to.1);
        if !straight {
            corners.push(to);
        }
        if let Some(ends) = edges.get_mut(&to) {
            ends.retain(|&end| end != after);
        }
        if (to, after) == (start, next) {
            break;
        }
        (from, to) = (to, after);
    }
    corners
}

/// Twice the area within `corners`, above 0 if they run clockwise (y points down).
fn area(corners: &[Corner]) -> i64 {
    let pairs = corners.iter().zip(corners.iter().cycle().skip(1));
    pairs.map(|(a, b)| a.0 as i64 * b.1 as i64 - b.0 as i64 * a.1 as i64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rectangle_has_four_corners() {
        let mask = Mask::from_fn(6, 5, |x, y| (1..4).contains(&x) && (2..4).contains(&y));
        assert_eq!(outlines(&mask), [[4.0, 2.0, 4.0, 4.0, 1.0, 4.0, 1.0, 2.0]]);
        assert!(outlines(&Mask::empty(3, 3)).is_empty());
        assert_eq!(outlines(&Mask::from_fn(2, 1, |_, _| true)).len(), 1);
    }

    #[test]
    fn outlines_filled_again_are_the_mask() {
        let round = |x: usize, y: usize| (x as i64 - 9).pow(2) + (y as i64 - 7).pow(2) < 30;
        let shapes: [Box<dyn Fn(usize, usize) -> bool>; 3] =
            [Box::new(round), Box::new(|x, y| (x / 3 + y / 3) % 2 == 0), Box::new(|x, y| y > x || x > 14)];
        for shape in shapes {
            let mask = Mask::from_fn(18, 15, shape);
            let filled = Mask::from_polygons(&outlines(&mask), 18, 15).unwrap();
            assert_eq!(filled.iou(&mask).unwrap(), 1.0);
        }
        // A hole is filled, and its outline is not told.
        let ring = Mask::from_fn(9, 9, |x, y| (2..7).contains(&x) && (2..7).contains(&y) && (x, y) != (4, 4));
        assert_eq!(outlines(&ring).len(), 1);
        assert_eq!(Mask::from_polygons(&outlines(&ring), 9, 9).unwrap().area(), 25);
    }
}
