//! Plain slices behind tensors, for fused operations (`candle_core::CustomOp1` and so on) that run on the CPU.

use candle_core::{CpuStorage, DType, Layout, Result, Storage, StorageRef, Tensor, WithDType, bail};
use half::bf16;

/// Whether every tensor is `f32` on the CPU, where the fused operations apply.
pub fn fusable(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|t| t.device().is_cpu() && t.dtype() == DType::F32)
}

/// Whether every tensor is `bf16` on the CPU and needs no gradient: frozen layers, which [`flmm_kernels`] computes.
pub fn frozen_bf16(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|t| t.device().is_cpu() && t.dtype() == DType::BF16 && !t.track_op())
}

/// The elements of a contiguous `f32` storage, in order.
pub fn elements<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    elements_as(storage, layout)
}

/// The elements of a contiguous storage of type `T`, in order.
fn elements_as<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let Some((start, end)) = layout.contiguous_offsets() else { bail!("expected a contiguous tensor") };
    Ok(&storage.as_slice::<T>()?[start..end])
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
        self.get_as()
    }

    /// As [`Elements::get`], for elements of type `T`.
    pub fn get_as<T: WithDType>(&self) -> Result<&[T]> {
        elements_as(self.cpu()?, self.layout)
    }

    /// The elements from the first to the last of a tensor `[heads, rows, columns]` whose heads are contiguous, and the
    /// distance from one head to the next.
    pub fn heads<T: WithDType>(&self) -> Result<(&[T], usize)> {
        let (heads, rows, columns) = self.layout.shape().dims3()?;
        let &[stride, row, column] = self.layout.stride() else { bail!("expected three axes") };
        if row != columns || column != 1 {
            bail!("expected contiguous heads");
        }
        let len = heads.saturating_sub(1) * stride + rows * columns;
        Ok((&self.cpu()?.as_slice::<T>()?[self.layout.start_offset()..][..len], stride))
    }

    fn cpu(&self) -> Result<&CpuStorage> {
        match &*self.storage {
            Storage::Cpu(storage) => Ok(storage),
            _ => bail!("expected a tensor on the CPU"),
        }
    }
}

/// `f(x, y)` for the elements of `x` and a `y` of the same shape, which it fills; see [`frozen_bf16`].
pub fn with_bf16(x: &Tensor, f: impl FnOnce(&[bf16], &mut [bf16]) -> Result<()>) -> Result<Tensor> {
    let x = x.contiguous()?;
    let elements = Elements::of(&x);
    let mut y = bytemuck::zeroed_vec(x.elem_count());
    f(elements.get_as()?, &mut y)?;
    Tensor::from_vec(y, x.shape(), x.device())
}

/// `f(x, other, y)` for the elements of two tensors of one shape and a `y` that it fills; `None` if they differ in shape or
/// are not [`frozen_bf16`].
pub fn zip_bf16(
    x: &Tensor,
    other: &Tensor,
    f: impl FnOnce(&[bf16], &[bf16], &mut [bf16]),
) -> Result<Option<Tensor>> {
    if !frozen_bf16(&[x, other]) || x.dims() != other.dims() {
        return Ok(None);
    }
    let other = other.contiguous()?;
    let other = Elements::of(&other);
    let y = with_bf16(x, |x, y| {
        f(x, other.get_as()?, y);
        Ok(())
    });
    y.map(Some)
}
