//! Mini-Gemini's two views of one picture: a large one for the auxiliary tower, and the main tower's input made
//! from it (`spec/models.md` §8).

use candle_core::Tensor;
use image::RgbImage;

use super::preprocess::{Normalisation, pad_to_square};
use super::resample::{Filter, pillow_resize};
use crate::error::Result;
use crate::geometry::Geometry;
use crate::nn::bilinear;

/// Pads at the original size, resizes to the auxiliary input, and makes the main views from that.
#[derive(Debug, Clone, PartialEq)]
pub struct DualProcessor {
    side: usize,
    side_aux: usize,
    grid: usize,
    normalisation: Normalisation,
}

/// What the two towers see.
#[derive(Debug, Clone)]
pub struct DualInput {
    /// `[views, 3, side, side]` f32: one view, or `grid × grid` crops row by row and a global view behind them.
    pub main: Tensor,
    /// `[1, 3, side_aux, side_aux]` f32.
    pub aux: Tensor,
    /// Where the picture lies in the square, in pixels of the picture itself.
    pub geometry: Geometry,
}

impl DualProcessor {
    /// For a main tower that reads `side × side`, an auxiliary one that reads `side_aux × side_aux`, and
    /// `grid × grid` crops (1: the whole picture is the only view).
    pub fn new(side: usize, side_aux: usize, grid: usize, normalisation: Normalisation) -> Self {
        Self { side, side_aux, grid: grid.max(1), normalisation }
    }

    /// Both inputs.
    ///
    /// # Errors
    /// [`crate::Error::Image`] if the picture is empty.
    pub fn process(&self, image: &RgbImage) -> Result<DualInput> {
        let (square, geometry) = self.square(image)?;
        let aux = self.normalisation.apply(&square)?.unsqueeze(0)?;
        let (side, grid) = (self.side, self.grid);
        let whole = bilinear(&aux, side * grid, side * grid)?;
        if grid == 1 {
            return Ok(DualInput { main: whole, aux, geometry });
        }
        let crops = whole.reshape(&[3, grid, side, grid, side])?.permute([1, 3, 0, 2, 4])?.reshape((
            grid * grid,
            3,
            side,
            side,
        ))?;
        let main = Tensor::cat(&[&crops, &bilinear(&whole, side, side)?], 0)?;
        Ok(DualInput { main, aux, geometry })
    }

    /// The 8-bit square of the auxiliary input before normalisation.
    pub fn square(&self, image: &RgbImage) -> Result<(RgbImage, Geometry)> {
        let (square, geometry) = pad_to_square(image, self.normalisation.background())?;
        let side = self.side_aux as u32;
        Ok((pillow_resize(&square, side, side, Filter::Bicubic), geometry))
    }
}
