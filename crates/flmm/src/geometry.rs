//! How a picture was resized and padded for an LMM, and how mask logits are cut back to the picture.

/// Where the resized picture lies inside the square the LMM saw (`spec/pipeline.md` §4).
///
/// All lengths are `(height, width)` in one pixel unit: LMM-input pixels for LLaVA, HPT and DeepSeek-VL,
/// original pixels for MGM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Geometry {
    /// Size of the picture as the user gave it.
    pub original: (usize, usize),
    /// Size after resizing, before padding.
    pub image_shape: (usize, usize),
    /// Padding above and to the left.
    pub before: (usize, usize),
    /// Size after padding.
    pub padded_shape: (usize, usize),
    /// Whether logits must be cropped at all (LLaVA-NeXT: no).
    pub crop: bool,
}

/// A rectangle on a logit map: rows `y0..y0 + height`, columns `x0..x0 + width`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rect {
    /// First row.
    pub y0: usize,
    /// First column.
    pub x0: usize,
    /// Number of rows.
    pub height: usize,
    /// Number of columns.
    pub width: usize,
}

impl Geometry {
    /// The part of a `height × width` logit map that shows the picture.
    ///
    /// The offset is truncated and the size rounded half up, as the published evaluation does; the end is
    /// clamped to the map.
    pub fn picture_rect(&self, height: usize, width: usize) -> Rect {
        if !self.crop {
            return Rect { y0: 0, x0: 0, height, width };
        }
        let along = |before: usize, shape: usize, padded: usize, len: usize| {
            let start = (before as f64 * len as f64 / padded as f64) as usize;
            let size = (shape as f64 * len as f64 / padded as f64 + 0.5) as usize;
            (start, size.min(len - start))
        };
        let (y0, h) = along(self.before.0, self.image_shape.0, self.padded_shape.0, height);
        let (x0, w) = along(self.before.1, self.image_shape.1, self.padded_shape.1, width);
        Rect { y0, x0, height: h, width: w }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_the_published_test_vectors() {
        // spec/pipeline.md §4, column LLaVA-336: image shape and padding from models.md §11.
        for (shape, before, expected) in [
            ((252, 336), (42, 0), (8, 0, 48, 64)),
            ((336, 224), (0, 56), (0, 10, 64, 43)),
            ((223, 336), (56, 0), (10, 0, 42, 64)),
            ((336, 252), (0, 42), (0, 8, 64, 48)),
        ] {
            let geometry = Geometry {
                original: (0, 0),
                image_shape: shape,
                before,
                padded_shape: (336, 336),
                crop: true,
            };
            let r = geometry.picture_rect(64, 64);
            assert_eq!((r.y0, r.x0, r.height, r.width), expected);
        }
    }
}
