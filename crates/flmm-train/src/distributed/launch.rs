//! What launchers tell a process about its place.

use std::str::FromStr;

use flmm::{Error, Result};

use super::{Communicator, Single};

/// torchrun's variables. Slurm jobs and Kubernetes' PyTorchJob set the same ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// `RANK`
    pub rank: usize,
    /// `LOCAL_RANK`: the number among the ranks of this machine, and so of its device.
    pub local_rank: usize,
    /// `WORLD_SIZE`
    pub world: usize,
    /// `MASTER_ADDR:MASTER_PORT`
    pub master: Option<String>,
}

impl Launch {
    /// Reads the variables through `variable`; `None` when there is no `WORLD_SIZE`.
    ///
    /// # Errors
    /// [`Error::Request`] naming the variable that is missing, no number, or out of range.
    pub fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        fn number<T: FromStr>(name: &str, text: &str) -> Result<T> {
            text.trim().parse().map_err(|_| wrong(format!("{name} is `{text}`, expected a number")))
        }
        let Some(world) = variable("WORLD_SIZE") else { return Ok(None) };
        let world: usize = number("WORLD_SIZE", &world)?;
        let rank = match variable("RANK") {
            Some(rank) => number("RANK", &rank)?,
            None if world <= 1 => 0,
            None => return Err(wrong(format!("WORLD_SIZE is {world}, but RANK is not set"))),
        };
        let local_rank = variable("LOCAL_RANK").map_or(Ok(rank), |text| number("LOCAL_RANK", &text))?;
        if rank >= world {
            return Err(wrong(format!("RANK is {rank}, expected a number below WORLD_SIZE, {world}")));
        }
        let master = match (variable("MASTER_ADDR"), variable("MASTER_PORT")) {
            (Some(address), Some(port)) => {
                Some(format!("{address}:{}", number::<u16>("MASTER_PORT", &port)?))
            }
            _ => None,
        };
        Ok(Some(Self { rank, local_rank, world, master }))
    }
}

fn wrong(what: String) -> Error {
    Error::request(what, "torchrun, mpirun and srun set these variables; see docs/distributed.md")
}

/// The ranks this process was started with: several through MPI where this build has it, else one.
///
/// # Errors
/// [`Error::Request`] if a launcher has started several processes and they have no way to talk, so that they do not
/// all train the same head into the same folder.
pub fn from_env() -> Result<Box<dyn Communicator>> {
    let variable = |name: &str| std::env::var(name).ok();
    let launch = Launch::read(variable)?;
    let counts = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS"].into_iter().filter_map(variable);
    let started_by_mpi = counts.filter_map(|count| count.parse().ok()).max().unwrap_or(1);
    let world = launch.as_ref().map_or(1, |launch| launch.world).max(started_by_mpi);
    if world == 1 {
        return Ok(Box::new(Single));
    }
    #[cfg(feature = "mpi")]
    {
        super::Mpi::start(world).map(|mpi| Box::new(mpi) as Box<dyn Communicator>)
    }
    #[cfg(not(feature = "mpi"))]
    Err(Error::request(
        format!("{world} processes were started, but this build has no way to let them talk"),
        "build with `--features mpi` and start with mpirun or srun; see docs/distributed.md",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<Launch>> {
        Launch::read(|name| variables.iter().find(|(known, _)| *known == name).map(|(_, v)| (*v).to_owned()))
    }

    #[test]
    fn torchruns_variables() {
        assert_eq!(read(&[]).unwrap(), None);
        let all = [
            ("RANK", "5"),
            ("LOCAL_RANK", "1"),
            ("WORLD_SIZE", "8"),
            ("MASTER_ADDR", "10.0.0.1"),
            ("MASTER_PORT", "29500"),
        ];
        let master = Some("10.0.0.1:29500".to_owned());
        assert_eq!(read(&all).unwrap(), Some(Launch { rank: 5, local_rank: 1, world: 8, master }));
        assert_eq!(read(&[("WORLD_SIZE", "1")]).unwrap().unwrap().rank, 0);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let message = |variables: &[(&str, &str)]| read(variables).unwrap_err().to_string();
        assert!(message(&[("WORLD_SIZE", "two")]).contains("WORLD_SIZE is `two`"));
        assert!(message(&[("WORLD_SIZE", "2")]).contains("RANK is not set"));
        assert!(message(&[("WORLD_SIZE", "2"), ("RANK", "2")]).contains("below WORLD_SIZE"));
        let port = [("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "x")];
        assert!(message(&port).contains("MASTER_PORT"));
    }
}
