//! Ranks that are processes with a GPU each, started by torchrun or whatever sets its variables.

use candle_core::cuda::cudarc::nccl::safe::{Comm, Id, ReduceOp};
use candle_core::cuda::{CudaDevice, CudaStorage};
use candle_core::op::BackpropOp;
use candle_core::{Device, Storage, Tensor};
use flmm::{Error, Result};

use super::Communicator;
use super::meeting::{Meeting, meet};

/// The processes of one job, whose gradients are added on their GPUs.
///
/// When a process dies, torchrun ends the others; NCCL itself would wait.
pub struct Nccl {
    communicator: Comm,
    device: CudaDevice,
}

impl Nccl {
    /// Joins the job as `rank` of `world` with `device`; rank 0 tells the others NCCL's id at `meeting`.
    ///
    /// # Errors
    /// [`Error::Request`] if the others do not come, or NCCL cannot start.
    pub(super) fn start(rank: usize, world: usize, device: &Device, meeting: &Meeting) -> Result<Self> {
        let device = device.as_cuda_device()?.clone();
        let id = match rank {
            0 => Some(Id::new().map_err(|e| failed("make an id", &e))?.internal().map(|byte| byte as u8)),
            _ => None,
        };
        let id = meet(meeting, id, world)?;
        let id = Id::uninit(id.map(|byte| byte as std::ffi::c_char));
        let communicator = Comm::from_rank(device.cuda_stream(), rank, world, id);
        Ok(Self { communicator: communicator.map_err(|e| failed("start", &e))?, device })
    }
}

fn failed(what: &str, error: &candle_core::cuda::cudarc::nccl::result::NcclError) -> Error {
    Error::request(
        format!("NCCL could not {what}: {error:?}"),
        "NCCL_DEBUG=INFO tells why; libnccl.so.2 must be found (docs/cuda.md)",
    )
}

impl Communicator for Nccl {
    fn rank(&self) -> usize {
        self.communicator.rank()
    }

    fn world(&self) -> usize {
        self.communicator.world_size()
    }

    fn all_reduce_sum(&self, values: &mut [f32]) -> Result<()> {
        let mut there = self.device.clone_htod(&*values)?;
        self.communicator
            .all_reduce_in_place(&mut there, &ReduceOp::Sum)
            .map_err(|e| failed("add gradients", &e))?;
        Ok(self.device.memcpy_dtoh(&there, values)?)
    }

    fn all_reduce_tensor(&self, values: &Tensor) -> Result<Tensor> {
        let values = values.contiguous()?;
        let (storage, layout) = values.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else {
            return Err(candle_core::Error::msg("NCCL adds tensors on CUDA devices").into());
        };
        let from = storage.as_cuda_slice::<f32>()?;
        let from = from.slice(layout.start_offset()..layout.start_offset() + values.elem_count());
        let mut sum = self.device.alloc_zeros::<f32>(values.elem_count())?;
        self.communicator
            .all_reduce(&from, &mut sum, &ReduceOp::Sum)
            .map_err(|e| failed("add gradients", &e))?;
        let sum = Storage::Cuda(CudaStorage::wrap_cuda_slice(sum, self.device.clone()));
        Ok(Tensor::from_storage(sum, values.shape(), BackpropOp::none(), false))
    }

    fn broadcast(&self, bytes: &mut [u8], root: usize) -> Result<()> {
        // NCCL knows no empty messages.
        if bytes.is_empty() {
            return Ok(());
        }
        let mut there = self.device.clone_htod(&*bytes)?;
        self.communicator
            .broadcast_in_place(&mut there, root as i32)
            .map_err(|e| failed("tell the ranks something", &e))?;
        Ok(self.device.memcpy_dtoh(&there, bytes)?)
    }
}
