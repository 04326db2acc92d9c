//! Linear maps and their gradients.

use candle_core::{Result, bail};

use super::product::{Buffer, Matrices, Numbers};

/// Sizes of a linear map of `x [rows, inputs]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) rows: usize,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
}

/// `x [rows, inputs] · weightᵀ` as `[rows, outputs]`; `weight` is `[outputs, inputs]`.
pub(crate) fn linear<'a>(x: impl Into<Numbers<'a>>, weight: Numbers<'a>, sizes: Sizes) -> Result<Buffer> {
    let Sizes { rows, inputs, outputs } = sizes;
    Matrices::one(x, rows, inputs).multiply(Matrices::one(weight, outputs, inputs).t())
}

/// The gradient of `x [rows, inputs]`, from that of the result, `dy [rows, outputs]`.
pub(crate) fn input_gradient<'a>(
    dy: impl Into<Numbers<'a>>,
    weight: Numbers<'a>,
    sizes: Sizes,
) -> Result<Buffer> {
    let Sizes { rows, inputs, outputs } = sizes;
    Matrices::one(dy, rows, outputs).multiply(Matrices::one(weight, outputs, inputs))
}

/// Writes the gradient of the weight to `dw [outputs, inputs]`.
pub(crate) fn weight_gradient<'a>(
    x: impl Into<Numbers<'a>>,
    dy: impl Into<Numbers<'a>>,
    sizes: Sizes,
    dw: &mut [f32],
) -> Result<()> {
    let Sizes { rows, inputs, outputs } = sizes;
    let product = Matrices::one(dy, rows, outputs).t().multiply(Matrices::one(x, rows, inputs))?;
    if product.len() != dw.len() {
        bail!("a gradient of {} numbers for a weight of {}", product.len(), dw.len());
    }
    dw.copy_from_slice(&product);
    Ok(())
}
