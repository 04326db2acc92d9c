//! Plain `f32` slices behind tensors, for fused operations (`candle_core::CustomOp1` and so on) that run on the
//! CPU.

use candle_core::{CpuStorage, DType, Layout, Result, Storage, StorageRef, Tensor, bail};

/// Whether every tensor is `f32` on the CPU, where the fused operations apply.
pub fn fusable(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|t| t.device().is_cpu() && t.dtype() == DType::F32)
}

/// The elements of a contiguous `f32` storage, in order.
pub fn elements<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else { bail!("expected a contiguous tensor") };
    Ok(&storage.as_slice::<f32>()?[start..end])
}

/// Read access to the elements of a contiguous CPU tensor for as long as it lives.
pub struct Elements<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> Elements<'a> {
    /// Access to `tensor`.
    pub fn of(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self { storage, layout }
    }

    /// The elements in order; fails unless the tensor is contiguous, `f32` and on the CPU.
    pub fn get(&self) -> Result<&[f32]> {
        match &*self.storage {
            Storage::Cpu(storage) => elements(storage, self.layout),
            _ => bail!("expected a tensor on the CPU"),
        }
    }
}
