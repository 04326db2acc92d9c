//! Temporary stand-in until the exact processor lands.
use anyhow::{Result, bail};
use candle_core::Tensor;
use flmm::Geometry;

pub struct Processor {
    pub side: usize,
}
impl Processor {
    pub fn geometry(&self, h: usize, w: usize) -> Geometry {
        let s = self.side;
        let (rh, rw) = if h > w { (s, w * s / h) } else { (h * s / w, s) };
        Geometry {
            original: (h, w),
            image_shape: (rh, rw),
            before: ((s - rh) / 2, (s - rw) / 2),
            padded_shape: (s, s),
            crop: true,
        }
    }
    pub fn process(&self, _image: &image::RgbImage) -> Result<(Tensor, Geometry)> {
        bail!("not yet")
    }
}
