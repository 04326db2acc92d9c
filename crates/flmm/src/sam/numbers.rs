//! What the image encoder's matrices are kept in.

use candle_core::DType;

use crate::error::Result;
use crate::nn::Linear;
use crate::weights::WeightFormat;

/// Numbers that the matrices of the image encoder's blocks are kept in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Numbers {
    /// As the reference has them.
    #[default]
    F32,
    /// The blocks compute in bf16.
    Bf16,
    /// As [`Numbers::Bf16`], with matrices as [`WeightFormat::Int8`] has them; on the processor only.
    Int8,
}

impl Numbers {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }

    /// `linear` in these numbers.
    pub(super) fn of(self, linear: &Linear) -> Result<Linear> {
        match self {
            Self::F32 => linear.to_dtype(DType::F32),
            Self::Bf16 => linear.to_dtype(DType::BF16),
            Self::Int8 => linear.to_dtype(DType::BF16)?.in_format(WeightFormat::Int8),
        }
    }
}
