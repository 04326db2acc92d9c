//! Linear maps in f32 or, for the products alone, in bf16.

use candle_core::{Result, bail};
use flmm_kernels::{Sizes, linear_bf16};
use half::bf16;
use serde::Deserialize;

use super::product::{Buffer, Matrices, Numbers};
use super::rows::wide;

/// What large products are computed in. Weights, gradients, norms and whatever is added up are f32 all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Precision {
    /// 32 bits.
    #[default]
    F32,
    /// Factors and results of the linear maps are rounded to 16 bits; sums are f32.
    Bf16,
}

impl Precision {
    /// `x [rows, inputs] · weightᵀ` as `[rows, outputs]`; `weight` is `[outputs, inputs]`.
    pub(crate) fn linear<'a>(
        self,
        x: impl Into<Numbers<'a>>,
        weight: Numbers<'a>,
        sizes: Sizes,
    ) -> Result<Buffer> {
        let (x, Sizes { rows, inputs, outputs }) = (x.into(), sizes);
        match self {
            Self::F32 => Matrices::one(x, rows, inputs).multiply(Matrices::one(weight, outputs, inputs).t()),
            Self::Bf16 => {
                let (x, weight) = (x.first(rows * inputs)?, weight.first(outputs * inputs)?);
                Ok(product(&narrow(x), &narrow(weight), sizes))
            }
        }
    }

    /// The gradient of `x [rows, inputs]`, from that of the result, `dy [rows, outputs]`.
    pub(crate) fn input_gradient<'a>(
        self,
        dy: impl Into<Numbers<'a>>,
        weight: Numbers<'a>,
        sizes: Sizes,
    ) -> Result<Buffer> {
        let (dy, Sizes { rows, inputs, outputs }) = (dy.into(), sizes);
        match self {
            Self::F32 => Matrices::one(dy, rows, outputs).multiply(Matrices::one(weight, outputs, inputs)),
            Self::Bf16 => {
                let (dy, weight) = (dy.first(rows * outputs)?, weight.first(outputs * inputs)?);
                let sizes = Sizes { rows, inputs: outputs, outputs: inputs };
                Ok(product(&narrow(dy), &narrow_transposed(weight, inputs), sizes))
            }
        }
    }

    /// Writes the gradient of the weight to `dw [outputs, inputs]`.
    pub(crate) fn weight_gradient<'a>(
        self,
        x: impl Into<Numbers<'a>>,
        dy: impl Into<Numbers<'a>>,
        sizes: Sizes,
        dw: &mut [f32],
    ) -> Result<()> {
        let (x, dy, Sizes { rows, inputs, outputs }) = (x.into(), dy.into(), sizes);
        let product = match self {
            Self::F32 => Matrices::one(dy, rows, outputs).t().multiply(Matrices::one(x, rows, inputs))?,
            Self::Bf16 => {
                let (x, dy) = (x.first(rows * inputs)?, dy.first(rows * outputs)?);
                let sizes = Sizes { rows: outputs, inputs: rows, outputs: inputs };
                product(&narrow_transposed(dy, outputs), &narrow_transposed(x, inputs), sizes)
            }
        };
        if product.len() != dw.len() {
            bail!("a gradient of {} numbers for a weight of {}", product.len(), dw.len());
        }
        dw.copy_from_slice(&product);
        Ok(())
    }
}

fn product(x: &[bf16], weight: &[bf16], sizes: Sizes) -> Buffer {
    let mut y = vec![bf16::ZERO; sizes.rows * sizes.outputs];
    linear_bf16(x, weight, None, sizes, &mut y);
    wide(|| y.iter().map(|y| y.to_f32()).collect::<Vec<f32>>()).into()
}

fn narrow(x: &[f32]) -> Vec<bf16> {
    wide(|| x.iter().map(|x| bf16::from_f32(*x)).collect())
}

/// Rows and columns that are transposed at once.
const BLOCK: usize = 16;

/// `x [rows, columns]` as `[columns, rows]`.
fn narrow_transposed(x: &[f32], columns: usize) -> Vec<bf16> {
    let rows = x.len() / columns;
    let mut y = vec![bf16::ZERO; x.len()];
    wide(|| {
        for row in (0..rows).step_by(BLOCK) {
            let height = BLOCK.min(rows - row);
            for column in (0..columns).step_by(BLOCK) {
                let width = BLOCK.min(columns - column);
                let mut block = [[0f32; BLOCK]; BLOCK];
                for (i, line) in block[..height].iter_mut().enumerate() {
                    let from = &x[(row + i) * columns + column..];
                    match from.first_chunk() {
                        Some(whole) if width == BLOCK => *line = *whole,
                        _ => line[..width].copy_from_slice(&from[..width]),
                    }
                }
                for j in 0..width {
                    let line: [bf16; BLOCK] = std::array::from_fn(|i| bf16::from_f32(block[i][j]));
                    let to = &mut y[(column + j) * rows + row..];
                    match to.first_chunk_mut() {
                        Some(whole) if height == BLOCK => *whole = line,
                        _ => to[..height].copy_from_slice(&line[..height]),
                    }
                }
            }
        }
    });
    y
}
