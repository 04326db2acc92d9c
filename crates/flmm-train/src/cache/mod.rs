//! The feature cache: what the frozen models saw of every sample, kept on the disk.
//!
//! The LMM and the SAM image encoder are frozen and pictures are not augmented, so after the first epoch neither is
//! needed: attention maps, hidden states and SAM embeddings are read back instead. [`CachedSamples`] wraps any
//! samples; [`FeatureCache`] is the folder. Records are checksummed, shards are memory-mapped and only ever grow, and
//! a cache of another LMM, prompt or version is refused. The format is described in `docs/feature-cache.md`.

mod key;
mod record;
mod samples;
mod shard;
mod store;
mod writer;

pub use key::{CacheKey, MapValues, Rows, Values};
pub use samples::{CachedSamples, Estimate, Filled};
pub use store::{CacheOptions, Contents, FeatureCache};
