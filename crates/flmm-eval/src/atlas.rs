//! Where every attention head of a frozen LMM looks: how often its peak, and how much of its mass, falls inside what a
//! phrase speaks of.

use flmm::grounder::Attention;
use flmm::layout::{ImageLayout, maps_in_picture};
use flmm::masks::Mask;
use flmm::overlay::{heat_table, panels};
use flmm::{Error, Result};
use image::RgbImage;
use serde::Serialize;

/// Sums over phrases, one per layer and head.
#[derive(Debug, Clone)]
pub struct Atlas {
    layers: usize,
    heads: usize,
    planes: usize,
    phrases: usize,
    area: f64,
    /// Per (layer, plane, head), in this order.
    peaks: Vec<usize>,
    mass: Vec<f64>,
}

/// The finished table. Rows are layers; columns are heads (for models that see a picture twice: the heads on the coarse
/// view, then those on the fine one).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AtlasTable {
    /// Decoder layers.
    pub layers: usize,
    /// Query heads per layer.
    pub heads: usize,
    /// How many grids of image tokens the model has.
    pub planes: usize,
    /// Phrases counted.
    pub phrases: usize,
    /// Share of the picture that is inside a phrase's true mask, on average: what a blind head would reach.
    pub chance: f64,
    /// Share of the phrases whose peak is inside, `[layer][plane · heads + head]`.
    pub peak: Vec<Vec<f64>>,
    /// Mean share of the attention on the picture that is inside.
    pub mass: Vec<Vec<f64>>,
}

/// A head and its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Head {
    /// Its layer, from 0.
    pub layer: usize,
    /// Its number in the layer, from 0.
    pub head: usize,
    /// Which grid of image tokens.
    pub plane: usize,
    /// Share of the phrases whose peak is inside.
    pub peak: f64,
    /// Mean share of the attention inside.
    pub mass: f64,
}

impl Atlas {
    /// An empty atlas of a model.
    pub fn new(layers: usize, heads: usize, layout: &ImageLayout) -> Self {
        let planes = layout.planes.len();
        let cells = layers * heads * planes;
        Self { layers, heads, planes, phrases: 0, area: 0.0, peaks: vec![0; cells], mass: vec![0.0; cells] }
    }

    /// Adds phrase number `phrase` of `attention`, whose true mask at the picture's size is `truth`. A phrase whose true
    /// mask is empty is left out.
    ///
    /// # Errors
    /// [`Error::Request`] if the maps have another number of channels than the model.
    pub fn add(&mut self, attention: &Attention, phrase: usize, truth: &Mask) -> Result<()> {
        let Attention { maps, geometry, layout } = attention;
        let maps = maps.get(phrase)?;
        let (channels, height, width) = maps.dims3()?;
        if channels != self.peaks.len() || layout.planes.len() != self.planes {
            return Err(Error::request(
                format!("{channels} attention maps for {} layers of {} heads", self.layers, self.heads),
                "an atlas is made of one model",
            ));
        }
        if truth.area() == 0 {
            return Ok(());
        }
        let maps = maps_in_picture(&maps.unsqueeze(0)?, geometry, height, width)?.squeeze(0)?;
        let (_, rows, columns) = maps.dims3()?;
        let shares = inside_shares(truth, rows, columns);
        let values = maps.contiguous()?.flatten_all()?.to_vec1::<f32>()?;
        for (channel, map) in values.chunks_exact(shares.len().max(1)).enumerate() {
            let (plane, layer, head) = layout.channel_origin(self.layers, self.heads, channel);
            let cell = (layer * self.planes + plane) * self.heads + head;
            let total: f64 = map.iter().map(|&v| f64::from(v)).sum();
            let inside: f64 = map.iter().zip(&shares).map(|(&v, &share)| f64::from(v) * share).sum();
            self.mass[cell] += if total > 0.0 { inside / total } else { 0.0 };
            let peak = map
                .iter()
                .enumerate()
                .fold((0, f32::MIN), |best, (i, &v)| if v > best.1 { (i, v) } else { best });
            let (y, x) = (peak.0 / columns.max(1), peak.0 % columns.max(1));
            // The pixel at the cell's centre.
            let pixel =
                |cell: usize, cells: usize, pixels: usize| (2 * cell + 1) * pixels / (2 * cells.max(1));
            let (px, py) = (pixel(x, columns, truth.width()), pixel(y, rows, truth.height()));
            self.peaks[cell] += usize::from(truth.get(px, py));
        }
        self.area += truth.area() as f64 / (truth.width() * truth.height()) as f64;
        self.phrases += 1;
        Ok(())
    }

    /// Shares instead of sums; all 0 without a phrase.
    pub fn table(&self) -> AtlasTable {
        let count = self.phrases.max(1) as f64;
        let columns = (self.planes * self.heads).max(1);
        AtlasTable {
            layers: self.layers,
            heads: self.heads,
            planes: self.planes,
            phrases: self.phrases,
            chance: self.area / count,
            peak: self
                .peaks
                .chunks(columns)
                .map(|row| row.iter().map(|&n| n as f64 / count).collect())
                .collect(),
            mass: self.mass.chunks(columns).map(|row| row.iter().map(|&m| m / count).collect()).collect(),
        }
    }
}

impl AtlasTable {
    /// The heads whose peak is inside most often, best first; among equals the one with more mass inside.
    pub fn best(&self, count: usize) -> Vec<Head> {
        let cell = |layer: usize, column: usize| Head {
            layer,
            head: column % self.heads,
            plane: column / self.heads,
            peak: self.peak[layer][column],
            mass: self.mass[layer][column],
        };
        let cells = |layer: usize| (0..self.peak[layer].len()).map(move |column| (layer, column));
        let mut heads: Vec<Head> =
            (0..self.peak.len()).flat_map(cells).map(|(layer, column)| cell(layer, column)).collect();
        heads.sort_by(|a, b| b.peak.total_cmp(&a.peak).then(b.mass.total_cmp(&a.mass)));
        heads.truncate(count);
        heads
    }

    /// Both tables as one picture: rows are layers, columns heads.
    pub fn picture(&self, model: &str) -> RgbImage {
        let largest = |table: &[Vec<f64>]| table.iter().flatten().copied().fold(self.chance, f64::max);
        let part = |title: &str, table: &[Vec<f64>]| {
            let title = format!("{model}: {title}, chance {:.3}", self.chance);
            vec![(title, heat_table(table, (0.0, largest(table))))]
        };
        panels(&[part("peak inside", &self.peak), part("mass inside", &self.mass)])
    }
}

/// Share of every cell's pixels that are inside `mask`, `height · width` values, row by row.
fn inside_shares(mask: &Mask, height: usize, width: usize) -> Vec<f64> {
    let mut inside = vec![0f64; height * width];
    let mut pixels = vec![0f64; height * width];
    let cell = |pixel: usize, pixels: usize, cells: usize| pixel * cells / pixels.max(1);
    for (i, &bit) in mask.bits().iter().enumerate() {
        let (x, y) = (i % mask.width(), i / mask.width());
        let at = cell(y, mask.height(), height) * width + cell(x, mask.width(), width);
        pixels[at] += 1.0;
        inside[at] += f64::from(u8::from(bit));
    }
    // A cell smaller than a pixel has the value of the pixel it lies in.
    let value = |at: usize| match pixels[at] > 0.0 {
        true => inside[at] / pixels[at],
        false => {
            let (y, x) = (at / width, at % width);
            f64::from(u8::from(mask.get(x * mask.width() / width, y * mask.height() / height)))
        }
    };
    (0..inside.len()).map(value).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};
    use flmm::Geometry;

    /// Two layers of one head on a 2 × 2 grid: the first looks at the mask, the second away from it.
    #[test]
    fn a_head_that_looks_there_is_found() -> Result<()> {
        let layout = ImageLayout::single(0, 2, 2);
        let geometry = Geometry {
            original: (8, 8),
            image_shape: (8, 8),
            before: (0, 0),
            padded_shape: (8, 8),
            crop: true,
        };
        let mask = Mask::from_fn(8, 8, |x, y| x < 4 && y < 4);
        let maps = Tensor::new(&[[[[0.6f32, 0.1], [0.2, 0.1]], [[0.0, 0.0], [0.0, 0.5]]]], &Device::Cpu)?;
        let mut atlas = Atlas::new(2, 1, &layout);
        let mut seen = Attention { maps, geometry, layout };
        atlas.add(&seen, 0, &mask)?;
        atlas.add(&seen, 0, &Mask::empty(8, 8))?;
        let table = atlas.table();
        assert_eq!((table.phrases, table.chance), (1, 0.25));
        assert_eq!(table.peak, [[1.0], [0.0]]);
        assert!((table.mass[0][0] - 0.6).abs() < 1e-6 && table.mass[1][0] == 0.0);
        assert_eq!(table.best(1)[0].layer, 0);
        seen.maps = seen.maps.narrow(1, 0, 1)?;
        assert!(atlas.add(&seen, 0, &mask).is_err());
        table.picture("tiny");
        Ok(())
    }
}
