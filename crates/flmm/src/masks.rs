//! Binary masks and their COCO run-length form.

use candle_core::{DType, Tensor};
use hotcoco::types::Rle;

use crate::{Error, Result};

/// A binary mask of `height × width` pixels, row-major.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mask {
    width: usize,
    height: usize,
    bits: Vec<bool>,
}

/// A mask as COCO writes it: `{"size": [height, width], "counts": "<compressed run lengths>"}`, runs down the columns.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Segmentation {
    /// Height, width.
    pub size: [u32; 2],
    /// COCO's compressed run lengths.
    pub counts: String,
}

impl Mask {
    /// A mask of row-major `bits`; an error unless there are `width × height` of them.
    pub fn new(width: usize, height: usize, bits: Vec<bool>) -> Result<Self> {
        if width.checked_mul(height) != Some(bits.len()) {
            return Err(Error::request(
                format!("a {width}×{height} mask cannot have {} pixels", bits.len()),
                "give one value per pixel, row by row",
            ));
        }
        Ok(Self { width, height, bits })
    }

    /// A mask without any foreground.
    pub fn empty(width: usize, height: usize) -> Self {
        Self { width, height, bits: vec![false; width * height] }
    }

    /// A mask whose pixel `(x, y)` is `inside(x, y)`.
    pub fn from_fn(width: usize, height: usize, mut inside: impl FnMut(usize, usize) -> bool) -> Self {
        let bits = (0..width * height).map(|i| inside(i % width, i / width)).collect();
        Self { width, height, bits }
    }

    /// The pixels of `[height, width]` logits that are above 0 (`spec/pipeline.md` §6).
    pub fn from_logits(logits: &Tensor) -> Result<Self> {
        let (height, width) = logits.dims2()?;
        let values = logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        Ok(Self { width, height, bits: values.into_iter().map(|v| v > 0.0).collect() })
    }

    /// Pixels per row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Number of rows.
    pub fn height(&self) -> usize {
        self.height
    }

    /// All pixels, row by row.
    pub fn bits(&self) -> &[bool] {
        &self.bits
    }

    /// Whether the pixel in column `x`, row `y` is foreground; pixels outside are not.
    pub fn get(&self, x: usize, y: usize) -> bool {
        x < self.width && y < self.height && self.bits[y * self.width + x]
    }

    /// Number of foreground pixels.
    pub fn area(&self) -> usize {
        self.bits.iter().filter(|&&bit| bit).count()
    }

    /// The smallest box around the foreground, `[x, y, width, height]` in pixels; all zero for an empty mask.
    pub fn bbox(&self) -> [usize; 4] {
        let (mut x0, mut y0, mut x1, mut y1) = (self.width, self.height, 0, 0);
        for (i, _) in self.bits.iter().enumerate().filter(|(_, bit)| **bit) {
            let (x, y) = (i % self.width, i / self.width);
            (x0, y0, x1, y1) = (x0.min(x), y0.min(y), x1.max(x + 1), y1.max(y + 1));
        }
        if x1 == 0 { [0; 4] } else { [x0, y0, x1 - x0, y1 - y0] }
    }

    /// Pixels in both masks. An error if the sizes differ.
    pub fn intersection(&self, other: &Self) -> Result<Self> {
        self.combine(other, |a, b| a && b)
    }

    /// Pixels in either mask. An error if the sizes differ.
    pub fn union(&self, other: &Self) -> Result<Self> {
        self.combine(other, |a, b| a || b)
    }

    /// Intersection over union; 0 when both masks are empty (`spec/evaluation.md` §1). An error if the sizes differ.
    pub fn iou(&self, other: &Self) -> Result<f64> {
        let (inter, union) = (self.intersection(other)?.area(), self.union(other)?.area());
        Ok(if union == 0 { 0.0 } else { inter as f64 / union as f64 })
    }

    fn combine(&self, other: &Self, pixel: impl Fn(bool, bool) -> bool) -> Result<Self> {
        if (self.width, self.height) != (other.width, other.height) {
            return Err(Error::request(
                format!(
                    "a {}×{} mask cannot be combined with a {}×{} one",
                    self.width, self.height, other.width, other.height
                ),
                "bring both masks to the size of the picture first",
            ));
        }
        let bits = self.bits.iter().zip(&other.bits).map(|(&a, &b)| pixel(a, b)).collect();
        Ok(Self { bits, ..*self })
    }

    /// The mask in COCO's form. An error if it has more than 2³² − 1 pixels.
    pub fn to_coco(&self) -> Result<Segmentation> {
        let size = [self.height as u32, self.width as u32];
        let down_columns: Vec<u8> = (0..self.width)
            .flat_map(|x| (0..self.height).map(move |y| u8::from(self.bits[y * self.width + x])))
            .collect();
        let rle = hotcoco::mask::encode(&down_columns, size[0], size[1]).map_err(bad_rle)?;
        Ok(Segmentation { size, counts: hotcoco::mask::rle_to_string(&rle) })
    }

    /// Reads COCO's form. An error if the runs are malformed or longer than the mask.
    pub fn from_coco(segmentation: &Segmentation) -> Result<Self> {
        let [h, w] = segmentation.size;
        let rle = hotcoco::mask::rle_from_string(&segmentation.counts, h, w).map_err(bad_rle)?;
        Ok(Self::from_runs(&rle))
    }

    /// Fills polygons (`[x0, y0, x1, y1, …]` in pixels) and joins them, by COCO's rule: edges on a five-fold grid
    /// (`spec/training.md` §2.3). Parts with an odd count or fewer than six numbers are left out.
    pub fn from_polygons(polygons: &[Vec<f64>], width: usize, height: usize) -> Result<Self> {
        let size = |side: usize| {
            u32::try_from(side)
                .map_err(|_| Error::request("a mask side does not fit 32 bits", "use a smaller picture"))
        };
        let usable: Vec<Vec<f64>> =
            polygons.iter().filter(|p| p.len() >= 6 && p.len().is_multiple_of(2)).cloned().collect();
        let rle = hotcoco::mask::fr_polys(&usable, size(height)?, size(width)?).map_err(bad_rle)?;
        Ok(Self::from_runs(&rle))
    }

    fn from_runs(rle: &Rle) -> Self {
        let (width, height) = (rle.w as usize, rle.h as usize);
        let down_columns = hotcoco::mask::decode(rle);
        Self::from_fn(width, height, |x, y| down_columns[x * height + y] != 0)
    }
}

fn bad_rle(error: hotcoco::Error) -> Error {
    Error::request(
        format!("not a usable COCO mask: {error}"),
        "`counts` must be COCO's compressed run lengths for the given `size` [height, width]",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use proptest::prelude::*;

    #[test]
    fn logits_at_zero_are_background() -> Result<()> {
        let logits = Tensor::new(&[[-1f32, 0.0, 0.5], [2.0, f32::NAN, -0.0]], &Device::Cpu)?;
        let mask = Mask::from_logits(&logits)?;
        assert_eq!(mask.bits(), [false, false, true, true, false, false]);
        assert_eq!((mask.area(), mask.bbox()), (2, [0, 0, 3, 2]));
        Ok(())
    }

    #[test]
    fn runs_longer_than_the_mask_are_an_error() {
        let long = Segmentation { size: [2, 2], counts: "0S1".into() };
        assert!(Mask::from_coco(&long).is_err());
        assert!(Mask::new(2, 2, vec![true; 3]).is_err());
        assert!(Mask::empty(2, 2).iou(&Mask::empty(2, 3)).is_err());
    }

    proptest! {
        #[test]
        fn coco_form_is_lossless(width in 1usize..20, height in 1usize..20, seed in any::<u64>()) {
            let mask = Mask::from_fn(width, height, |x, y| (seed >> ((x * 7 + y * 13) % 64)) & 1 == 1);
            prop_assert_eq!(Mask::from_coco(&mask.to_coco().unwrap()).unwrap(), mask);
        }
    }
}
