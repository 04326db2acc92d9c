//! NCCL's communicator, as threads may share it.

use std::sync::{Mutex, PoisonError};

use candle_core::cuda::cudarc::nccl::result::NcclError;
use candle_core::cuda::cudarc::nccl::safe::{Comm, Id, ReduceOp};
use candle_core::cuda::{CudaDevice, CudaStorage};
use candle_core::op::BackpropOp;
use candle_core::{Device, Error, Result, Storage, Tensor};

/// Bytes of the id that the ranks of a group share.
pub const ID: usize = 128;

/// A new id, for one rank to tell the others.
///
/// # Errors
/// What NCCL says.
pub fn id() -> Result<[u8; ID]> {
    Ok(Id::new().map_err(|error| failed(&error))?.internal().map(|byte| byte as u8))
}

/// The ranks of one job, each with a device of its own.
pub struct Group {
    communicator: Mutex<Owned>,
    device: CudaDevice,
    rank: usize,
    world: usize,
}

struct Owned(Comm);

// SAFETY: NCCL takes calls from any thread of the process as long as they do not come at the same time; the mutex around
// it sees to that.
#[allow(unsafe_code)]
unsafe impl Send for Owned {}

impl Group {
    /// Joins as `rank` of `world`; waits until all have come.
    ///
    /// # Errors
    /// What NCCL says; `device` is not CUDA's.
    pub fn join(device: &Device, rank: usize, world: usize, id: [u8; ID]) -> Result<Self> {
        let device = device.as_cuda_device()?.clone();
        let id = Id::uninit(id.map(|byte| byte as std::ffi::c_char));
        let communicator = Comm::from_rank(device.cuda_stream(), rank, world, id);
        let communicator = Mutex::new(Owned(communicator.map_err(|error| failed(&error))?));
        Ok(Self { communicator, device, rank, world })
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of ranks.
    pub fn world(&self) -> usize {
        self.world
    }

    fn with<T>(&self, call: impl FnOnce(&Comm) -> std::result::Result<T, NcclError>) -> Result<T> {
        let communicator = self.communicator.lock().unwrap_or_else(PoisonError::into_inner);
        call(&communicator.0).map_err(|error| failed(&error))
    }

    /// Adds the f32 tensors of all ranks, which lie on their devices; so does the sum.
    ///
    /// # Errors
    /// What NCCL and the driver say; a tensor elsewhere or of another type.
    pub fn sum(&self, values: &Tensor) -> Result<Tensor> {
        let values = values.contiguous()?;
        let (storage, layout) = values.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else {
            return Err(Error::msg("NCCL adds tensors on CUDA devices"));
        };
        let (start, count) = (layout.start_offset(), values.elem_count());
        let from = storage.as_cuda_slice::<f32>()?.slice(start..start + count);
        let mut sum = self.device.alloc_zeros::<f32>(count)?;
        self.with(|communicator| communicator.all_reduce(&from, &mut sum, &ReduceOp::Sum))?;
        let sum = Storage::Cuda(CudaStorage::wrap_cuda_slice(sum, self.device.clone()));
        Ok(Tensor::from_storage(sum, values.shape(), BackpropOp::none(), false))
    }

    /// Replaces `bytes` by those of rank `root`.
    ///
    /// # Errors
    /// What NCCL and the driver say.
    pub fn broadcast(&self, bytes: &mut [u8], root: usize) -> Result<()> {
        // The driver allocates nothing that is empty.
        if bytes.is_empty() {
            return Ok(());
        }
        let mut there = self.device.clone_htod(&*bytes)?;
        self.with(|communicator| communicator.broadcast_in_place(&mut there, root as i32))?;
        bytes.copy_from_slice(&self.device.clone_dtoh(&there)?);
        Ok(())
    }
}

fn failed(error: &NcclError) -> Error {
    Error::msg(format!("NCCL: {error:?}"))
}
