//! Patch info mining: every token of the main tower attends to the cells of its own patch of the auxiliary map.

use candle_core::{DType, Tensor};

use crate::error::{Error, Result};
use crate::nn::{LayerNorm, Linear, bilinear_scaled, softmax_last_dim};
use crate::text::round_to;
use crate::vision::convnext::FeatureMap;
use crate::weights::Params;

/// Layer norm and linear layer: `vlm_uni_*_projector.{0,1}`.
#[derive(Debug)]
struct Projection {
    norm: LayerNorm,
    linear: Linear,
}

impl Projection {
    fn load(inputs: usize, outputs: usize, params: &Params) -> Result<Self> {
        params.claim(&[]);
        Ok(Self {
            norm: LayerNorm::load(inputs, 1e-5, &params.pp(0))?,
            linear: Linear::load(inputs, outputs, true, &params.pp(1))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.linear.forward(&self.norm.forward(x)?)
    }
}

/// The three projections of the mining attention.
#[derive(Debug)]
pub(super) struct PatchMining {
    query: Projection,
    key: Projection,
    value: Projection,
    width: usize,
}

impl PatchMining {
    /// Reads `vlm_uni_{query,aux,val}_projector`: `width` of the main tower's tokens, `channels` of the auxiliary map.
    pub(super) fn load(width: usize, channels: usize, params: &Params) -> Result<Self> {
        Ok(Self {
            query: Projection::load(width, width, &params.pp("vlm_uni_query_projector"))?,
            key: Projection::load(channels, width, &params.pp("vlm_uni_aux_projector"))?,
            value: Projection::load(channels, width, &params.pp("vlm_uni_val_projector"))?,
            width,
        })
    }

    /// `features [views, grid², width]` and a square `map` → main plus mined tokens `[tokens, width]`.
    ///
    /// One view looks at the whole map. Of several, the last is the global one, which looks at the map reduced to
    /// the size of a crop's part; its tokens come first, then the crops' (`spec/models.md` §8).
    pub(super) fn forward(&self, features: &Tensor, map: &FeatureMap) -> Result<Tensor> {
        let (views, _, _) = features.dims3()?;
        let (height, _) = map.size();
        let Some(crops) = views.checked_sub(1).filter(|&crops| crops > 0) else {
            return self.mine(&features.get(0)?, map, (0, 0, height), 1);
        };
        let across = crops.isqrt();
        let side = height / across;
        let mut tokens = vec![self.mine(&features.get(crops)?, map, (0, 0, height), across)?];
        for crop in 0..across * across {
            let (top, left) = (crop / across * side, crop % across * side);
            tokens.push(self.mine(&features.get(crop)?, map, (top, left, side), 1)?);
        }
        Ok(Tensor::cat(&tokens, 0)?)
    }

    /// `main [grid², width]` and the part of the map it shows, `(top, left, side)`, which is first reduced `shrink` times.
    ///
    /// One row of patches at a time: keys and values of a whole map, and the map itself, would take gigabytes. Reducing by a whole number
    /// mixes no cells of two rows of patches.
    fn mine(
        &self,
        main: &Tensor,
        map: &FeatureMap,
        (top, left, side): (usize, usize, usize),
        shrink: usize,
    ) -> Result<Tensor> {
        let (tokens, _) = main.dims2()?;
        let grid = tokens.isqrt();
        let patch = side / shrink / grid.max(1);
        if patch == 0 || patch * grid * shrink != side || grid * grid != tokens {
            let what = format!("{tokens} tokens for an auxiliary map of {side} cells per side");
            return Err(Error::image(what, "prepare the picture with the model that reads it"));
        }
        let queries = self.query.forward(main)?;
        let mut mined = Vec::with_capacity(grid);
        for row in 0..grid {
            let first = top + row * patch * shrink;
            let mut strip = map.part(first..first + patch * shrink, left..left + side)?;
            if shrink > 1 {
                strip = bilinear_scaled(&strip, 1.0 / shrink as f64)?;
            }
            let channels = strip.dim(0)?;
            let patches = strip.reshape((channels, patch, grid, patch))?.permute((2, 1, 3, 0))?.reshape((
                grid,
                patch * patch,
                channels,
            ))?;
            let query = queries.narrow(0, row * grid, grid)?.unsqueeze(1)?;
            mined.push(self.attend(&query, &patches)?.squeeze(1)?);
        }
        Ok((main + Tensor::cat(&mined, 0)?)?)
    }

    /// `query [n, 1, width]` over `cells [n, m, channels]` → `[n, 1, width]`. Every step is computed in f32 and
    /// rounded to the model's type.
    fn attend(&self, query: &Tensor, cells: &Tensor) -> Result<Tensor> {
        let dtype = query.dtype();
        let wide = |x: &Tensor| x.to_dtype(DType::F32);
        let (keys, values) = (wide(&self.key.forward(cells)?)?, wide(&self.value.forward(cells)?)?);
        let keys = round_to(&(keys / (self.width as f64).sqrt())?, dtype)?;
        let scores = round_to(&wide(query)?.matmul(&keys.transpose(1, 2)?.contiguous()?)?, dtype)?;
        let probs = round_to(&softmax_last_dim(&scores)?, dtype)?;
        Ok(probs.matmul(&values)?.to_dtype(dtype)?)
    }
}
