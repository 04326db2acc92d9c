//! What launchers tell a process about its place.

use candle_core::Device;
use flmm::{Error, Result};

use super::{Communicator, Single};

/// Variables in which MPI's launchers tell the number of processes: Open MPI's, MPICH's and Slurm's `--mpi=pmi2`, and
/// Intel's.
const MPI_COUNTS: [&str; 3] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS"];
/// Set by srun in the tasks it starts, and not in the batch script around it.
const SLURM_COUNT: &str = "SLURM_STEP_NUM_TASKS";
/// Set by every PMIx launcher, none of which tells the number of processes.
const PMIX: [&str; 2] = ["PMIX_RANK", "PMIX_NAMESPACE"];

/// How many processes were started together, this one included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Started {
    /// So many.
    Count(usize),
    /// Perhaps several: only MPI itself knows.
    Unknown,
}

/// Reads launchers' variables through `variable`.
///
/// # Errors
/// [`Error::Request`] naming the variable that is missing, no number, or out of range.
fn started(variable: impl Fn(&str) -> Option<String>) -> Result<Started> {
    let count = |name: &str| variable(name).map(|text| number(name, &text)).transpose();
    let torchrun = count("WORLD_SIZE")?;
    if let Some(world) = torchrun {
        match count("RANK")? {
            Some(rank) if rank >= world => {
                return Err(wrong(format!("RANK is {rank}, expected a number below WORLD_SIZE, {world}")));
            }
            None if world > 1 => return Err(wrong(format!("WORLD_SIZE is {world}, but RANK is not set"))),
            _ => {}
        }
    }
    let mut mpi = None;
    for name in MPI_COUNTS {
        mpi = mpi.max(count(name)?);
    }
    // mpirun inside Slurm starts one helper per machine through srun: MPI's own count comes first.
    let launcher = match mpi {
        Some(count) => Some(count),
        None => count(SLURM_COUNT)?,
    };
    Ok(match torchrun.max(launcher) {
        Some(count) => Started::Count(count.max(1)),
        None if PMIX.iter().any(|name| variable(name).is_some()) => Started::Unknown,
        None => Started::Count(1),
    })
}

fn number(name: &str, text: &str) -> Result<usize> {
    text.trim().parse().map_err(|_| wrong(format!("{name} is `{text}`, expected a number")))
}

fn wrong(what: String) -> Error {
    Error::request(what, "launchers set these variables; see docs/distributed.md")
}

/// The ranks this process was started with, which trains on `device`: several through NCCL on CUDA and through MPI, where
/// this build has them, else one.
///
/// # Errors
/// [`Error::Request`] if a launcher has started several processes and they have no way to talk, so that they do not
/// all train the same head into the same folder.
pub fn from_env(device: &Device) -> Result<Box<dyn Communicator>> {
    let variable = |name: &str| std::env::var(name).ok();
    let started = started(variable)?;
    if started == Started::Count(1) {
        return Ok(Box::new(Single));
    }
    #[cfg(feature = "nccl")]
    if device.is_cuda() {
        let told = |name: &str| {
            let text =
                variable(name).ok_or_else(|| wrong(format!("{name} is not set, and NCCL needs it")))?;
            number(name, &text)
        };
        let (rank, world) = (told("RANK")?, told("WORLD_SIZE")?);
        let meeting = super::meeting::Meeting::from_variables(variable)?;
        return Ok(Box::new(super::Nccl::start(rank, world, device, &meeting)?));
    }
    #[cfg(feature = "mpi")]
    {
        let expected = match started {
            Started::Count(count) => Some(count),
            Started::Unknown => None,
        };
        super::Mpi::start(expected).map(|mpi| Box::new(mpi) as Box<dyn Communicator>)
    }
    #[cfg(not(feature = "mpi"))]
    {
        let what = match started {
            Started::Count(count) => format!("{count} processes were started"),
            Started::Unknown => {
                format!("a PMIx launcher has started this process ({} is set)", PMIX.join(" or "))
            }
        };
        Err(Error::request(
            format!("{what}, but this build has no way to let processes talk"),
            match device.is_cpu() {
                true => "build with `--features mpi` and start with mpirun or srun; see docs/distributed.md",
                false => "build with `--features nccl` and start with torchrun; see docs/distributed.md",
            },
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Started> {
        started(|name| variables.iter().find(|(known, _)| *known == name).map(|(_, v)| (*v).to_owned()))
    }

    #[test]
    fn launchers_tell_how_many_there_are() {
        let count = |variables: &[(&str, &str)]| read(variables).unwrap();
        assert_eq!(count(&[]), Started::Count(1));
        assert_eq!(count(&[("RANK", "5"), ("WORLD_SIZE", "8")]), Started::Count(8));
        assert_eq!(count(&[("WORLD_SIZE", "1")]), Started::Count(1));
        assert_eq!(count(&[("OMPI_COMM_WORLD_SIZE", "4"), ("PMIX_RANK", "1")]), Started::Count(4));
        assert_eq!(count(&[("PMI_SIZE", "2")]), Started::Count(2));
        assert_eq!(
            count(&[("SLURM_STEP_NUM_TASKS", "8"), ("PMIX_NAMESPACE", "slurm.7.0")]),
            Started::Count(8)
        );
        // A batch script and an interactive shell are no ranks.
        assert_eq!(count(&[("SLURM_NTASKS", "8")]), Started::Count(1));
        assert_eq!(count(&[("SLURM_STEP_NUM_TASKS", "1")]), Started::Count(1));
        // mpirun with one process, whose helpers srun has started on two machines.
        assert_eq!(count(&[("OMPI_COMM_WORLD_SIZE", "1"), ("SLURM_STEP_NUM_TASKS", "2")]), Started::Count(1));
        assert_eq!(count(&[("PMIX_RANK", "0")]), Started::Unknown);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let message = |variables: &[(&str, &str)]| read(variables).unwrap_err().to_string();
        assert!(message(&[("WORLD_SIZE", "two")]).contains("WORLD_SIZE is `two`"));
        assert!(message(&[("WORLD_SIZE", "2")]).contains("RANK is not set"));
        assert!(message(&[("WORLD_SIZE", "2"), ("RANK", "2")]).contains("below WORLD_SIZE"));
        assert!(message(&[("SLURM_STEP_NUM_TASKS", "x")]).contains("SLURM_STEP_NUM_TASKS is `x`"));
    }
}
