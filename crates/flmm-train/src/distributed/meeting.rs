//! How ranks learn the id of the group that they are to form: rank 0 tells it to whoever connects.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use flmm::{Error, Result};

/// Bytes of an id; NCCL's.
const ID: usize = 128;

/// Where and how long ranks wait for one another.
#[derive(Debug, Clone)]
pub(super) struct Meeting {
    /// Host of rank 0.
    pub(super) host: String,
    /// A port there that is free.
    pub(super) port: u16,
    /// How long rank 0 waits for all others, and they for it.
    pub(super) patience: Duration,
}

impl Meeting {
    /// At `MASTER_ADDR`, one port above `MASTER_PORT`: torchrun keeps that one for itself.
    ///
    /// # Errors
    /// [`Error::Request`] naming the variable that is missing or wrong.
    pub(super) fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let needed = |name: &str| {
            variable(name).ok_or_else(|| {
                Error::request(format!("{name} is not set"), "torchrun sets it; see docs/distributed.md")
            })
        };
        let (host, port) = (needed("MASTER_ADDR")?, needed("MASTER_PORT")?);
        let port = port.trim().parse::<u16>().ok().and_then(|port| port.checked_add(1)).ok_or_else(|| {
            Error::request(
                format!("MASTER_PORT is `{port}`, expected a port below 65535"),
                "torchrun sets it; see docs/distributed.md",
            )
        })?;
        Ok(Self { host, port, patience: Duration::from_secs(300) })
    }
}

/// Tells `id` to the `world − 1` others, or, without one, asks rank 0 for it.
///
/// # Errors
/// [`Error::Request`] if they do not come in time, or the port cannot be used.
pub(super) fn meet(meeting: &Meeting, id: Option<[u8; ID]>, world: usize) -> Result<[u8; ID]> {
    let told = match id {
        Some(id) => tell(meeting, &id, world).map(|()| id),
        None => ask(meeting),
    };
    told.map_err(|error| {
        Error::request(
            format!("ranks could not meet at {}:{}: {error}", meeting.host, meeting.port),
            "start all ranks at about the same time; the port must be free and reachable",
        )
    })
}

fn tell(meeting: &Meeting, id: &[u8; ID], world: usize) -> std::io::Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", meeting.port))?;
    listener.set_nonblocking(true)?;
    let (end, mut told) = (Instant::now() + meeting.patience, 1);
    while told < world {
        match listener.accept() {
            Ok((mut stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_write_timeout(Some(meeting.patience))?;
                // One that went away comes again.
                told += usize::from(stream.write_all(id).is_ok());
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                let what = format!("{told} of {world} ranks have come");
                return Err(std::io::Error::new(std::io::ErrorKind::TimedOut, what));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn ask(meeting: &Meeting) -> std::io::Result<[u8; ID]> {
    let end = Instant::now() + meeting.patience;
    let once = || {
        let mut stream = TcpStream::connect((meeting.host.as_str(), meeting.port))?;
        stream.set_read_timeout(Some(meeting.patience))?;
        let mut id = [0; ID];
        stream.read_exact(&mut id)?;
        Ok(id)
    };
    loop {
        match once() {
            Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(50)),
            outcome => return outcome,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn here(milliseconds: u64) -> Meeting {
        let free = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        Meeting { host: "127.0.0.1".into(), port: free, patience: Duration::from_millis(milliseconds) }
    }

    #[test]
    fn all_ranks_get_the_id_of_the_first() {
        let meeting = &here(20_000);
        let id = std::array::from_fn(|i| i as u8);
        std::thread::scope(|scope| {
            let others = [1, 2].map(|_| scope.spawn(|| meet(meeting, None, 3).unwrap()));
            std::thread::sleep(Duration::from_millis(100));
            assert_eq!(meet(meeting, Some(id), 3).unwrap(), id);
            for other in others {
                assert_eq!(other.join().unwrap(), id);
            }
        });
    }

    #[test]
    fn nobody_waits_for_ever() {
        let error = meet(&here(100), Some([0; ID]), 2).unwrap_err().to_string();
        assert!(error.contains("1 of 2 ranks"), "{error}");
        assert!(meet(&here(100), None, 2).unwrap_err().to_string().contains("could not meet"));
    }

    #[test]
    fn the_place_is_what_torchrun_says() {
        let place = |port: &'static str| {
            Meeting::from_variables(move |name| match name {
                "MASTER_ADDR" => Some("node0".into()),
                _ => Some(port.into()),
            })
        };
        let meeting = place("29500").unwrap();
        assert_eq!((meeting.host.as_str(), meeting.port), ("node0", 29501));
        assert!(place("65535").is_err() && place("x").is_err());
        assert!(Meeting::from_variables(|_| None).unwrap_err().to_string().contains("MASTER_ADDR"));
    }
}
