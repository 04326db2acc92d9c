//! Temporary stand-in until the exact processor lands.
use anyhow::Result;
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
    pub fn process(&self, image: &image::RgbImage) -> Result<(Tensor, Geometry)> {
        let g = self.geometry(image.height() as usize, image.width() as usize);
        let (h, w) = g.image_shape;
        let small = image::imageops::resize(image, w as u32, h as u32, image::imageops::FilterType::CatmullRom);
        let mean = [0.48145466f32, 0.4578275, 0.40821073];
        let std = [0.26862954f32, 0.261_302_6, 0.275_777_1];
        let s = self.side;
        let mut out = vec![0f32; 3 * s * s];
        for c in 0..3 {
            let pad = ((mean[c] * 255.0) as u8 as f32 / 255.0 - mean[c]) / std[c];
            out[c * s * s..(c + 1) * s * s].fill(pad);
            for y in 0..h {
                for x in 0..w {
                    let v = small.get_pixel(x as u32, y as u32)[c] as f32 / 255.0;
                    out[(c * s + y + g.before.0) * s + x + g.before.1] = (v - mean[c]) / std[c];
                }
            }
        }
        Ok((Tensor::from_vec(out, (3, s, s), &candle_core::Device::Cpu)?, g))
    }
}
