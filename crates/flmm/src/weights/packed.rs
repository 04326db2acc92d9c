//! Matrices of frozen linear layers in few bits: made while a model is opened, or read as `flmm convert lmm` wrote them.
//!
//! For the matrix `X` a converted file has the bytes `X.int8 [outputs, inputs]` or `X.int4 [outputs, groups · 16]` and
//! the scales `X.scales [outputs, groups]` in bf16; its `__metadata__` tells the format and its version.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use flmm_kernels::{Int4Weight, Int8Weight};
use half::bf16;
use serde::{Deserialize, Serialize};

use super::checkpoint::{checkpoint_files, is_safetensors};
use super::safetensors_metadata;
use crate::error::{Error, Result};
use crate::nn::host::Elements;

/// How the matrices of frozen linear layers are kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WeightFormat {
    /// In the type in which they are loaded.
    #[default]
    AsLoaded,
    /// bf16 on the CPU as eight-bit integers, 128 neighbouring inputs of an output sharing a scale; others as loaded.
    Int8,
    /// As [`WeightFormat::Int8`], and those of a decoder's layers as four-bit integers, 32 neighbouring inputs of an output
    /// sharing a scale.
    Int4,
}

impl WeightFormat {
    /// Its name on the command line and in files; none for matrices as they are loaded.
    pub fn name(self) -> Option<&'static str> {
        match self {
            Self::AsLoaded => None,
            Self::Int8 => Some("int8"),
            Self::Int4 => Some("int4"),
        }
    }

    /// What it is for matrices outside a decoder's layers: towers, projectors and the output layer hold a small part of the
    /// weights, and errors there are not made good by later layers.
    pub(super) fn outside_layers(self) -> Self {
        match self {
            Self::Int4 => Self::Int8,
            other => other,
        }
    }
}

/// Key of `__metadata__`: the format's name.
const FORMAT: &str = "flmm_weights";
/// Key of `__metadata__`: the version of what the module's description says.
const VERSION: &str = "flmm_weights_version";
/// The version that is written, and the only one that is read.
const CURRENT: &str = "1";
/// What stands behind a matrix' name for its scales.
const SCALES: &str = "scales";

/// The matrix of a frozen linear layer in few bits.
#[derive(Debug, Clone)]
pub(crate) enum Packed {
    Int8(Arc<Int8Weight>),
    Int4(Arc<Int4Weight>),
}

impl Packed {
    /// `weight` of rows of `inputs` in `format`; none if that is as loaded.
    pub(crate) fn quantise(format: WeightFormat, weight: &[bf16], inputs: usize) -> Option<Self> {
        match format {
            WeightFormat::AsLoaded => None,
            WeightFormat::Int8 => Some(Self::Int8(Arc::new(Int8Weight::quantise(weight, inputs)))),
            WeightFormat::Int4 => Some(Self::Int4(Arc::new(Int4Weight::quantise(weight, inputs)))),
        }
    }

    /// The tensor `name` of `file` in `format`; none if that is as loaded, or if it is no matrix of bf16.
    ///
    /// # Errors
    /// [`Error::Weights`] for values that are not finite.
    pub(super) fn of(tensor: &Tensor, format: WeightFormat, name: &str, file: &Path) -> Result<Option<Self>> {
        let (WeightFormat::Int8 | WeightFormat::Int4, DType::BF16, &[_, inputs]) =
            (format, tensor.dtype(), tensor.dims())
        else {
            return Ok(None);
        };
        let elements = Elements::of(tensor);
        let numbers = elements.get_as::<bf16>()?;
        if !numbers.iter().all(|number| number.is_finite()) {
            return Err(Error::weights(
                file,
                format!("tensor `{name}` has values that are not finite in bf16"),
                "its training failed, or the file is damaged: use another",
            ));
        }
        Ok(Self::quantise(format, numbers, inputs))
    }

    /// The matrix `[outputs, inputs]` from its parts; none if they are not those of such a matrix.
    pub(super) fn from_parts(
        stored: Stored,
        bytes: &Tensor,
        scales: &Tensor,
        shape: [usize; 2],
    ) -> Result<Option<Self>> {
        let (bytes, scales) =
            (bytes.flatten_all()?.to_vec1::<u8>()?, scales.flatten_all()?.to_vec1::<bf16>()?);
        Ok(match stored {
            Stored::Int8 => {
                Int8Weight::from_parts(bytes, scales, shape).map(|weight| Self::Int8(Arc::new(weight)))
            }
            Stored::Int4 => {
                Int4Weight::from_parts(bytes, scales, shape).map(|weight| Self::Int4(Arc::new(weight)))
            }
        })
    }

    /// The tensors that a file has of the matrix `name`.
    pub(crate) fn tensors(&self, name: &str) -> Result<[(String, Tensor); 2]> {
        let (stored, bytes, scales) = match self {
            Self::Int8(weight) => {
                let (bytes, scales) = weight.parts();
                (Stored::Int8, bytes, scales)
            }
            Self::Int4(weight) => {
                let (bytes, scales) = weight.parts();
                (Stored::Int4, bytes, scales)
            }
        };
        let [width, groups] = stored.part_sizes(self.inputs());
        let bytes = Tensor::from_slice(bytes, (self.outputs(), width), &Device::Cpu)?;
        let scales = Tensor::from_slice(scales, (self.outputs(), groups), &Device::Cpu)?;
        Ok([(stored.bytes_of(name), bytes), (scales_of(name), scales)])
    }

    /// Rows.
    pub(crate) fn outputs(&self) -> usize {
        match self {
            Self::Int8(weight) => weight.outputs(),
            Self::Int4(weight) => weight.outputs(),
        }
    }

    /// Columns.
    pub(crate) fn inputs(&self) -> usize {
        match self {
            Self::Int8(weight) => weight.inputs(),
            Self::Int4(weight) => weight.inputs(),
        }
    }

    /// `y = x·weightᵀ + bias`: `x [rows, inputs]`, `bias [outputs]`, `y [rows, outputs]`, whose lengths must fit.
    pub(crate) fn multiply(&self, x: &[bf16], bias: Option<&[bf16]>, y: &mut [bf16]) {
        match self {
            Self::Int8(weight) => weight.multiply(x, bias, y),
            Self::Int4(weight) => weight.multiply(x, bias, y),
        }
    }
}

/// The kinds of packed matrices in files.
#[derive(Debug, Clone, Copy)]
pub(super) enum Stored {
    Int8,
    Int4,
}

impl Stored {
    pub(super) const ALL: [Self; 2] = [Self::Int8, Self::Int4];

    /// Name of the bytes of the matrix `name`.
    pub(super) fn bytes_of(self, name: &str) -> String {
        match self {
            Self::Int8 => format!("{name}.int8"),
            Self::Int4 => format!("{name}.int4"),
        }
    }

    /// Bytes and scales of a row of `inputs`.
    pub(super) fn part_sizes(self, inputs: usize) -> [usize; 2] {
        match self {
            Self::Int8 => Int8Weight::part_sizes(inputs),
            Self::Int4 => Int4Weight::part_sizes(inputs),
        }
    }
}

/// Name of the scales of the matrix `name`.
pub(crate) fn scales_of(name: &str) -> String {
    format!("{name}.{SCALES}")
}

/// What the `__metadata__` of a file with matrices in `format` says, beside what every file's says.
pub(crate) fn metadata(format: WeightFormat) -> BTreeMap<String, String> {
    let mut all = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    if let Some(name) = format.name() {
        all.extend([(FORMAT.to_owned(), name.to_owned()), (VERSION.to_owned(), CURRENT.to_owned())]);
    }
    all
}

/// The format that the checkpoint at `path`, a file or a folder, was converted to; none if it was not. Only headers are
/// read. Where there is no checkpoint, none was converted.
///
/// # Errors
/// [`Error::Weights`] for a format or version that this program does not know, and if shards differ; what reading a header
/// gives.
pub fn stored_format(path: impl AsRef<Path>) -> Result<Option<WeightFormat>> {
    let path = path.as_ref();
    let mut found = None;
    for file in checkpoint_files(path).unwrap_or_default() {
        if !is_safetensors(&file) || !super::files::is_file(&file) {
            continue;
        }
        let metadata = safetensors_metadata(&file)?;
        let format = metadata.get(FORMAT).map(String::as_str);
        let known = [WeightFormat::Int8, WeightFormat::Int4].into_iter().find(|known| known.name() == format);
        let version = metadata.get(VERSION).map_or("none", String::as_str);
        if let Some(format) = format
            && (known.is_none() || version != CURRENT)
        {
            let what = format!(
                "weights are converted to `{format}`, version {version}; this program reads int8 and int4, version {CURRENT}"
            );
            return Err(Error::weights(&file, what, CONVERT_AGAIN));
        }
        match found {
            None => found = Some(known),
            Some(first) if first == known => {}
            Some(_) => {
                return Err(Error::weights(
                    &file,
                    "shards are converted to different formats",
                    CONVERT_AGAIN,
                ));
            }
        }
    }
    Ok(found.flatten())
}

const CONVERT_AGAIN: &str = "make the folder again from the model as published, with `flmm convert lmm`";
