//! Masks as run lengths, so that overlaps are counted without touching pixels.

use flmm::masks::Mask;
use flmm::{Error, Result};
use flmm_data::coco::{Counts, RunLengths, runs_of};
use hotcoco::types::Rle;

/// Column-major run lengths of a mask; the first run is background, the runs cover the picture exactly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Runs {
    height: u32,
    width: u32,
    counts: Vec<u32>,
}

/// Pixels in which two masks agree and differ.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Overlap {
    /// In both.
    pub intersection: u64,
    /// In either.
    pub union: u64,
}

impl Overlap {
    /// Intersection over union; 0 when both masks are empty.
    pub fn iou(self) -> f64 {
        if self.union == 0 { 0.0 } else { self.intersection as f64 / self.union as f64 }
    }
}

impl Runs {
    /// The mask whose pixel (x, y) is `inside(x, y)`.
    pub fn from_fn(height: u32, width: u32, inside: impl Fn(u32, u32) -> bool) -> Self {
        Self::from(runs_of(height, width, inside))
    }

    /// The mask of no pixel.
    pub fn empty(height: u32, width: u32) -> Self {
        Self { height, width, counts: vec![height * width] }
    }

    /// Reads COCO's form. An error if the runs are malformed or do not cover the picture exactly.
    pub fn from_coco(mask: &RunLengths) -> Result<Self> {
        let [height, width] = mask.size;
        let broken = |what: String| {
            Error::request(
                format!("broken run lengths: {what}"),
                "`counts` must be COCO run lengths for `size` [height, width], down the columns, background first",
            )
        };
        let pixels = u64::from(height) * u64::from(width);
        let counts = match &mask.counts {
            Counts::Compressed(text) => {
                let runs = hotcoco::mask::rle_from_string(text, height, width);
                runs.map_err(|error| broken(error.to_string()))?.counts
            }
            Counts::Plain(counts) => counts.clone(),
        };
        let covered: u64 = counts.iter().map(|&run| u64::from(run)).sum();
        if covered != pixels {
            return Err(broken(format!("they cover {covered} of {pixels} pixels")));
        }
        Ok(Self { height, width, counts })
    }

    /// COCO's compressed form.
    pub fn to_coco(&self) -> RunLengths {
        let rle = Rle { h: self.height, w: self.width, counts: self.counts.clone() };
        RunLengths {
            size: [self.height, self.width],
            counts: Counts::Compressed(hotcoco::mask::rle_to_string(&rle)),
        }
    }

    /// The pixels.
    pub fn to_mask(&self) -> Mask {
        let (height, width) = (self.height as usize, self.width as usize);
        let mut ends = Vec::with_capacity(self.counts.len());
        let mut end = 0usize;
        for &run in &self.counts {
            end += run as usize;
            ends.push(end);
        }
        // Odd runs are foreground.
        Mask::from_fn(width, height, |x, y| ends.partition_point(|&end| end <= x * height + y) % 2 == 1)
    }

    /// Height and width, pixels.
    pub fn size(&self) -> [u32; 2] {
        [self.height, self.width]
    }

    /// Foreground pixels.
    pub fn area(&self) -> u64 {
        self.counts.iter().skip(1).step_by(2).map(|&run| u64::from(run)).sum()
    }

    /// Whether there is no foreground.
    pub fn is_empty(&self) -> bool {
        self.area() == 0
    }

    /// Pixels in both masks. An error if the sizes differ.
    pub fn intersection(&self, other: &Self) -> Result<u64> {
        if self.size() != other.size() {
            let ([h, w], [oh, ow]) = (self.size(), other.size());
            return Err(Error::request(
                format!("a mask of {h} x {w} pixels cannot be compared with one of {oh} x {ow}"),
                "masks have the height and width of the picture itself",
            ));
        }
        let (mut a, mut b) = (Walk::new(&self.counts), Walk::new(&other.counts));
        let mut both = 0u64;
        while let (Some(left_a), Some(left_b)) = (a.left(), b.left()) {
            let step = left_a.min(left_b);
            if a.inside() && b.inside() {
                both += u64::from(step);
            }
            a.advance(step);
            b.advance(step);
        }
        Ok(both)
    }

    /// Pixels in both and in either mask. An error if the sizes differ.
    pub fn overlap(&self, other: &Self) -> Result<Overlap> {
        let intersection = self.intersection(other)?;
        Ok(Overlap { intersection, union: self.area() + other.area() - intersection })
    }

    /// The mask of the pixels that are in any of `masks`. An error if the sizes differ.
    pub fn union_of(height: u32, width: u32, masks: &[Self]) -> Result<Self> {
        let mut all = vec![Self::empty(height, width)];
        all.extend_from_slice(masks);
        let rles: Vec<Rle> =
            all.iter().map(|m| Rle { h: m.height, w: m.width, counts: m.counts.clone() }).collect();
        let merged = hotcoco::mask::merge(&rles, false).map_err(|error| {
            Error::request(format!("masks cannot be joined: {error}"), "masks have the size of their picture")
        })?;
        Ok(Self { height, width, counts: merged.counts })
    }
}

impl From<&Mask> for Runs {
    fn from(mask: &Mask) -> Self {
        let bits = mask.bits();
        let width = mask.width();
        Self::from_fn(mask.height() as u32, mask.width() as u32, |x, y| bits[y as usize * width + x as usize])
    }
}

impl From<&flmm_data::Mask> for Runs {
    fn from(mask: &flmm_data::Mask) -> Self {
        let width = mask.width as usize;
        Self::from_fn(mask.height, mask.width, |x, y| mask.data[y as usize * width + x as usize])
    }
}

impl From<Rle> for Runs {
    fn from(rle: Rle) -> Self {
        Self { height: rle.h, width: rle.w, counts: rle.counts }
    }
}

/// A position in a list of runs.
struct Walk<'a> {
    counts: &'a [u32],
    at: usize,
    used: u32,
}

impl<'a> Walk<'a> {
    fn new(counts: &'a [u32]) -> Self {
        let mut walk = Self { counts, at: 0, used: 0 };
        walk.advance(0);
        walk
    }

    /// Pixels left of the present run.
    fn left(&self) -> Option<u32> {
        self.counts.get(self.at).map(|run| run - self.used)
    }

    fn inside(&self) -> bool {
        self.at % 2 == 1
    }

    fn advance(&mut self, pixels: u32) {
        self.used += pixels;
        while self.counts.get(self.at) == Some(&self.used) {
            (self.at, self.used) = (self.at + 1, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn counts_agree_with_pixels(height in 1u32..14, width in 1u32..14, a in any::<u64>(), b in any::<u64>()) {
            let inside = |seed: u64| move |x: u32, y: u32| (seed >> ((x * 7 + y * 13) % 64)) & 1 == 1;
            let (left, right) = (Runs::from_fn(height, width, inside(a)), Runs::from_fn(height, width, inside(b)));
            let count = |wanted: &dyn Fn(u32, u32) -> bool| -> u64 {
                (0..width).map(|x| (0..height).filter(|&y| wanted(x, y)).count() as u64).sum()
            };
            let overlap = left.overlap(&right).unwrap();
            prop_assert_eq!(overlap.intersection, count(&|x, y| inside(a)(x, y) && inside(b)(x, y)));
            prop_assert_eq!(overlap.union, count(&|x, y| inside(a)(x, y) || inside(b)(x, y)));
            prop_assert_eq!(Runs::from_coco(&left.to_coco()).unwrap(), left.clone());
            let joined = Runs::union_of(height, width, &[left, right]).unwrap();
            prop_assert_eq!(joined.area(), overlap.union);
        }
    }

    #[test]
    fn runs_of_no_length_count_nothing() {
        let runs = |counts: &[u32]| {
            Runs::from_coco(&RunLengths { size: [2, 3], counts: Counts::Plain(counts.to_vec()) })
        };
        let odd = runs(&[0, 2, 0, 1, 3]).unwrap();
        assert_eq!((odd.area(), odd.overlap(&runs(&[0, 6]).unwrap()).unwrap().union), (3, 6));
        let error = runs(&[2, 3]).unwrap_err();
        assert!(error.to_string().contains("5 of 6 pixels"), "{error}");
        let other = Runs::empty(3, 2);
        assert!(odd.overlap(&other).unwrap_err().to_string().contains("2 x 3"));
    }
}
