//! The model and the threads it runs on, apart from the threads that talk to clients.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use flmm::Grounder;
use metrics::{counter, gauge, histogram};

use crate::error::ApiError;
use crate::model::Model;
use crate::prefixes::Prefixes;

/// Pictures that may wait where nothing else is said.
const WAITING_PICTURES: usize = 64;

/// What runs on a model thread.
type Work = Box<dyn FnOnce(&Context) + Send>;

/// What a piece of work computes with.
pub(crate) struct Context<'a> {
    pub(crate) model: &'a Model,
    pub(crate) prefixes: &'a Prefixes,
    /// How long the work waited.
    pub(crate) waited: Duration,
}

/// Whether a request is still wanted.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    gone: Arc<AtomicBool>,
    deadline: Instant,
}

/// Why work stops early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Halt {
    /// Nobody waits for the answer.
    Gone,
    /// Its time is over.
    Late,
}

/// Held by whoever waits for an answer: when dropped, the work for it stops.
#[derive(Debug)]
pub(crate) struct Waiting(Arc<AtomicBool>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Wanted {
    /// Wanted for as long as `time` and the second value last.
    pub(crate) fn within(time: Duration) -> (Self, Waiting) {
        let gone = Arc::new(AtomicBool::new(false));
        (Self { gone: gone.clone(), deadline: Instant::now() + time }, Waiting(gone))
    }

    /// Fails when the work should stop.
    pub(crate) fn check(&self) -> Result<(), Halt> {
        if self.gone.load(Ordering::Relaxed) {
            return Err(Halt::Gone);
        }
        if Instant::now() >= self.deadline { Err(Halt::Late) } else { Ok(()) }
    }
}

struct Job {
    /// Image tokens.
    cost: usize,
    wanted: Wanted,
    queued: Instant,
    work: Work,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// Image tokens of all jobs that wait.
    waiting: usize,
    /// No more work is taken.
    closed: bool,
    /// Seconds that an image token's request has taken lately.
    pace: f64,
}

struct Shared {
    queue: Mutex<Queue>,
    arrived: Condvar,
    model: OnceLock<Model>,
    prefixes: Prefixes,
    bound: Option<usize>,
    workers: usize,
}

/// The queue to the model threads.
#[derive(Clone)]
pub(crate) struct Engine(Arc<Shared>);

impl Engine {
    /// An engine without a model, whose work is refused until there is one.
    pub(crate) fn new(workers: usize, prefix_bytes: usize, bound: Option<usize>) -> Self {
        Self(Arc::new(Shared {
            queue: Mutex::default(),
            arrived: Condvar::new(),
            model: OnceLock::new(),
            prefixes: Prefixes::new(prefix_bytes),
            bound,
            workers: workers.max(1),
        }))
    }

    /// Gives the engine its model and starts its threads.
    ///
    /// # Errors
    /// If the operating system refuses a thread.
    pub(crate) fn start(&self, name: String, grounder: Grounder) -> flmm::Result<Vec<JoinHandle<()>>> {
        let model = Model::new(name, grounder)?;
        if self.0.model.set(model).is_err() {
            return Ok(Vec::new());
        }
        let thread = |number: usize| {
            let engine = self.clone();
            let builder = std::thread::Builder::new().name(format!("model-{number}"));
            builder.spawn(move || engine.run()).map_err(|error| flmm::Error::io("model thread", error))
        };
        (0..self.0.workers).map(thread).collect()
    }

    /// The model, once it is loaded.
    ///
    /// # Errors
    /// [`ApiError`] 503 before that.
    pub(crate) fn model(&self) -> Result<&Model, ApiError> {
        self.0.model.get().ok_or_else(|| {
            let message = "the model is still being loaded";
            ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "model_loading", message)
                .hint("ask /ready, and come back when it says so")
                .retry_after(5)
        })
    }

    /// Queues work about `pictures` pictures.
    ///
    /// # Errors
    /// [`ApiError`] 503 while the model is loaded and when the server stops, 429 when too much waits.
    pub(crate) fn submit(
        &self,
        pictures: usize,
        wanted: Wanted,
        work: impl FnOnce(&Context) + Send + 'static,
    ) -> Result<(), ApiError> {
        let model = self.model()?;
        let cost = model.image_tokens.saturating_mul(pictures.max(1));
        let bound = self.0.bound.unwrap_or(model.image_tokens.saturating_mul(WAITING_PICTURES));
        let mut queue = self.lock();
        if queue.closed {
            return Err(stopping());
        }
        // A request that is larger than the bound alone may wait when nothing else does.
        if queue.waiting > 0 && queue.waiting + cost > bound {
            let seconds = queue.pace * (queue.waiting + cost) as f64 / self.0.workers as f64;
            let message = format!("{} image tokens are waiting already (limit {bound})", queue.waiting);
            return Err(ApiError::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", message)
                .hint("try again after the time in Retry-After")
                .retry_after((seconds.ceil() as u64).clamp(1, 60)));
        }
        queue.waiting += cost;
        queue.jobs.push_back(Job { cost, wanted, queued: Instant::now(), work: Box::new(work) });
        tell_depth(&queue);
        drop(queue);
        self.0.arrived.notify_one();
        Ok(())
    }

    /// Takes no more work; the threads end when what they have is done.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.0.arrived.notify_all();
    }

    /// Whether [`Engine::close`] was called.
    pub(crate) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    fn run(&self) {
        let Some(model) = self.0.model.get() else { return };
        while let Some(job) = self.next() {
            // Nobody hears what is said to a client that has gone.
            if job.wanted.check() == Err(Halt::Gone) {
                counter!("flmm_abandoned_total", "stage" => "queue").increment(1);
                continue;
            }
            let waited = job.queued.elapsed();
            histogram!("flmm_stage_seconds", "stage" => "queue").record(waited.as_secs_f64());
            let context = Context { model, prefixes: &self.0.prefixes, waited };
            let clock = Instant::now();
            // What a panicking request was computing with is dropped with it; the model itself is never changed.
            let ran = std::panic::catch_unwind(AssertUnwindSafe(|| (job.work)(&context)));
            if ran.is_err() {
                counter!("flmm_panics_total").increment(1);
                tracing::error!("a request panicked on a model thread");
            }
            let pace = clock.elapsed().as_secs_f64() / job.cost.max(1) as f64;
            let mut queue = self.lock();
            queue.pace = if queue.pace == 0.0 { pace } else { 0.9 * queue.pace + 0.1 * pace };
        }
    }

    fn next(&self) -> Option<Job> {
        let mut queue = self.lock();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                queue.waiting -= job.cost;
                tell_depth(&queue);
                return Some(job);
            }
            if queue.closed {
                return None;
            }
            queue = self.0.arrived.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Work runs outside the lock, so a panic cannot leave the queue half changed.
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The error of a server that takes no more work.
pub(crate) fn stopping() -> ApiError {
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "shutting_down", "the server is stopping").retry_after(30)
}

fn tell_depth(queue: &Queue) {
    gauge!("flmm_queue_requests").set(queue.jobs.len() as f64);
    gauge!("flmm_queue_image_tokens").set(queue.waiting as f64);
}
