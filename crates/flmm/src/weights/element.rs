//! Element types found in checkpoint files, and raw bytes to tensors.

use candle_core::{DType, Device, Tensor};

use crate::error::Result;

/// The type of a tensor's elements in a file. Types that candle lacks are widened to one that it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Element {
    Bool,
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    I64,
    F16,
    BF16,
    F32,
    F64,
}

impl Element {
    /// Bytes per element in the file.
    pub(super) fn size(self) -> usize {
        match self {
            Self::Bool | Self::U8 | Self::I8 => 1,
            Self::U16 | Self::I16 | Self::F16 | Self::BF16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::I64 | Self::F64 => 8,
        }
    }

    /// The name that safetensors has for it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::U8 => "U8",
            Self::I8 => "I8",
            Self::U16 => "U16",
            Self::I16 => "I16",
            Self::U32 => "U32",
            Self::I32 => "I32",
            Self::I64 => "I64",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::F32 => "F32",
            Self::F64 => "F64",
        }
    }

    /// The element type called `name` in a safetensors header.
    pub(super) fn from_safetensors(dtype: safetensors::Dtype) -> Option<Self> {
        use safetensors::Dtype as D;
        Some(match dtype {
            D::BOOL => Self::Bool,
            D::U8 => Self::U8,
            D::I8 => Self::I8,
            D::U16 => Self::U16,
            D::I16 => Self::I16,
            D::U32 => Self::U32,
            D::I32 => Self::I32,
            D::I64 => Self::I64,
            D::F16 => Self::F16,
            D::BF16 => Self::BF16,
            D::F32 => Self::F32,
            D::F64 => Self::F64,
            _ => return None,
        })
    }

    /// Little-endian `bytes` as a tensor of `shape`; the byte count must fit. A floating-point tensor is
    /// converted to `dtype` if one is given, integers keep their type.
    pub(super) fn tensor(
        self,
        bytes: &[u8],
        shape: &[usize],
        dtype: Option<DType>,
        device: &Device,
    ) -> Result<Tensor> {
        let raw = |dtype| Tensor::from_raw_buffer(bytes, dtype, shape, &Device::Cpu);
        let tensor = match self {
            // Rust's and Python's booleans are one byte each, zero or one.
            Self::Bool | Self::U8 => raw(DType::U8)?,
            Self::I8 => {
                let wide = bytes.iter().map(|&b| i16::from(b as i8)).collect();
                Tensor::from_vec::<_, i16>(wide, shape, &Device::Cpu)?
            }
            Self::U16 => {
                let (pairs, _) = bytes.as_chunks::<2>();
                let wide = pairs.iter().map(|&b| u32::from(u16::from_le_bytes(b))).collect();
                Tensor::from_vec::<_, u32>(wide, shape, &Device::Cpu)?
            }
            Self::I16 => raw(DType::I16)?,
            Self::U32 => raw(DType::U32)?,
            Self::I32 => raw(DType::I32)?,
            Self::I64 => raw(DType::I64)?,
            Self::F16 => raw(DType::F16)?,
            Self::BF16 => raw(DType::BF16)?,
            Self::F32 => raw(DType::F32)?,
            Self::F64 => raw(DType::F64)?,
        };
        let tensor = match dtype {
            Some(dtype) if tensor.dtype().is_float() && tensor.dtype() != dtype => tensor.to_dtype(dtype)?,
            _ => tensor,
        };
        Ok(tensor.to_device(device)?)
    }
}

/// The number of elements of `shape`, unless the product of its non-zero lengths overflows. Zeros do not excuse the
/// other lengths, because strides are computed from those.
pub(super) fn elem_count(shape: &[usize]) -> Option<usize> {
    let product = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d.max(1)))?;
    Some(if shape.contains(&0) { 0 } else { product })
}
