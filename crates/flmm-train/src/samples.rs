//! Where training samples come from, and in which order they are seen.

use flmm::Result;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// A set of samples that can be read in any order, from several threads.
///
/// `sample` must give the same sample for the same arguments: resuming relies on it. Sources that draw at random
/// (say, one sentence per object and epoch) derive their generator from `index` and `epoch`.
pub trait Samples<S>: Sync {
    /// The number of samples in an epoch.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Sample number `index`, `0 ≤ index < len()`, as seen in `epoch`.
    fn sample(&self, index: usize, epoch: u64) -> Result<S>;

    /// A name for that sample, for messages and caches: equal names, equal samples. Where a sample differs between
    /// epochs, what tells them apart follows a `#`.
    fn key(&self, index: usize, epoch: u64) -> String {
        format!("{index}#{epoch}")
    }
}

impl<S: Clone + Sync> Samples<S> for Vec<S> {
    fn len(&self) -> usize {
        self.as_slice().len()
    }

    fn sample(&self, index: usize, _: u64) -> Result<S> {
        Ok(self[index].clone())
    }
}

/// Samples made by a function of `(index, epoch)`, such as scenes drawn afresh every time.
pub struct FromFn<F> {
    len: usize,
    make: F,
}

/// `len` samples per epoch made by `make(index, epoch)`.
pub fn from_fn<S, F: Fn(usize, u64) -> Result<S> + Sync>(len: usize, make: F) -> FromFn<F> {
    FromFn { len, make }
}

impl<S, F: Fn(usize, u64) -> Result<S> + Sync> Samples<S> for FromFn<F> {
    fn len(&self) -> usize {
        self.len
    }

    fn sample(&self, index: usize, epoch: u64) -> Result<S> {
        (self.make)(index, epoch)
    }
}

/// The order of samples: one permutation per epoch from `seed + epoch`, wrapped around to whole batches.
#[derive(Debug, Clone, Copy)]
pub struct Order {
    /// Number of samples.
    pub len: usize,
    /// Samples per step.
    pub batch_size: usize,
    /// The run's seed.
    pub seed: u64,
}

impl Order {
    /// Steps in an epoch: `ceil(len / batch_size)`.
    pub fn steps_per_epoch(&self) -> u64 {
        self.len.div_ceil(self.batch_size.max(1)) as u64
    }

    /// The number of the step, from 1, that sees sample `index` in `epoch` first.
    pub fn step_of(&self, index: usize, epoch: u64) -> u64 {
        let place = self.permutation(epoch).iter().position(|&other| other == index).unwrap_or_default();
        epoch * self.steps_per_epoch() + (place / self.batch_size.max(1)) as u64 + 1
    }

    /// The samples from step `first` on, one by one, endlessly: `(epoch, index)`.
    pub fn samples(self, first: u64) -> impl Iterator<Item = (u64, usize)> + Send {
        self.batches(first).flat_map(|(epoch, batch)| batch.into_iter().map(move |index| (epoch, index)))
    }

    /// The batches from step `first` on, endlessly: `(epoch, indices)`.
    pub fn batches(self, first: u64) -> impl Iterator<Item = (u64, Vec<usize>)> + Send {
        let per_epoch = self.steps_per_epoch().max(1);
        let mut current: Option<(u64, Vec<usize>)> = None;
        (first..).map(move |step| {
            let (epoch, position) = (step / per_epoch, (step % per_epoch) as usize);
            if current.as_ref().is_none_or(|(known, _)| *known != epoch) {
                current = Some((epoch, self.permutation(epoch)));
            }
            let order = current.as_ref().map_or(&[][..], |(_, order)| order);
            let start = position * self.batch_size;
            let batch = (start..start + self.batch_size).map(|i| order[i % self.len]).collect();
            (epoch, batch)
        })
    }

    fn permutation(&self, epoch: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.len).collect();
        order.shuffle(&mut ChaCha8Rng::seed_from_u64(self.seed.wrapping_add(epoch)));
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_sees_every_sample_and_wraps_to_whole_batches() {
        let order = Order { len: 10, batch_size: 4, seed: 7 };
        assert_eq!(order.steps_per_epoch(), 3);
        let seen: Vec<(u64, Vec<usize>)> = order.batches(0).take(6).collect();
        for epoch in 0..2 {
            let indices: Vec<usize> =
                seen.iter().filter(|(e, _)| *e == epoch).flat_map(|(_, batch)| batch.clone()).collect();
            assert_eq!(indices.len(), 12);
            assert_eq!(indices[10..], indices[..2]);
            let mut once = indices[..10].to_vec();
            once.sort_unstable();
            assert_eq!(once, (0..10).collect::<Vec<_>>());
        }
        assert_ne!(seen[0].1, seen[3].1, "epochs are shuffled differently");
        assert_eq!(order.batches(4).next(), Some(seen[4].clone()), "starting later changes nothing");
        for (step, (epoch, batch)) in (1..).zip(&seen) {
            // The last of an epoch's steps begins again with what its first step saw.
            let new = if step % 3 == 0 { &batch[..2] } else { &batch[..] };
            assert!(new.iter().all(|&index| order.step_of(index, *epoch) == step));
        }
    }
}
