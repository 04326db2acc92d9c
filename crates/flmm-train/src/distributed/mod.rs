//! Data-parallel training: every rank computes the gradients of its share of each batch, and all take the same step.
//!
//! A rank is one process (or, in tests, one thread). [`from_env`] joins the ranks that a launcher has started; how they
//! talk is a [`Communicator`]. `docs/distributed.md` has launch lines.

mod launch;
mod local;
#[cfg(any(test, feature = "nccl"))]
mod meeting;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "nccl")]
mod nccl;

use candle_core::Tensor;
use flmm::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use launch::from_env;
pub use local::{Local, local};
#[cfg(feature = "mpi")]
pub use mpi::Mpi;
#[cfg(feature = "nccl")]
pub use nccl::Nccl;

/// How the ranks of one run talk. Every rank makes the same calls in the same order.
///
/// Every call fails, and does not wait for ever, when another rank has ended.
pub trait Communicator: Send + Sync {
    /// This rank, `0 ≤ rank < world`.
    fn rank(&self) -> usize;

    /// The number of ranks.
    fn world(&self) -> usize;

    /// Adds `values` of all ranks element by element; every rank gets the sum, the same bits.
    fn all_reduce_sum(&self, values: &mut [f32]) -> Result<()>;

    /// As [`Communicator::all_reduce_sum`], for an f32 tensor `[n]` wherever it is; the sum is there too.
    fn all_reduce_tensor(&self, values: &Tensor) -> Result<Tensor> {
        let mut sum = values.to_vec1::<f32>()?;
        self.all_reduce_sum(&mut sum)?;
        Ok(Tensor::from_vec(sum, values.shape(), values.device())?)
    }

    /// Replaces `bytes` by those of rank `root`; all ranks give equally many.
    fn broadcast(&self, bytes: &mut [u8], root: usize) -> Result<()>;
}

/// One rank on its own.
#[derive(Debug, Clone, Copy, Default)]
pub struct Single;

impl Communicator for Single {
    fn rank(&self) -> usize {
        0
    }

    fn world(&self) -> usize {
        1
    }

    fn all_reduce_sum(&self, _: &mut [f32]) -> Result<()> {
        Ok(())
    }

    fn broadcast(&self, _: &mut [u8], _: usize) -> Result<()> {
        Ok(())
    }
}

/// What rank `root` has (the others' `value` is not looked at), on every rank.
pub(crate) fn share<T: Serialize + DeserializeOwned>(
    communicator: &dyn Communicator,
    value: &T,
    root: usize,
) -> Result<T> {
    let mine = serde_json::to_vec(value).map_err(|e| garbled(&e))?;
    let mut length = (mine.len() as u64).to_le_bytes();
    communicator.broadcast(&mut length, root)?;
    let mut bytes = mine;
    bytes.resize(u64::from_le_bytes(length) as usize, 0);
    communicator.broadcast(&mut bytes, root)?;
    serde_json::from_slice(&bytes).map_err(|e| garbled(&e))
}

/// A value, or the text and the hint of an error.
type Told<T> = std::result::Result<T, [String; 2]>;

/// Every rank's value, in the order of ranks.
///
/// # Errors
/// The first rank's error if any has one: so all ranks end when one does, instead of waiting for it.
pub(crate) fn gather<T: Serialize + DeserializeOwned>(
    communicator: &dyn Communicator,
    value: Result<T>,
) -> Result<Vec<T>> {
    if communicator.world() == 1 {
        return Ok(vec![value?]);
    }
    let told: Told<&T> = match &value {
        Ok(value) => Ok(value),
        Err(e) => Err([e.to_string(), e.hint().unwrap_or_default().to_owned()]),
    };
    let told = serde_json::to_value(&told).map_err(|e| garbled(&e))?;
    let mut all = Vec::with_capacity(communicator.world());
    let mut failed = None;
    for rank in 0..communicator.world() {
        let found = share(communicator, &told, rank)?;
        let found: Told<T> = serde_json::from_value(found).map_err(|e| garbled(&e))?;
        match found {
            Ok(value) => all.push(value),
            Err([what, hint]) if failed.is_none() => {
                failed = Some(Error::request(format!("rank {rank}: {what}"), hint));
            }
            Err(_) => {}
        }
    }
    match (value, failed) {
        // A rank's own error keeps its kind.
        (Err(own), _) => Err(own),
        (Ok(_), Some(other)) => Err(other),
        (Ok(_), None) => Ok(all),
    }
}

/// `own` if every rank has come through, so that all go on or all end.
///
/// # Errors
/// A rank's own error; [`Error::Request`] with that of the first rank that has one on the others.
pub fn together<T>(communicator: &dyn Communicator, own: Result<T>) -> Result<T> {
    let told =
        own.as_ref().map(drop).map_err(|e| Error::request(e.to_string(), e.hint().unwrap_or_default()));
    let others = gather(communicator, told);
    // A rank's own error keeps its kind.
    own.and_then(|own| others.map(|_| own))
}

/// What rank 0 makes, on every rank; the others make nothing.
///
/// # Errors
/// Rank 0's error.
pub(crate) fn from_first<T: Serialize + DeserializeOwned>(
    communicator: &dyn Communicator,
    make: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let own = if communicator.rank() == 0 { make().map(|made| vec![made]) } else { Ok(Vec::new()) };
    let made = gather(communicator, own)?.into_iter().flatten().next();
    made.ok_or_else(|| Error::request("rank 0 has sent nothing", "report this"))
}

fn garbled(error: &serde_json::Error) -> Error {
    Error::request(
        format!("ranks do not understand one another: {error}"),
        "start all ranks with the same program and the same configuration",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_one_rank_reaches_all() {
        let found: Vec<String> = std::thread::scope(|scope| {
            let ranks = local(3).into_iter().map(|rank| {
                scope.spawn(move || {
                    assert_eq!(gather(&rank, Ok(rank.rank() * 2)).unwrap(), [0, 2, 4]);
                    assert_eq!(share(&rank, &vec![rank.rank(); rank.rank() + 1], 2).unwrap(), [2, 2, 2]);
                    let broken = match rank.rank() {
                        1 => Err(Error::request("no picture", "look for it")),
                        _ => Ok(()),
                    };
                    gather(&rank, broken).unwrap_err().to_string()
                })
            });
            let ranks: Vec<_> = ranks.collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        assert_eq!(found, ["rank 1: no picture", "no picture", "rank 1: no picture"]);
    }

    #[test]
    fn all_go_on_or_none_and_rank_0_decides() {
        std::thread::scope(|scope| {
            for rank in local(3) {
                scope.spawn(move || {
                    assert_eq!(together(&rank, Ok(rank.rank())).unwrap(), rank.rank());
                    let made = from_first(&rank, || {
                        assert_eq!(rank.rank(), 0);
                        Ok(None::<u32>)
                    });
                    assert_eq!(made.unwrap(), None);
                    let own = match rank.rank() {
                        2 => Err(Error::io("a.txt", std::io::Error::other("torn"))),
                        _ => Ok(()),
                    };
                    let error = together(&rank, own).unwrap_err();
                    assert_eq!(matches!(error, Error::Io { .. }), rank.rank() == 2, "{error}");
                    assert!(error.to_string().ends_with("a.txt: torn"), "{error}");
                });
            }
        });
    }
}
