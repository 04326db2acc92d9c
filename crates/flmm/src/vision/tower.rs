//! What CLIP and SigLIP towers have in common: sizes, the choice of a hidden state, patches.

use candle_core::{DType, Device, Tensor};

use crate::config::Config;
use crate::error::{Error, Result};

/// How many of `num_layers` blocks run before hidden state `feature_layer` is there.
///
/// Hidden states are counted with the embedding as number 0; negative numbers count from the end, so −2 is the
/// state before the last block.
pub(super) fn blocks_used(config: &Config, num_layers: usize, feature_layer: i64) -> Result<usize> {
    let states = num_layers as i64 + 1;
    let index = if feature_layer < 0 { states + feature_layer } else { feature_layer };
    if !(0..states).contains(&index) {
        return Err(Error::config(
            config.file(),
            format!(
                "`vision_feature_layer`: the tower has hidden states 0..{num_layers}, found {feature_layer}"
            ),
            "correct the value in the file",
        ));
    }
    Ok(index as usize)
}

/// Fails unless the heads divide the width and a patch fits the picture; keys are named `heads_key` and
/// `patch_key`.
pub(crate) fn check_sizes(
    config: &Config,
    (hidden_size, num_heads, heads_key): (usize, usize, &str),
    (image_size, patch_size, patch_key): (usize, usize, &str),
) -> Result<()> {
    if hidden_size % num_heads != 0 {
        return Err(config.error(
            heads_key,
            format!("{num_heads} heads do not divide the width {hidden_size}"),
            "correct the value in the file",
        ));
    }
    if image_size < patch_size {
        return Err(config.error(
            patch_key,
            format!("patches of {patch_size} pixels do not fit a picture of {image_size}"),
            "correct the value in the file",
        ));
    }
    Ok(())
}

/// `pixel_values [B, 3, S, S]` → `[B, grid², 3 · patch²]`; what lies behind the last whole patch is left out.
///
/// A convolution whose stride is its size is a linear map of these.
pub(super) fn patches(pixel_values: &Tensor, grid: usize, patch: usize) -> Result<Tensor> {
    let batch = pixel_values.dim(0)?;
    Ok(pixel_values
        .narrow(2, 0, grid * patch)?
        .narrow(3, 0, grid * patch)?
        .reshape(&[batch, 3, grid, patch, grid, patch])?
        .permute([0, 2, 4, 1, 3, 5])?
        .reshape((batch, grid * grid, 3 * patch * patch))?)
}

/// What a tower does to pixels that its processor left between 0 and 1: `(x − mean) / std` per channel, in the
/// model's type.
#[derive(Debug)]
pub(crate) struct PixelNorm {
    /// `[1, 3, 1, 1]`
    mean: Tensor,
    /// `[1, 3, 1, 1]`
    std: Tensor,
}

impl PixelNorm {
    /// Reads `pixel_mean` and `pixel_std`; `None` where neither is there.
    ///
    /// # Errors
    /// [`Error::Config`] if only one is there, if one is not three numbers, or if a deviation is 0.
    pub(crate) fn from_config(config: &Config, dtype: DType, device: &Device) -> Result<Option<Self>> {
        if config.get("pixel_mean").or(config.get("pixel_std")).is_none() {
            return Ok(None);
        }
        let three = |key: &str| {
            let numbers =
                config.get(key).and_then(|value| serde_json::from_value::<[f32; 3]>(value.clone()).ok());
            let numbers = numbers
                .filter(|v| v.iter().all(|x| x.is_finite()) && (key == "pixel_mean" || !v.contains(&0.0)));
            let numbers = numbers.ok_or_else(|| {
                config.error(key, "expected three usable numbers, one per colour", "download the file again")
            })?;
            Ok::<_, Error>(Tensor::new(&numbers, device)?.to_dtype(dtype)?.reshape((1, 3, 1, 1))?)
        };
        Ok(Some(Self { mean: three("pixel_mean")?, std: three("pixel_std")? }))
    }

    /// `[B, 3, h, w]` → same shape.
    pub(crate) fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        Ok(pixels.broadcast_sub(&self.mean)?.broadcast_div(&self.std)?)
    }
}
