//! Data-parallel training steps: one thread per worker, gradients summed.

use anyhow::{Result, bail};
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::store::Grads;

/// Threads that compute a step's parts beside one another.
///
/// Small models gain nothing from a parallel matrix product, so each worker is a pool of one thread, in which whatever
/// is written for many threads runs in order. In the common pool, workers would wait for one another.
pub(crate) struct Workers(Vec<ThreadPool>);

impl Workers {
    /// `count` of them.
    pub(crate) fn new(count: usize) -> Result<Self> {
        let pools = (0..count).map(|_| ThreadPoolBuilder::new().num_threads(1).build());
        Ok(Self(pools.collect::<Result<_, _>>()?))
    }

    /// Runs `work(worker)` on all of them; returns the mean loss and every worker's gradients.
    pub(crate) fn gradients(
        &self,
        work: impl Fn(usize) -> Result<(f64, Grads)> + Sync,
    ) -> Result<(f64, Vec<Grads>)> {
        let work = &work;
        let results: Vec<Result<(f64, Grads)>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..)
                .zip(&self.0)
                .map(|(worker, pool)| scope.spawn(move || pool.install(|| work(worker))))
                .collect();
            threads.into_iter().map(|t| t.join().unwrap_or_else(|_| bail!("a worker panicked"))).collect()
        });
        let (mut loss, mut grads) = (0.0, Vec::new());
        for result in results {
            let (value, gradients) = result?;
            loss += value / self.0.len() as f64;
            grads.push(gradients);
        }
        Ok((loss, grads))
    }
}
