//! Where image tokens lie in the sequence, and how a row of attention folds back into 2-D maps.

use candle_core::{D, DType, Tensor};

use crate::error::{Error, Result};
use crate::geometry::Geometry;
use crate::nn::bilinear;
use crate::text::round_to;

/// A rectangle of image tokens: token `(y, x)` is number `start + y · stride + x` of the image's tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenGrid {
    /// Number of the first token, counted from the image's first token.
    pub start: usize,
    /// Rows of tokens.
    pub rows: usize,
    /// Columns of tokens that show the picture.
    pub columns: usize,
    /// Tokens from one row to the next; more than `columns` where a row ends with a newline token.
    pub stride: usize,
    /// Row of the plane where the grid begins.
    pub top: usize,
    /// Column of the plane where the grid begins.
    pub left: usize,
}

/// One map of the whole picture, tiled by token grids (row-major, all of one size).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plane {
    /// The grids that tile the plane.
    pub tiles: Vec<TokenGrid>,
    /// Rows of the plane.
    pub height: usize,
    /// Columns of the plane.
    pub width: usize,
}

/// How the maps of several planes become channels (`spec/pipeline.md` §2.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stacking {
    /// LLaVA-NeXT: phrases are merged per plane, then planes are resized in f32; channel `(plane · L + ℓ) · H + head`.
    PlanesOutermost,
    /// MGM-HD: every row is resized and rounded before phrases are merged; channel `(ℓ · planes + plane) · H + head`.
    PlanesWithinLayers,
}

/// How the rows of a phrase's tokens become one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Merge {
    /// Arithmetic mean in f32, rounded to the model's type: every released configuration.
    #[default]
    Mean,
    /// Element-wise maximum.
    Max,
}

/// Where an image's tokens lie in the sequence and which picture each of them shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageLayout {
    /// Position of the image's first token in the sequence.
    pub start: usize,
    /// Number of image tokens, newline tokens included.
    pub tokens: usize,
    /// The planes; the last one has the size of the folded maps.
    pub planes: Vec<Plane>,
    /// How planes become channels.
    pub stacking: Stacking,
}

impl Plane {
    /// One grid of `rows × columns` tokens beginning at token `start`, with `stride` tokens per row.
    pub fn single(start: usize, rows: usize, columns: usize, stride: usize) -> Self {
        let grid = TokenGrid { start, rows, columns, stride, top: 0, left: 0 };
        Self { tiles: vec![grid], height: rows, width: columns }
    }

    /// `across × down` square tiles of `side²` tokens each, row-major, the first beginning at token `start`.
    pub fn tiled(start: usize, side: usize, down: usize, across: usize) -> Self {
        let tile = |index: usize| TokenGrid {
            start: start + index * side * side,
            rows: side,
            columns: side,
            stride: side,
            top: index / across * side,
            left: index % across * side,
        };
        Self { tiles: (0..down * across).map(tile).collect(), height: down * side, width: across * side }
    }

    /// `rows [H, T, image tokens]` → `[H, T, height, width]`
    fn gather(&self, rows: &Tensor) -> Result<Tensor> {
        let (heads, count, _) = rows.dims3()?;
        let mut bands: Vec<(usize, Vec<Tensor>)> = Vec::new();
        for tile in &self.tiles {
            let tokens = rows.narrow(D::Minus1, tile.start, tile.rows * tile.stride)?;
            let map = tokens.reshape((heads, count, tile.rows, tile.stride))?.narrow(3, 0, tile.columns)?;
            match bands.last_mut() {
                Some((top, band)) if *top == tile.top => band.push(map),
                _ => bands.push((tile.top, vec![map])),
            }
        }
        let bands = bands.iter().map(|(_, band)| Tensor::cat(band, 3)).collect::<Result<Vec<_>, _>>()?;
        Ok(Tensor::cat(&bands, 2)?)
    }
}

impl ImageLayout {
    /// One `rows × columns` grid: LLaVA-1.5, DeepSeek-VL, HPT, MGM.
    pub fn single(start: usize, rows: usize, columns: usize) -> Self {
        Self {
            start,
            tokens: rows * columns,
            planes: vec![Plane::single(0, rows, columns, columns)],
            stacking: Stacking::PlanesWithinLayers,
        }
    }

    /// LLaVA-NeXT: a coarse `side × side` grid, then a fine grid whose rows end with a newline token.
    pub fn coarse_and_fine(start: usize, side: usize, fine: (usize, usize)) -> Self {
        let (rows, columns) = fine;
        let coarse = side * side;
        Self {
            start,
            tokens: coarse + rows * (columns + 1),
            planes: vec![
                Plane::single(0, side, side, side),
                Plane::single(coarse, rows, columns, columns + 1),
            ],
            stacking: Stacking::PlanesOutermost,
        }
    }

    /// MGM-HD: a global `side × side` grid, then `grid × grid` crops of the same size.
    pub fn global_and_crops(start: usize, side: usize, grid: usize) -> Self {
        let tile = side * side;
        Self {
            start,
            tokens: tile * (1 + grid * grid),
            planes: vec![Plane::single(0, side, side, side), Plane::tiled(tile, side, grid, grid)],
            stacking: Stacking::PlanesWithinLayers,
        }
    }

    /// The same layout for an image whose tokens begin at position `start`.
    pub fn at(mut self, start: usize) -> Self {
        self.start = start;
        self
    }

    /// Position behind the image's last token.
    pub fn end(&self) -> usize {
        self.start + self.tokens
    }

    /// Height and width of the folded maps.
    pub fn size(&self) -> (usize, usize) {
        self.planes.last().map_or((0, 0), |plane| (plane.height, plane.width))
    }

    /// Channels for a decoder of `layers` layers and `heads` query heads.
    pub fn channels(&self, layers: usize, heads: usize) -> usize {
        self.planes.len() * layers * heads
    }

    /// Plane, layer and head that a channel of the folded maps comes from.
    pub fn channel_origin(&self, layers: usize, heads: usize, channel: usize) -> (usize, usize, usize) {
        let (outer, head) = (channel / heads.max(1), channel % heads.max(1));
        match self.stacking {
            Stacking::PlanesOutermost => (outer / layers.max(1), outer % layers.max(1), head),
            Stacking::PlanesWithinLayers => {
                (outer % self.planes.len().max(1), outer / self.planes.len().max(1), head)
            }
        }
    }

    /// Folds attention rows into the mask head's input `[N, C, gh, gw]`, f32 (`spec/pipeline.md` §2.2, §2.3).
    ///
    /// `rows(ℓ)` gives, for every phrase, the probabilities of its tokens on the image's tokens
    /// `[heads, T_n, tokens]`, already rounded to `dtype` and held in f32. Where the released pipeline rounds
    /// to the model's type, so does this; `dtype` f32 rounds nowhere. A phrase without tokens is an error.
    pub fn fold(
        &self,
        layers: usize,
        merge: Merge,
        dtype: DType,
        mut rows: impl FnMut(usize) -> Result<Vec<Tensor>>,
    ) -> Result<Tensor> {
        let mut folding = Folding::new(self.clone(), merge, dtype);
        for layer in 0..layers {
            folding.push(&rows(layer)?)?;
        }
        folding.maps()
    }
}

/// [`ImageLayout::fold`] layer by layer, for rows that need not be kept.
#[derive(Debug, Clone)]
pub struct Folding {
    layout: ImageLayout,
    merge: Merge,
    dtype: DType,
    /// `layers[layer][phrase][plane]`: `[heads, h, w]`, merged, in f32.
    layers: Vec<Vec<Vec<Tensor>>>,
}

impl Folding {
    /// Nothing folded yet.
    pub fn new(layout: ImageLayout, merge: Merge, dtype: DType) -> Self {
        Self { layout, merge, dtype, layers: Vec::new() }
    }

    /// Folds the next layer: for every phrase, the probabilities of its tokens on the image's tokens `[heads, T_n, tokens]`,
    /// already rounded to the type and held in f32. A phrase without tokens is an error.
    pub fn push(&mut self, phrases: &[Tensor]) -> Result<()> {
        let merged = phrases.iter().enumerate().map(|(phrase, rows)| {
            if rows.dim(1)? == 0 {
                return Err(Error::request(
                    format!("phrase {phrase} has no tokens"),
                    "every phrase must cover at least one token of the text",
                ));
            }
            self.layout.planes.iter().map(|plane| self.merged(plane, rows)).collect()
        });
        self.layers.push(merged.collect::<Result<_>>()?);
        Ok(())
    }

    /// One plane's map of one phrase: `[heads, h, w]`.
    fn merged(&self, plane: &Plane, rows: &Tensor) -> Result<Tensor> {
        let mut maps = plane.gather(rows)?;
        if self.layout.stacking == Stacking::PlanesWithinLayers {
            let (height, width) = self.layout.size();
            maps = round_to(&resize(&maps, height, width)?, self.dtype)?;
        }
        let map = match self.merge {
            Merge::Mean => maps.mean(1)?,
            Merge::Max => maps.max(1)?,
        };
        round_to(&map, self.dtype)
    }

    /// The maps of all layers folded so far: `[N, C, gh, gw]`, f32.
    pub fn maps(&self) -> Result<Tensor> {
        let phrases = self.layers.first().map_or(0, Vec::len);
        if phrases == 0 {
            return Err(Error::request("there is no phrase to ground", "name at least one phrase"));
        }
        let (height, width) = self.layout.size();
        let mut stacked = Vec::with_capacity(phrases);
        for phrase in 0..phrases {
            let of = |layer: &Vec<Vec<Tensor>>, plane: usize| layer[phrase][plane].clone();
            let planes = 0..self.layout.planes.len();
            let maps: Vec<Tensor> = match self.layout.stacking {
                Stacking::PlanesOutermost => {
                    let stacks = planes.map(|plane| {
                        let layers: Vec<Tensor> = self.layers.iter().map(|layer| of(layer, plane)).collect();
                        let stack = Tensor::cat(&layers, 0)?.unsqueeze(0)?;
                        Ok(resize(&stack, height, width)?.squeeze(0)?)
                    });
                    stacks.collect::<Result<_>>()?
                }
                Stacking::PlanesWithinLayers => {
                    let layers = self.layers.iter();
                    layers.flat_map(|layer| planes.clone().map(move |plane| of(layer, plane))).collect()
                }
            };
            stacked.push(Tensor::cat(&maps, 0)?);
        }
        Ok(Tensor::stack(&stacked, 0)?)
    }

    /// Bytes of all maps held.
    pub fn bytes(&self) -> usize {
        let maps = self.layers.iter().flatten().flatten();
        maps.map(|map| map.elem_count() * map.dtype().size_in_bytes()).sum()
    }
}

/// Phrase maps `[N, C, gh, gw]` brought to the size and the picture's part of `height × width` logits:
/// `[N, C, mh, mw]`, as visualisations show them (`spec/pipeline.md` §4). They are not normalised.
pub fn maps_in_picture(maps: &Tensor, geometry: &Geometry, height: usize, width: usize) -> Result<Tensor> {
    let rect = geometry.picture_rect(height, width);
    let maps = resize(maps, height, width)?;
    Ok(maps.narrow(2, rect.y0, rect.height)?.narrow(3, rect.x0, rect.width)?)
}

/// Bilinear, ratio rule, on the last two axes of `[a, b, h, w]`; a map of the right size is left alone.
fn resize(maps: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    let (_, _, h, w) = maps.dims4()?;
    if (h, w) == (height, width) { Ok(maps.clone()) } else { bilinear(maps, height, width) }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use proptest::prelude::*;

    use super::*;

    /// Folds one row whose token `t` has probability `t`, so that a map shows token numbers.
    fn numbered(layout: &ImageLayout) -> Result<Vec<Vec<Vec<f32>>>> {
        let row = Tensor::arange(0f32, layout.tokens as f32, &Device::Cpu)?.reshape((1, 1, layout.tokens))?;
        Ok(layout.fold(1, Merge::Mean, DType::F32, |_| Ok(vec![row.clone()]))?.squeeze(0)?.to_vec3()?)
    }

    proptest! {
        // Rows and columns are the subject here, not the elements.
        #[allow(clippy::needless_range_loop)]
        #[test]
        fn every_token_of_a_grid_lands_on_its_cell(side in 1usize..5, rows in 1usize..6, columns in 1usize..6) {
            let fine = numbered(&ImageLayout::coarse_and_fine(9, side, (rows, columns)))
                .map_err(|error| TestCaseError::fail(error.to_string()))?;
            let crops = numbered(&ImageLayout::global_and_crops(9, side, 2))
                .map_err(|error| TestCaseError::fail(error.to_string()))?;
            for y in 0..rows {
                for x in 0..columns {
                    prop_assert_eq!(fine[1][y][x], (side * side + y * (columns + 1) + x) as f32);
                }
            }
            for y in 0..2 * side {
                for x in 0..2 * side {
                    let tile = 1 + y / side * 2 + x / side;
                    let token = tile * side * side + y % side * side + x % side;
                    prop_assert_eq!(crops[1][y][x], token as f32);
                }
            }
        }
    }

    #[test]
    fn a_phrase_without_tokens_is_refused() -> Result<()> {
        let layout = ImageLayout::single(0, 2, 2);
        let empty = Tensor::zeros((1, 0, 4), DType::F32, &Device::Cpu)?;
        let result = layout.fold(1, Merge::Mean, DType::F32, |_| Ok(vec![empty.clone()]));
        assert!(matches!(result, Err(Error::Request { .. })));
        let none = layout.fold(1, Merge::Mean, DType::F32, |_| Ok(Vec::new()));
        assert!(matches!(none, Err(Error::Request { .. })));
        Ok(())
    }
}
