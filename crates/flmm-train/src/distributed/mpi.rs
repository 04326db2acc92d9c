//! Ranks that are processes started by mpirun or srun.

use flmm::{Error, Result};
use mpi::Threading;
use mpi::collective::SystemOperation;
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator as _, CommunicatorCollectives as _, Root as _};

use super::Communicator;

/// Elements of one reduction: MPI counts with 31 bits, and smaller pieces need smaller buffers.
const PIECE: usize = 1 << 24;

/// The processes of one MPI job.
///
/// When a process dies or panics, mpirun ends the others: that is MPI's own rule. Errors inside a process are told to
/// the others, which then all end with a message.
pub struct Mpi {
    /// Ends MPI when dropped.
    _universe: Universe,
    rank: usize,
    world: usize,
}

impl Mpi {
    /// Joins the job, which has `expected` processes where the launcher says how many.
    ///
    /// # Errors
    /// [`Error::Request`] if MPI was started before in this process, or knows of another number of processes: then
    /// the launcher is not MPI's own.
    pub fn start(expected: Option<usize>) -> Result<Self> {
        // Other threads make samples; only the training loop calls MPI.
        let (universe, _) = mpi::initialize_with_threading(Threading::Funneled).ok_or_else(|| {
            Error::request("MPI was already started in this process", "start it once per process")
        })?;
        let communicator = universe.world();
        let (rank, world) = (communicator.rank() as usize, communicator.size() as usize);
        if let Some(expected) = expected.filter(|expected| *expected != world) {
            return Err(Error::request(
                format!("{expected} processes were started, but MPI knows of {world}"),
                "start them with the mpirun (or srun --mpi) of the MPI this program was built with; torchrun does not start MPI",
            ));
        }
        Ok(Self { _universe: universe, rank, world })
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        // Ending MPI waits for all processes, and the others wait for this one.
        if std::thread::panicking() {
            SimpleCommunicator::world().abort(1);
        }
    }
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.world
    }

    fn all_reduce_sum(&self, values: &mut [f32]) -> Result<()> {
        let communicator = SimpleCommunicator::world();
        for piece in values.chunks_mut(PIECE) {
            let mine = piece.to_vec();
            communicator.all_reduce_into(&mine[..], piece, SystemOperation::sum());
        }
        Ok(())
    }

    fn broadcast(&self, bytes: &mut [u8], root: usize) -> Result<()> {
        let communicator = SimpleCommunicator::world();
        for piece in bytes.chunks_mut(PIECE) {
            communicator.process_at_rank(root as i32).broadcast_into(piece);
        }
        Ok(())
    }
}
