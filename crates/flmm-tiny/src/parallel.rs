//! Data-parallel training steps: one thread per worker, gradients summed.

use anyhow::{Result, bail};

use crate::store::Grads;

/// Runs `work(worker)` on one thread each; returns the mean loss and every worker's gradients.
///
/// Small models gain nothing from a parallel matrix product, so each worker computes on one thread: start the
/// program with `RAYON_NUM_THREADS=1`.
pub(crate) fn gradients(
    workers: usize,
    work: impl Fn(usize) -> Result<(f64, Grads)> + Sync,
) -> Result<(f64, Vec<Grads>)> {
    let results: Vec<Result<(f64, Grads)>> = std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..workers).map(|worker| scope.spawn(move || work(worker))).collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|_| bail!("a worker panicked"))).collect()
    });
    let (mut loss, mut grads) = (0.0, Vec::new());
    for result in results {
        let (value, gradients) = result?;
        loss += value / workers as f64;
        grads.push(gradients);
    }
    Ok((loss, grads))
}
