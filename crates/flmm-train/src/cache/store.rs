//! A folder of shards: what is in it, reading, adding.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use candle_core::Tensor;
use flmm::{Error, Result};
use flmm_data::Part;

use super::key::CacheKey;
use super::record::{Encoded, Stored, decode_picture, decode_sample, encode};
use super::shard::{EXTENSION, Entry, Kind, Shard};
use super::writer::Writer;
use crate::head::HeadSample;

/// How a cache is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheOptions {
    /// Which of several writers this process is.
    pub part: Part,
    /// A shard of at least this many bytes is completed and a new one begun.
    pub shard_bytes: u64,
}

impl Default for CacheOptions {
    fn default() -> Self {
        Self { part: Part::default(), shard_bytes: 1 << 30 }
    }
}

/// What the frozen models saw of samples, kept in a folder.
///
/// The folder holds the shards of any number of writers. Folders directly below it, links included, are read as
/// well, so that caches made on several machines join without copying. The file format is described in
/// `docs/feature-cache.md`.
pub struct FeatureCache {
    dir: PathBuf,
    key: CacheKey,
    options: CacheOptions,
    shards: RwLock<Vec<Arc<Shard>>>,
    places: RwLock<Places>,
    writing: Mutex<Writing>,
    notices: Mutex<Vec<String>>,
}

/// Shards and places of every record. The same one may be in several shards; the last is tried first.
type Places = HashMap<(Kind, String), Vec<(usize, Entry)>>;

enum Writing {
    /// Nothing was written yet; a complete cache may lie where nothing can be written.
    No,
    Yes(Writer),
    /// Another process is writing this part; nothing is written beside it.
    Taken,
    /// The disk refused; nothing is written any more.
    Refused,
}

/// Bytes of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Contents {
    /// Number of samples.
    pub samples: usize,
    /// Number of pictures.
    pub pictures: usize,
    /// Bytes of all their records.
    pub bytes: u64,
}

impl FeatureCache {
    /// Opens the cache in `dir`, which need not exist yet. Nothing is written before the first sample is added.
    ///
    /// # Errors
    /// [`Error::Config`] naming every field of the key that differs if a shard was made for something else;
    /// [`Error::Io`].
    pub fn open(dir: impl Into<PathBuf>, key: CacheKey, options: CacheOptions) -> Result<Self> {
        let cache = Self {
            dir: dir.into(),
            key,
            options,
            shards: RwLock::default(),
            places: RwLock::default(),
            writing: Mutex::new(Writing::No),
            notices: Mutex::default(),
        };
        for path in shards_in(&cache.dir)? {
            cache.add_shard(&path)?;
        }
        Ok(cache)
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What its numbers depend on.
    pub fn key(&self) -> &CacheKey {
        &self.key
    }

    /// How much is in it.
    pub fn contents(&self) -> Contents {
        let places = self.places.read().unwrap_or_else(PoisonError::into_inner);
        let mut contents = Contents::default();
        for ((kind, _), entries) in places.iter() {
            match kind {
                Kind::Sample => contents.samples += 1,
                Kind::Picture => contents.pictures += 1,
                Kind::Broken => {}
            }
            contents.bytes += entries.iter().map(|(_, entry)| entry.length).sum::<u64>();
        }
        contents
    }

    /// Whether a sample of this name is in it (it may still turn out to be damaged).
    pub fn contains(&self, sample: &str) -> bool {
        self.place(Kind::Sample, sample).is_some()
    }

    /// Why the sample of this name cannot be made, if that was found and the sample was not made since.
    pub fn broken(&self, sample: &str) -> Option<String> {
        if self.contains(sample) {
            return None;
        }
        self.read(Kind::Broken, sample, |text| Ok(String::from_utf8_lossy(text).into_owned()))
    }

    /// What went wrong since the last call that training could go on without: damaged records, a full disk, another
    /// writer.
    pub fn take_notices(&self) -> Vec<String> {
        std::mem::take(&mut *lock(&self.notices))
    }

    /// Whether the disk has refused to take more.
    pub fn is_full(&self) -> bool {
        matches!(*lock(&self.writing), Writing::Refused)
    }

    /// The sample of this name; `None` if it is not there or its record is damaged, which leaves a notice.
    pub fn get(&self, sample: &str) -> Option<HeadSample> {
        let stored: Stored = self.read(Kind::Sample, sample, decode_sample)?;
        let embedding: Tensor = self.read(Kind::Picture, &stored.picture, decode_picture)?;
        Some(stored.with_embedding(embedding))
    }

    /// Makes sure that samples can be added; otherwise the first one that is added does.
    ///
    /// # Errors
    /// [`Error::Request`] if another process is writing this part; [`Error::Io`].
    pub fn begin_writing(&self) -> Result<()> {
        match *self.writer(&mut lock(&self.writing))? {
            Writing::Taken => Err(Error::request(
                self.taken(),
                "wait for it to end, or give every process a part of its own (`--shard i/n`)",
            )),
            _ => Ok(()),
        }
    }

    /// `writing` with a writer, if nothing stands against it.
    fn writer<'a>(&self, writing: &'a mut Writing) -> Result<&'a mut Writing> {
        if matches!(writing, Writing::No | Writing::Taken) {
            *writing = match Writer::new(&self.dir, self.options.part, &self.key)? {
                Some(writer) => Writing::Yes(writer),
                None => Writing::Taken,
            };
        }
        Ok(writing)
    }

    fn taken(&self) -> String {
        let (dir, part) = (self.dir.display(), self.options.part);
        format!("{dir}: another process is writing part {part} of this feature cache")
    }

    /// Adds a sample and returns it as the cache will give it back from now on.
    ///
    /// When the disk refuses (it is full), or another process is writing this part, a notice is left, what was written
    /// before stays, and later calls add nothing: training goes on without the cache.
    pub fn insert(&self, name: &str, sample: &HeadSample) -> Result<HeadSample> {
        let encoded = encode(sample, &self.key)?;
        let rounded = decode_sample(&encoded.sample)?.with_embedding(decode_picture(&encoded.picture)?);

        // The picture first, so that a sample that is there always has one.
        let Encoded { name: picture_name, picture, sample } = &encoded;
        self.add(&[(Kind::Picture, picture_name, picture), (Kind::Sample, name, sample)])?;
        Ok(rounded)
    }

    /// Adds why a sample cannot be made, so that nobody tries before the cache is filled again. A disk that refuses
    /// leaves a notice, as in [`FeatureCache::insert`].
    ///
    /// # Errors
    /// As [`FeatureCache::insert`].
    pub fn insert_broken(&self, name: &str, reason: &str) -> Result<()> {
        match self.broken(name) {
            Some(known) if known == reason => Ok(()),
            _ => self.add(&[(Kind::Broken, name, reason.as_bytes())]),
        }
    }

    /// Appends what of `records` is not there; of reasons the last one counts.
    fn add(&self, records: &[(Kind, &str, &[u8])]) -> Result<()> {
        let mut writing = lock(&self.writing);
        if matches!(*writing, Writing::Taken | Writing::Refused) {
            return Ok(());
        }
        if let Err(error) = self.append(&mut writing, records) {
            let Error::Io { path, source } = error else { return Err(error) };
            lock(&self.notices).push(format!(
                "{}: {source}; nothing more is added to the feature cache, what is in it stays",
                path.display()
            ));
            if let Writing::Yes(writer) = &mut *writing {
                // If this fails too, the next writer finds the records by reading the shard through.
                let _ = writer.commit();
            }
            *writing = Writing::Refused;
        }
        Ok(())
    }

    fn append(&self, writing: &mut Writing, records: &[(Kind, &str, &[u8])]) -> Result<()> {
        let writer = match self.writer(writing)? {
            Writing::Yes(writer) => writer,
            Writing::Taken => {
                lock(&self.notices).push(format!("{}; this one adds nothing to it", self.taken()));
                return Ok(());
            }
            Writing::No | Writing::Refused => return Ok(()),
        };
        for &(kind, record, payload) in records {
            if kind != Kind::Broken && self.place(kind, record).is_some() {
                continue;
            }
            let (path, entry) = writer.append(kind, record, payload)?;
            let shard = self.shard_number(&path)?;
            self.add_place(shard, entry);
        }
        if writer.size() >= self.options.shard_bytes {
            writer.commit()?;
        }
        Ok(())
    }

    /// Completes the shard that is being written.
    pub fn commit(&self) -> Result<()> {
        match &mut *lock(&self.writing) {
            Writing::Yes(writer) => writer.commit(),
            _ => Ok(()),
        }
    }

    /// Reads a record, passing over damaged copies.
    fn read<T>(&self, kind: Kind, name: &str, decode: impl Fn(&[u8]) -> Result<T>) -> Option<T> {
        while let Some((number, entry)) = self.place(kind, name) {
            let shard = self.shards.read().unwrap_or_else(PoisonError::into_inner)[number].clone();
            match shard.payload(&entry, &decode) {
                Ok(value) => return Some(value),
                Err(reason) => {
                    lock(&self.notices).push(format!(
                        "{}: record `{name}` at byte {}: {reason}",
                        shard.path.display(),
                        entry.offset
                    ));
                    let mut places = self.places.write().unwrap_or_else(PoisonError::into_inner);
                    if let Some(list) = places.get_mut(&(kind, name.to_owned())) {
                        list.retain(|place| *place != (number, entry.clone()));
                    }
                }
            }
        }
        None
    }

    fn place(&self, kind: Kind, name: &str) -> Option<(usize, Entry)> {
        let places = self.places.read().unwrap_or_else(PoisonError::into_inner);
        places.get(&(kind, name.to_owned()))?.last().cloned()
    }

    fn add_place(&self, shard: usize, entry: Entry) {
        let mut places = self.places.write().unwrap_or_else(PoisonError::into_inner);
        places.entry((entry.kind, entry.name.clone())).or_default().push((shard, entry));
    }

    /// The number of the shard at `path`, which was begun or continued by this process.
    fn shard_number(&self, path: &Path) -> Result<usize> {
        let known = |shards: &[Arc<Shard>]| shards.iter().position(|shard| shard.path == path);
        if let Some(number) = known(&self.shards.read().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(number);
        }
        let opened = Shard::open(path, &self.key)?;
        let mut shards = self.shards.write().unwrap_or_else(PoisonError::into_inner);
        shards.push(Arc::new(opened.shard));
        Ok(shards.len() - 1)
    }

    fn add_shard(&self, path: &Path) -> Result<()> {
        let opened = Shard::open(path, &self.key)?;
        if let Some(damage) = opened.damage {
            lock(&self.notices).push(format!("{}: {damage}", path.display()));
        }
        let number = {
            let mut shards = self.shards.write().unwrap_or_else(PoisonError::into_inner);
            shards.push(Arc::new(opened.shard));
            shards.len() - 1
        };
        opened.records.into_iter().for_each(|entry| self.add_place(number, entry));
        Ok(())
    }
}

impl Drop for FeatureCache {
    fn drop(&mut self) {
        // The records are on the disk either way; a shard that is not complete is only slower to open.
        let _ = self.commit();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Shards in `dir` and in the folders directly below it, sorted.
fn shards_in(dir: &Path) -> Result<Vec<PathBuf>> {
    let list = |folder: &Path| -> Result<Vec<PathBuf>> {
        let entries = match std::fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(Error::io(folder, e)),
        };
        let paths = entries.map(|entry| Ok(entry.map_err(|e| Error::io(folder, e))?.path()));
        let mut paths = paths.collect::<Result<Vec<_>>>()?;
        paths.sort();
        Ok(paths)
    };
    let is_shard = |path: &PathBuf| path.extension().is_some_and(|e| e == EXTENSION) && path.is_file();
    let mut shards = Vec::new();
    for path in list(dir)? {
        match path.is_dir() {
            true => shards.extend(list(&path)?.into_iter().filter(is_shard)),
            false if is_shard(&path) => shards.push(path),
            false => {}
        }
    }
    Ok(shards)
}
