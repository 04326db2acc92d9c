//! Sessions whose pictures have been looked at, kept for the next question about the same pictures.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use flmm::grounder::Session;
use metrics::{counter, gauge};
use sha2::{Digest, Sha256};

/// Name of the pictures of a conversation: SHA-256 of the SHA-256 of each, in their order.
pub(crate) type Key = [u8; 32];

/// The key of pictures as they were sent.
pub(crate) fn key<'a>(pictures: impl IntoIterator<Item = &'a [u8]>) -> Key {
    let mut all = Sha256::new();
    pictures.into_iter().for_each(|picture| all.update(Sha256::digest(picture)));
    all.finalize().into()
}

/// Idle sessions, least recently used first, within a bound on their memory.
///
/// A session is taken out while it is used, so two questions at a time about one picture have two sessions.
#[derive(Debug)]
pub(crate) struct Prefixes {
    idle: Mutex<Idle>,
    bound: usize,
}

#[derive(Debug, Default)]
struct Idle {
    sessions: VecDeque<(Key, usize, Session)>,
    bytes: usize,
}

impl Idle {
    fn tell(&self) {
        gauge!("flmm_prefix_cache_bytes").set(self.bytes as f64);
        gauge!("flmm_prefix_cache_sessions").set(self.sessions.len() as f64);
    }
}

impl Prefixes {
    /// Nothing yet; at most `bound` bytes.
    pub(crate) fn new(bound: usize) -> Self {
        Self { idle: Mutex::default(), bound }
    }

    /// The session about these pictures that was used last.
    pub(crate) fn take(&self, key: &Key) -> Option<Session> {
        let mut idle = self.lock();
        let place = idle.sessions.iter().rposition(|(known, ..)| known == key);
        let found = place.and_then(|place| idle.sessions.remove(place));
        counter!("flmm_prefix_cache_total", "result" => if found.is_some() { "hit" } else { "miss" })
            .increment(1);
        let (_, bytes, session) = found?;
        idle.bytes -= bytes;
        idle.tell();
        Some(session)
    }

    /// Keeps a session; the least recently used ones make room.
    pub(crate) fn put(&self, key: Key, session: Session) {
        let bytes = session.bytes();
        let mut dropped = Vec::new();
        let mut idle = self.lock();
        if bytes <= self.bound {
            idle.bytes += bytes;
            idle.sessions.push_back((key, bytes, session));
        }
        while idle.bytes > self.bound
            && let Some((_, bytes, session)) = idle.sessions.pop_front()
        {
            idle.bytes -= bytes;
            dropped.push(session);
        }
        idle.tell();
        counter!("flmm_prefix_cache_evicted_total").increment(dropped.len() as u64);
        // Memory is given back outside the lock.
        drop(idle);
    }

    fn lock(&self) -> MutexGuard<'_, Idle> {
        // A panic elsewhere leaves the list whole: every change above is complete before the lock is let go.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
