//! Files with one JSON object per line: samples, predictions, failures.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind};
use std::path::Path;

use flmm::{Error, Result, atomic};
use serde::Serialize;

use crate::results::not_json;

/// The lines of a file, blank ones left out.
pub(crate) struct Lines<'a> {
    path: &'a Path,
    reader: BufReader<File>,
    /// Bytes of the file.
    pub(crate) size: u64,
    /// Bytes read.
    pub(crate) read: u64,
    number: usize,
}

/// A line that is not blank.
pub(crate) struct Line {
    /// Its number, from 1.
    pub(crate) number: usize,
    /// Its bytes, with the line end if it has one.
    pub(crate) text: Vec<u8>,
}

impl Line {
    /// Whether the file ends in the middle of this line: its writer was stopped.
    pub(crate) fn is_torn(&self) -> bool {
        self.text.last() != Some(&b'\n')
    }
}

impl<'a> Lines<'a> {
    pub(crate) fn open(path: &'a Path) -> Result<Self> {
        let failed = |error| Error::io(path, error);
        let file = File::open(path).map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        Ok(Self { path, reader: BufReader::with_capacity(1 << 20, file), size, read: 0, number: 0 })
    }

    /// The next line that is not blank; `None` at the end of the file.
    pub(crate) fn next(&mut self) -> Result<Option<Line>> {
        loop {
            let mut text = Vec::new();
            let read = self.reader.read_until(b'\n', &mut text).map_err(|e| Error::io(self.path, e))?;
            if read == 0 {
                return Ok(None);
            }
            self.number += 1;
            self.read += read as u64;
            if !text.trim_ascii().is_empty() {
                return Ok(Some(Line { number: self.number, text }));
            }
        }
    }
}

/// Writes what failed, one JSON object per line; no file where nothing did.
pub(crate) fn write_failures<T: Serialize>(path: &Path, failures: &[T]) -> Result<()> {
    if failures.is_empty() {
        return match std::fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io(path, error)),
            _ => Ok(()),
        };
    }
    let lines: Result<Vec<String>, _> = failures.iter().map(serde_json::to_string).collect();
    let lines = lines.map_err(not_json)?;
    atomic::write(path, |file| lines.iter().try_for_each(|line| writeln!(file, "{line}")))
}
