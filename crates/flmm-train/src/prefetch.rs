//! Reading ahead: several threads make samples, one takes them in order.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, Scope};

type Made<T> = std::thread::Result<T>;

struct State<J, T> {
    jobs: J,
    /// Number of the next job to hand out.
    next: u64,
    /// Number of the result that is taken next.
    wanted: u64,
    made: BTreeMap<u64, Made<T>>,
    /// Set when jobs run out or nobody takes results any more.
    jobs_ended: bool,
    stopped: bool,
}

/// A queue of jobs whose results come out in the order of the jobs, whichever thread made them.
pub(crate) struct Prefetch<J, T> {
    state: Mutex<State<J, T>>,
    changed: Condvar,
    /// Jobs handed out before the first of them is taken.
    window: u64,
}

impl<J: Iterator + Send, T: Send> Prefetch<J, T> {
    /// Results of at most `window` jobs are waiting or being made at a time.
    pub(crate) fn new(jobs: J, window: usize) -> Self {
        let state =
            State { jobs, next: 0, wanted: 0, made: BTreeMap::new(), jobs_ended: false, stopped: false };
        Self { state: Mutex::new(state), changed: Condvar::new(), window: window.max(1) as u64 }
    }

    /// Starts `threads` threads that do `work`; they end when the jobs do, or with [`Prefetch::stop`].
    pub(crate) fn start<'scope, 'env>(
        &'env self,
        scope: &'scope Scope<'scope, 'env>,
        threads: usize,
        stack: usize,
        work: impl Fn(J::Item) -> T + Send + Clone + 'env,
    ) -> std::io::Result<()>
    where
        J: 'env,
        T: 'env,
    {
        for number in 0..threads.max(1) {
            let work = work.clone();
            let thread = Builder::new().name(format!("samples {number}")).stack_size(stack);
            thread.spawn_scoped(scope, move || {
                while let Some((number, job)) = self.next_job() {
                    let made = catch_unwind(AssertUnwindSafe(|| work(job)));
                    self.lock().made.insert(number, made);
                    self.changed.notify_all();
                }
            })?;
        }
        Ok(())
    }

    /// The next result; `None` after the last one. A panic of its thread continues here.
    pub(crate) fn take(&self) -> Option<T> {
        let mut state = self.lock();
        loop {
            let wanted = state.wanted;
            if let Some(made) = state.made.remove(&wanted) {
                state.wanted += 1;
                drop(state);
                self.changed.notify_all();
                return Some(made.unwrap_or_else(|panic| resume_unwind(panic)));
            }
            if state.stopped || (state.jobs_ended && wanted == state.next) {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets the threads end after what they are doing.
    pub(crate) fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    fn next_job(&self) -> Option<(u64, J::Item)> {
        let mut state = self.lock();
        loop {
            if state.stopped || state.jobs_ended {
                return None;
            }
            if state.next - state.wanted < self.window {
                return match state.jobs.next() {
                    Some(job) => {
                        state.next += 1;
                        Some((state.next - 1, job))
                    }
                    None => {
                        state.jobs_ended = true;
                        self.changed.notify_all();
                        None
                    }
                };
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<J, T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Stops a [`Prefetch`] when dropped, so that its threads end however the run does.
pub(crate) struct StopGuard<'a, J: Iterator + Send, T: Send>(pub(crate) &'a Prefetch<J, T>);

impl<J: Iterator + Send, T: Send> Drop for StopGuard<'_, J, T> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use super::*;

    #[test]
    fn results_come_in_order_and_not_too_far_ahead() {
        let (started, taken) = (AtomicU64::new(0), AtomicU64::new(0));
        let prefetch = Prefetch::new(0..60u64, 5);
        std::thread::scope(|scope| {
            let _stop = StopGuard(&prefetch);
            let work = |job: u64| {
                let ahead = started.fetch_add(1, Ordering::SeqCst) + 1 - taken.load(Ordering::SeqCst);
                assert!(ahead <= 6, "{ahead} ahead");
                std::thread::sleep(Duration::from_micros((job * 7919) % 700));
                job * 2
            };
            prefetch.start(scope, 3, 1 << 20, work).unwrap();
            for expected in 0..60 {
                assert_eq!(prefetch.take(), Some(expected * 2));
                taken.fetch_add(1, Ordering::SeqCst);
            }
            assert_eq!(prefetch.take(), None);
        });
    }

    #[test]
    fn stopping_early_ends_the_threads() {
        let prefetch = Prefetch::new(0.., 4);
        std::thread::scope(|scope| {
            let _stop = StopGuard(&prefetch);
            prefetch.start(scope, 2, 1 << 20, |job: u64| job).unwrap();
            assert_eq!(prefetch.take(), Some(0));
        });
    }

    #[test]
    #[should_panic(expected = "third")]
    fn a_panic_reaches_the_taker() {
        let prefetch = Prefetch::new(0.., 4);
        std::thread::scope(|scope| {
            let _stop = StopGuard(&prefetch);
            prefetch.start(scope, 2, 1 << 20, |job: u64| assert!(job != 3, "third")).unwrap();
            while prefetch.take().is_some() {}
        });
    }
}
