//! One file of a cache: a header with the cache's key, then records, appended one after the other.
//!
//! ```text
//! shard   "FLMMFEAT", version u32, key length u32, crc32 u32 of the key, key (JSON), records …
//! record  "FREC", crc32 u32 of all that follows, kind u32, name length u32, payload length u64, name, payload
//! index   crc32 of the rest in hexadecimal, line end, JSON: bytes of the shard, place and length of every record
//! ```
//!
//! Numbers are little-endian. A shard is complete when its index is there. A shard without one was being written
//! when its writer ended: its records are found by reading it through, up to the first one that is not whole.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use flmm::{Error, Result};
use memmap2::Mmap;
use serde::{Deserialize, Serialize};

use super::key::CacheKey;

const MAGIC: &[u8; 8] = b"FLMMFEAT";
const RECORD: &[u8; 4] = b"FREC";
/// Version 3 has records of samples that cannot be made.
const VERSION: u32 = 3;
/// The oldest version that is read.
const OLDEST: u32 = 2;
const FILE_HEADER: usize = 20;
const RECORD_HEADER: usize = 24;
/// Extension of shards.
pub(super) const EXTENSION: &str = "features";

/// What a record holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Kind {
    Sample,
    Picture,
    /// Why a sample cannot be made, as text.
    Broken,
}

/// Where a record lies in its shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    pub(super) kind: Kind,
    pub(super) name: String,
    pub(super) offset: u64,
    /// Of the payload.
    pub(super) length: u64,
}

#[derive(Serialize, Deserialize)]
struct Index {
    bytes: u64,
    records: Vec<Entry>,
}

/// The header of a shard with `key`.
pub(super) fn header(key: &CacheKey) -> Result<Vec<u8>> {
    let json = key.to_json()?;
    let mut out = MAGIC.to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((json.len() as u32).to_le_bytes());
    out.extend(crc32fast::hash(&json).to_le_bytes());
    out.extend(json);
    Ok(out)
}

/// A whole record.
pub(super) fn record(kind: Kind, name: &str, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(RECORD_HEADER + name.len() + payload.len());
    out.extend(RECORD);
    out.extend([0; 4]);
    out.extend((kind as u32).to_le_bytes());
    out.extend((name.len() as u32).to_le_bytes());
    out.extend((payload.len() as u64).to_le_bytes());
    out.extend(name.as_bytes());
    out.extend(payload);
    let crc = crc32fast::hash(&out[8..]);
    out[4..8].copy_from_slice(&crc.to_le_bytes());
    out
}

/// Where the index of the shard at `path` lies.
fn index_path(path: &Path) -> PathBuf {
    path.with_extension("index")
}

/// Makes the shard at `path` complete.
pub(super) fn write_index(path: &Path, bytes: u64, records: &[Entry]) -> Result<()> {
    let index = Index { bytes, records: records.to_vec() };
    let file = index_path(path);
    let json = serde_json::to_vec(&index).map_err(|e| Error::io(&file, e.into()))?;
    flmm::atomic::write(&file, |out| {
        writeln!(out, "{:08x}", crc32fast::hash(&json))?;
        out.write_all(&json)
    })
}

/// `Ok(None)` when there is none, `Err` with the reason when it is damaged.
fn read_index(path: &Path) -> std::result::Result<Option<Index>, String> {
    let bytes = match std::fs::read(index_path(path)) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e.to_string()),
    };
    let (crc, json) = bytes.split_at_checked(9).ok_or("it is cut off")?;
    if format!("{:08x}\n", crc32fast::hash(json)).as_bytes() != crc {
        return Err("its checksum is wrong".into());
    }
    serde_json::from_slice(json).map(Some).map_err(|e| e.to_string())
}

/// A shard that can be read.
#[derive(Debug)]
pub(super) struct Shard {
    pub(super) path: PathBuf,
    file: File,
    /// Renewed when the shard has grown beyond it.
    map: RwLock<Arc<Mmap>>,
}

/// What was found on opening a shard.
pub(super) struct Opened {
    pub(super) shard: Shard,
    pub(super) records: Vec<Entry>,
    /// Bytes up to the end of the last whole record.
    pub(super) end: u64,
    /// Whether there is a sound index.
    pub(super) complete: bool,
    /// What is wrong, if anything; the records that are not affected are in `records`.
    pub(super) damage: Option<String>,
}

impl Shard {
    /// Maps a shard and finds its records.
    ///
    /// # Errors
    /// [`Error::Config`] naming what differs if the shard belongs to another key; [`Error::Io`].
    pub(super) fn open(path: &Path, key: &CacheKey) -> Result<Opened> {
        let failed = |e| Error::io(path, e);
        let file = File::open(path).map_err(failed)?;
        let shard = Self { path: path.to_owned(), map: RwLock::new(Arc::new(map(&file, path)?)), file };
        let bytes = shard.bytes(0)?;
        let index = read_index(path);
        let start = match header_key(&bytes) {
            Ok((found, start)) => {
                let differences = key.differences(&found);
                if !differences.is_empty() {
                    return Err(Error::config(
                        path,
                        format!("the feature cache was made for something else:\n{}", differences.join("\n")),
                        "choose another folder for the cache, or delete this one to build it anew",
                    ));
                }
                start
            }
            Err(HeaderFault::Newer(version)) => {
                return Err(Error::config(
                    path,
                    format!("feature cache of version {version}, expected {VERSION}"),
                    "use the program that wrote it, or delete the folder to build the cache anew",
                ));
            }
            // Whose numbers these are cannot be known any more.
            Err(HeaderFault::Damaged) => {
                let whole = index.is_ok_and(|index| index.is_some());
                let damage = (whole || bytes.len() >= FILE_HEADER)
                    .then(|| "its header is damaged; none of its records is used".to_owned());
                return Ok(Opened { end: 0, records: Vec::new(), complete: whole, damage, shard });
            }
        };
        let (records, end, complete, damage) = match index {
            Ok(Some(index)) => {
                let total = index.records.len();
                let inside = |entry: &Entry| {
                    let end = entry.offset.checked_add(entry.length);
                    end.is_some_and(|end| end <= bytes.len() as u64)
                };
                let records: Vec<Entry> = index.records.into_iter().filter(inside).collect();
                let lost = total - records.len();
                let damage =
                    (lost > 0).then(|| format!("it is cut off; {lost} of its {total} records are lost"));
                (records, index.bytes, true, damage)
            }
            Ok(None) => {
                let (records, end) = scan(&bytes, start);
                (records, end, false, None)
            }
            Err(reason) => {
                let (records, end) = scan(&bytes, start);
                let found = records.len();
                (
                    records,
                    end,
                    true,
                    Some(format!("its index is damaged ({reason}); {found} records found without it")),
                )
            }
        };
        Ok(Opened { shard, records, end, complete, damage })
    }

    /// The payload of a record, its checksum verified. `Err` says what is wrong.
    pub(super) fn payload<T>(
        &self,
        entry: &Entry,
        read: impl FnOnce(&[u8]) -> Result<T>,
    ) -> std::result::Result<T, String> {
        let end = entry.offset.saturating_add((RECORD_HEADER + entry.name.len()) as u64);
        let bytes = self.bytes(end.saturating_add(entry.length)).map_err(|e| e.to_string())?;
        let (found, payload, _) = whole_record(&bytes, entry.offset as usize)?;
        if (found.kind, &found.name, found.length) != (entry.kind, &entry.name, entry.length) {
            return Err("another record lies there".into());
        }
        read(payload).map_err(|e| e.to_string())
    }

    /// The mapped file, at least `length` bytes of it if it has them.
    fn bytes(&self, length: u64) -> Result<Arc<Mmap>> {
        let current = self.map.read().unwrap_or_else(PoisonError::into_inner).clone();
        if current.len() as u64 >= length {
            return Ok(current);
        }
        let renewed = Arc::new(map(&self.file, &self.path)?);
        *self.map.write().unwrap_or_else(PoisonError::into_inner) = renewed.clone();
        Ok(renewed)
    }
}

#[allow(unsafe_code)]
fn map(file: &File, path: &Path) -> Result<Mmap> {
    // SAFETY: the map is read-only. Shards only ever grow; what a writer cuts off on resuming lies behind the last
    // whole record, where nothing is read.
    unsafe { Mmap::map(file) }.map_err(|e| Error::io(path, e))
}

enum HeaderFault {
    Newer(u32),
    Damaged,
}

/// The key in a shard's header, and where the records begin.
fn header_key(bytes: &[u8]) -> std::result::Result<(CacheKey, usize), HeaderFault> {
    let fixed = bytes.get(..FILE_HEADER).ok_or(HeaderFault::Damaged)?;
    let (version, length, crc) = (u32_at(fixed, 8), u32_at(fixed, 12), u32_at(fixed, 16));
    if &fixed[..8] != MAGIC {
        return Err(HeaderFault::Damaged);
    }
    let end = FILE_HEADER.saturating_add(length as usize);
    let json = bytes.get(FILE_HEADER..end).filter(|json| crc32fast::hash(json) == crc);
    match (json, version) {
        (Some(_), version) if !(OLDEST..=VERSION).contains(&version) => Err(HeaderFault::Newer(version)),
        (Some(json), _) => match serde_json::from_slice(json) {
            Ok(key) => Ok((key, end)),
            Err(_) => Err(HeaderFault::Damaged),
        },
        (None, _) => Err(HeaderFault::Damaged),
    }
}

/// The whole record at `offset`: what it is, its payload and where it ends.
fn whole_record(bytes: &[u8], offset: usize) -> std::result::Result<(Entry, &[u8], usize), String> {
    let cut_off = || "it is cut off".to_owned();
    let rest = bytes.get(offset..).ok_or_else(cut_off)?;
    let fixed = rest.get(..RECORD_HEADER).ok_or_else(cut_off)?;
    if &fixed[..4] != RECORD {
        return Err("no record begins there".into());
    }
    let (name_length, length) = (u32_at(fixed, 12) as usize, u64_at(fixed, 16));
    let end = (RECORD_HEADER + name_length).checked_add(usize::try_from(length).map_err(|_| cut_off())?);
    let whole = end.and_then(|end| rest.get(..end)).ok_or_else(cut_off)?;
    if crc32fast::hash(&whole[8..]) != u32_at(fixed, 4) {
        return Err("its checksum is wrong".into());
    }
    let (name, payload) = whole[RECORD_HEADER..].split_at(name_length);
    let kind = u32_at(fixed, 8);
    let kind = [Kind::Sample, Kind::Picture, Kind::Broken].into_iter().find(|known| *known as u32 == kind);
    let kind = kind.ok_or("it is of an unknown kind")?;
    let name = String::from_utf8_lossy(name).into_owned();
    let entry = Entry { kind, name, offset: offset as u64, length };
    Ok((entry, payload, offset + whole.len()))
}

/// Whole records from `start` on, and where the last of them ends.
fn scan(bytes: &[u8], start: usize) -> (Vec<Entry>, u64) {
    let (mut records, mut end) = (Vec::new(), start);
    while let Ok((entry, _, next)) = whole_record(bytes, end) {
        records.push(entry);
        end = next;
    }
    (records, end as u64)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}
