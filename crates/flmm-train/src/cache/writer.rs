//! The one shard that is being written.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use flmm::{Error, Result, atomic};
use flmm_data::Part;

use super::key::CacheKey;
use super::shard::{EXTENSION, Entry, Kind, Shard, header, record, write_index};

/// Appends records to one shard after another.
#[derive(Debug)]
pub(super) struct Writer {
    dir: PathBuf,
    prefix: String,
    header: Vec<u8>,
    /// Held as long as the writer lives; the system lets go of it when the process is killed.
    _lock: File,
    number: usize,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    path: PathBuf,
    file: File,
    end: u64,
    records: Vec<Entry>,
}

impl Writer {
    /// The writer of `part` in `dir`, continuing the shard that an earlier one left, if any. `None` if another process is
    /// writing this part.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn new(dir: &Path, part: Part, key: &CacheKey) -> Result<Option<Self>> {
        std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        let prefix = part.to_string();
        let path = dir.join(format!("{prefix}.lock"));
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let lock = lock.map_err(|e| Error::io(&path, e))?;
        if !atomic::try_lock(&lock) {
            return Ok(None);
        }
        let mut writer =
            Self { dir: dir.to_owned(), header: header(key)?, _lock: lock, number: 0, open: None, prefix };
        writer.resume(key)?;
        Ok(Some(writer))
    }

    /// Goes on with the newest own shard if it is not complete, and removes what interrupted writes left.
    fn resume(&mut self, key: &CacheKey) -> Result<()> {
        let entries = std::fs::read_dir(&self.dir).map_err(|e| Error::io(&self.dir, e))?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        for name in names {
            if name.starts_with(&format!(".{}.", self.prefix)) && name.ends_with(".tmp") {
                let _ = std::fs::remove_file(self.dir.join(&name));
            }
            let number = name.strip_prefix(&format!("{}.", self.prefix));
            let number = number.and_then(|rest| rest.strip_suffix(&format!(".{EXTENSION}")));
            if let Some(number) = number.and_then(|number| number.parse::<usize>().ok()) {
                self.number = self.number.max(number + 1);
            }
        }
        let Some(last) = self.number.checked_sub(1) else { return Ok(()) };
        let path = self.path(last);
        let opened = Shard::open(&path, key)?;
        if opened.complete || opened.end == 0 {
            return Ok(());
        }
        // Another choice of rows may serve for reading, but one shard holds one key.
        let failed = |e| Error::io(&path, e);
        let mut file = OpenOptions::new().write(true).read(true).open(&path).map_err(failed)?;
        let mut old = vec![0; self.header.len()];
        std::io::Read::read_exact(&mut file, &mut old).map_err(failed)?;
        if old == self.header {
            file.set_len(opened.end).map_err(failed)?;
            file.seek(SeekFrom::End(0)).map_err(failed)?;
            self.open = Some(Open { file, end: opened.end, records: opened.records, path });
        } else {
            write_index(&path, opened.end, &opened.records)?;
        }
        Ok(())
    }

    fn path(&self, number: usize) -> PathBuf {
        self.dir.join(format!("{}.{number:05}.{EXTENSION}", self.prefix))
    }

    /// Appends a record; returns its shard and its place. On an error nothing of it stays.
    pub(super) fn append(&mut self, kind: Kind, name: &str, payload: &[u8]) -> Result<(PathBuf, Entry)> {
        let open = match self.open.take() {
            Some(open) => open,
            None => self.begin()?,
        };
        let open = self.open.insert(open);
        let bytes = record(kind, name, payload);
        if let Err(e) = open.file.write_all(&bytes) {
            // What was written of it would be recognised as not whole, but takes room that others may need.
            let _ = open.file.set_len(open.end).and_then(|()| open.file.seek(SeekFrom::Start(open.end)));
            return Err(Error::io(&open.path, e));
        }
        let entry = Entry { kind, name: name.to_owned(), offset: open.end, length: payload.len() as u64 };
        open.end += bytes.len() as u64;
        open.records.push(entry.clone());
        Ok((open.path.clone(), entry))
    }

    fn begin(&mut self) -> Result<Open> {
        let path = self.path(self.number);
        let mut file = File::create_new(&path).map_err(|e| Error::io(&path, e))?;
        if let Err(e) = file.write_all(&self.header) {
            let _ = std::fs::remove_file(&path);
            return Err(Error::io(&path, e));
        }
        self.number += 1;
        Ok(Open { path, file, end: self.header.len() as u64, records: Vec::new() })
    }

    /// Bytes in the open shard.
    pub(super) fn size(&self) -> u64 {
        self.open.as_ref().map_or(0, |open| open.end)
    }

    /// Brings the open shard to the disk and makes it complete.
    pub(super) fn commit(&mut self) -> Result<()> {
        let Some(open) = &self.open else { return Ok(()) };
        open.file.sync_all().map_err(|e| Error::io(&open.path, e))?;
        write_index(&open.path, open.end, &open.records)?;
        self.open = None;
        Ok(())
    }
}
