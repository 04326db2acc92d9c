//! What a caller of the loaders chooses and sees, tensor by tensor.

use std::collections::HashMap;
use std::path::Path;

use candle_core::Tensor;

use super::packed::{Packed, WeightFormat};
use crate::error::Result;

/// Which tensors are read, and who hears of it.
pub(super) struct Watch<'a> {
    /// Whether the tensor of a name is wanted.
    pub(super) keep: &'a dyn Fn(&str) -> bool,
    /// Matrices that are packed as soon as they are read, and how.
    pub(super) matrices: Option<&'a HashMap<String, WeightFormat>>,
    /// Receives the bytes of every tensor that was read.
    pub(super) read: &'a mut dyn FnMut(u64),
}

impl<'a> Watch<'a> {
    /// Keeps everything, as it is stored.
    pub(super) fn everything(read: &'a mut dyn FnMut(u64)) -> Self {
        Self { keep: &|_| true, matrices: None, read }
    }

    /// Whether the tensor `name` becomes something else.
    pub(super) fn packs(&self, name: &str) -> bool {
        self.format(name) != WeightFormat::AsLoaded
    }

    fn format(&self, name: &str) -> WeightFormat {
        self.matrices.and_then(|matrices| matrices.get(name)).copied().unwrap_or_default()
    }

    /// What is handed out for the tensor `name` of `file`: itself, or what a converted file has of it.
    ///
    /// # Errors
    /// As [`Packed::of`].
    pub(super) fn made(&self, name: String, tensor: Tensor, file: &Path) -> Result<Vec<(String, Tensor)>> {
        Ok(match Packed::of(&tensor, self.format(&name), &name, file)? {
            Some(packed) => packed.tensors(&name)?.to_vec(),
            None => vec![(name, tensor)],
        })
    }
}
