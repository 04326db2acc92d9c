//! Ranks that are threads of one process.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use flmm::{Error, Result};

use super::Communicator;

/// One of several ranks in this process.
pub struct Local {
    rank: usize,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// What the ranks brought to the present round.
    brought: Vec<Option<Vec<u8>>>,
    /// Rounds that all ranks have come to.
    rounds: u64,
    /// What was brought to the last round. It stays until all ranks have come to the next one.
    last: Arc<Vec<Vec<u8>>>,
    /// The first rank that has ended.
    gone: Option<usize>,
}

/// Ranks for `world` threads.
pub fn local(world: usize) -> Vec<Local> {
    let state = State { brought: vec![None; world], rounds: 0, last: Arc::default(), gone: None };
    let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
    (0..world).map(|rank| Local { rank, shared: shared.clone() }).collect()
}

impl Local {
    /// Everybody's bytes, by rank.
    fn exchange(&self, bytes: Vec<u8>) -> Result<Arc<Vec<Vec<u8>>>> {
        let mut state = self.state();
        state.brought[self.rank] = Some(bytes);
        let round = state.rounds;
        if state.brought.iter().all(Option::is_some) {
            state.last = Arc::new(state.brought.iter_mut().filter_map(Option::take).collect());
            state.rounds += 1;
            self.shared.changed.notify_all();
        }
        while state.rounds == round {
            if let Some(rank) = state.gone {
                return Err(Error::request(
                    format!("rank {rank} has ended while rank {} was waiting for it", self.rank),
                    "look for that rank's own message",
                ));
            }
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(state.last.clone())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Communicator for Local {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.state().brought.len()
    }

    fn all_reduce_sum(&self, values: &mut [f32]) -> Result<()> {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let all = self.exchange(bytes)?;
        values.fill(0.0);
        for bytes in all.iter() {
            let terms = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
            values.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
        }
        Ok(())
    }

    fn broadcast(&self, bytes: &mut [u8], root: usize) -> Result<()> {
        let mine = if self.rank == root { bytes.to_vec() } else { Vec::new() };
        let all = self.exchange(mine)?;
        let count = bytes.len().min(all[root].len());
        bytes[..count].copy_from_slice(&all[root][..count]);
        Ok(())
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        let mut state = self.state();
        state.gone.get_or_insert(self.rank);
        self.shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_and_broadcasts() {
        std::thread::scope(|scope| {
            for rank in local(4) {
                scope.spawn(move || {
                    for round in 0..50 {
                        let mut values = [rank.rank() as f32, round as f32];
                        rank.all_reduce_sum(&mut values).unwrap();
                        assert_eq!(values, [6.0, 4.0 * round as f32]);
                        let mut bytes = [rank.rank() as u8; 3];
                        rank.broadcast(&mut bytes, round % 4).unwrap();
                        assert_eq!(bytes, [(round % 4) as u8; 3]);
                    }
                });
            }
        });
    }

    #[test]
    fn a_rank_that_ends_lets_the_others_go() {
        let mut ranks = local(3);
        drop(ranks.pop());
        std::thread::scope(|scope| {
            for rank in ranks {
                scope.spawn(move || {
                    let error = rank.broadcast(&mut [0], 0).unwrap_err().to_string();
                    assert!(error.contains("rank 2 has ended"), "{error}");
                });
            }
        });
    }
}
