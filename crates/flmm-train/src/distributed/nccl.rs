//! Ranks that are processes with a GPU each, started by torchrun or whatever sets its variables.

use candle_core::{Device, Tensor};
use flmm::{Error, Result};
use flmm_cuda::nccl::{Group, id};

use super::Communicator;
use super::meeting::{Meeting, meet};

/// The processes of one job, whose gradients are added on their GPUs.
///
/// When a process dies, torchrun ends the others; NCCL itself would wait.
pub struct Nccl {
    group: Group,
    device: Device,
}

impl Nccl {
    /// Joins the job as `rank` of `world` with `device`; rank 0 tells the others NCCL's id at `meeting`.
    ///
    /// # Errors
    /// [`Error::Request`] if the others do not come, or NCCL cannot start.
    pub(super) fn start(rank: usize, world: usize, device: &Device, meeting: &Meeting) -> Result<Self> {
        let own = (rank == 0).then(id).transpose().map_err(failed)?;
        let id = meet(meeting, own, world)?;
        Ok(Self { group: Group::join(device, rank, world, id).map_err(failed)?, device: device.clone() })
    }
}

fn failed(error: candle_core::Error) -> Error {
    Error::request(error.to_string(), "NCCL_DEBUG=INFO tells why; libnccl.so.2 must be found (docs/cuda.md)")
}

impl Communicator for Nccl {
    fn rank(&self) -> usize {
        self.group.rank()
    }

    fn world(&self) -> usize {
        self.group.world()
    }

    fn all_reduce_sum(&self, values: &mut [f32]) -> Result<()> {
        let there = Tensor::from_slice(values, values.len(), &self.device)?;
        values.copy_from_slice(&self.all_reduce_tensor(&there)?.to_vec1()?);
        Ok(())
    }

    fn all_reduce_tensor(&self, values: &Tensor) -> Result<Tensor> {
        self.group.sum(values).map_err(failed)
    }

    fn broadcast(&self, bytes: &mut [u8], root: usize) -> Result<()> {
        self.group.broadcast(bytes, root).map_err(failed)
    }
}
