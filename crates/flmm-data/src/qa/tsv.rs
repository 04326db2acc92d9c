//! Tab-separated tables with pictures in base64.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use flmm::{Error, Result};
use serde_json::{Map, Value};

use super::Picture;
use super::table::Row;
use crate::coco::malformed;

/// A cell of the picture column that is no longer than this names another row's index instead.
const LONGEST_REFERENCE: usize = 64;
/// Longest row, bytes: neither an endless line nor a quotation mark that is never closed may take all memory.
const LONGEST_ROW: usize = 256 << 20;
/// The column with pictures.
const COLUMN: &str = "image";

/// A table of which only the places of its rows are kept.
#[derive(Debug)]
pub(super) struct TsvFile {
    path: PathBuf,
    records: Mutex<Records>,
    /// At which byte every row is found that has its picture.
    places: Vec<u64>,
    column: usize,
}

impl TsvFile {
    /// Opens `path` and hands every row to `visit`, with pictures as rows of table number `table`.
    pub(super) fn read(path: &Path, table: usize, visit: &mut dyn FnMut(&Row) -> Result<()>) -> Result<Self> {
        let mut records = Records::open(path)?;
        let names = records.next(path)?.unwrap_or_default();
        let column = names.iter().position(|name| name == COLUMN).ok_or_else(|| {
            let what = format!("no column `{COLUMN}`; there are {}", names.join(", "));
            malformed(path, what, "expected a TSV file with a header")
        })?;
        let mut places: Vec<u64> = Vec::new();
        let mut by_index: HashMap<String, u64> = HashMap::new();
        loop {
            let place = records.position;
            let Some(record) = records.next(path)? else { break };
            let number = places.len() as u64 + 1;
            if record.len() != names.len() {
                let what = format!("row {number}: {} cells, the header has {}", record.len(), names.len());
                return Err(malformed(path, what, "download the file again"));
            }
            let cells = names.iter().zip(&record).filter(|(name, _)| *name != COLUMN);
            let cells = cells.map(|(name, text)| (name.clone(), Value::from(text.as_str())));
            let cells: Map<String, Value> = cells.collect();
            let row = Row { file: path, number, cells, picture: Picture::Row(table, number - 1) };
            let picture = record[column].trim();
            let place = match picture.len() {
                0..=LONGEST_REFERENCE => by_index.get(picture).copied().ok_or_else(|| {
                    let what = format!(
                        "`{COLUMN}` is {picture:?}: neither a picture in base64 nor an earlier index"
                    );
                    row.error(what, "download the file again")
                })?,
                _ => place,
            };
            if let Some(index) = row.optional_text("index")? {
                by_index.insert(index, place);
            }
            visit(&row)?;
            places.push(place);
        }
        Ok(Self { path: path.to_owned(), records: Mutex::new(records), places, column })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The bytes of the picture in `row`, counted from 0.
    pub(super) fn picture(&self, row: u64) -> Result<Vec<u8>> {
        let changed = || {
            let what = format!("has no picture in row {}", row + 1);
            malformed(&self.path, what, "the file changed while it was read")
        };
        let place = usize::try_from(row).ok().and_then(|row| self.places.get(row)).ok_or_else(changed)?;
        let record = {
            let mut records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
            records.seek(&self.path, *place)?;
            records.next(&self.path)?
        };
        let text = record.as_ref().and_then(|record| record.get(self.column)).ok_or_else(changed)?;
        STANDARD.decode(text.trim()).map_err(|error| {
            let what = format!("row {}: the picture is not base64: {error}", row + 1);
            malformed(&self.path, what, "download the file again")
        })
    }
}

/// Rows one after the other: cells between tabs; a cell that begins with a quotation mark goes to the next single one, and
/// may hold tabs, line ends and doubled quotation marks.
#[derive(Debug)]
struct Records {
    reader: BufReader<File>,
    /// The byte at which the next row begins.
    position: u64,
    /// Most bytes of a row.
    longest: usize,
}

/// Where in a cell the reader is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    Start,
    Plain,
    Quoted,
    /// Behind a quotation mark that may end the cell.
    Mark,
}

impl Records {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|error| Error::io(path, error))?;
        Ok(Self { reader: BufReader::with_capacity(1 << 18, file), position: 0, longest: LONGEST_ROW })
    }

    fn seek(&mut self, path: &Path, position: u64) -> Result<()> {
        self.reader.seek(SeekFrom::Start(position)).map_err(|error| Error::io(path, error))?;
        self.position = position;
        Ok(())
    }

    /// The next row's cells; blank lines are skipped. `None` at the end of the file.
    fn next(&mut self, path: &Path) -> Result<Option<Vec<String>>> {
        let (mut cells, mut cell, mut line) = (Vec::new(), Vec::new(), Vec::new());
        let (mut at, mut total) = (At::Start, 0);
        let text = |cell: &mut Vec<u8>| {
            String::from_utf8(std::mem::take(cell))
                .map_err(|_| malformed(path, "not UTF-8", "expected tab-separated text in UTF-8"))
        };
        loop {
            line.clear();
            // One byte more than a row may have is enough to tell that it is too long.
            let most = (self.longest + 1).saturating_sub(total) as u64;
            let read = self.reader.by_ref().take(most).read_until(b'\n', &mut line);
            let read = read.map_err(|error| Error::io(path, error))?;
            let byte_order = if self.position == 0 { b"\xef\xbb\xbf".as_slice() } else { b"" };
            let bytes = line.strip_prefix(byte_order).unwrap_or(&line);
            self.position += read as u64;
            total += read;
            if total > self.longest {
                let what = format!("a row is longer than {} bytes", self.longest);
                return Err(malformed(path, what, "a quotation mark is not closed: download the file again"));
            }
            if read == 0 && at == At::Quoted {
                return Err(malformed(path, "a quotation mark is never closed", "download the file again"));
            }
            if read == 0 && cells.is_empty() && cell.is_empty() {
                return Ok(None);
            }
            for &byte in bytes {
                at = match (at, byte) {
                    (At::Start, b'"') => At::Quoted,
                    (At::Quoted, b'"') => At::Mark,
                    (At::Mark, b'"') | (At::Quoted, _) => {
                        cell.push(byte);
                        At::Quoted
                    }
                    (_, b'\t') => {
                        cells.push(text(&mut cell)?);
                        At::Start
                    }
                    (_, b'\n' | b'\r') => at,
                    _ => {
                        cell.push(byte);
                        At::Plain
                    }
                };
            }
            let blank = cells.is_empty() && cell.is_empty() && at == At::Start;
            if at != At::Quoted && !(blank && read > 0) {
                cells.push(text(&mut cell)?);
                return Ok(Some(cells));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(text: &[u8]) -> Result<Vec<Vec<String>>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tsv");
        std::fs::write(&path, text).unwrap();
        let mut records = Records::open(&path)?;
        let mut rows = Vec::new();
        while let Some(row) = records.next(&path)? {
            rows.push(row);
        }
        Ok(rows)
    }

    #[test]
    fn quoted_cells_hold_anything() {
        let text = b"\xef\xbb\xbfa\tb\r\n\n\"x\ty \"\"z\"\"\nw\"\t5\" tall\r\n\tlast";
        let expected = [["a", "b"], ["x\ty \"z\"\nw", "5\" tall"], ["", "last"]];
        assert_eq!(rows(text).unwrap(), expected);
        assert!(rows(b"").unwrap().is_empty() && rows(b"\n\n").unwrap().is_empty());
    }

    #[test]
    fn what_is_written_comes_back() {
        let cells: Vec<String> =
            ["", "a\tb", "\"", "x\ny", "plain", "5\" tall"].iter().map(|&cell| cell.to_owned()).collect();
        let text = crate::qa::write::tsv(&["1", "2", "3", "4", "5", "6"], std::slice::from_ref(&cells));
        assert_eq!(rows(text.as_bytes()).unwrap()[1], cells);
    }

    #[test]
    fn rows_have_a_longest_length() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tsv");
        for (text, fits) in
            [("abcd\tef\n", true), ("abcd\tefg\n", false), ("\"abc\nd\ne\"\n", false), ("abcdefgh", true)]
        {
            std::fs::write(&path, text).unwrap();
            let mut records = Records { longest: 8, ..Records::open(&path).unwrap() };
            let row = records.next(&path);
            assert_eq!(row.is_ok(), fits, "{text:?}: {row:?}");
            assert!(fits || row.unwrap_err().to_string().contains("longer than 8 bytes"));
        }
    }

    #[test]
    fn damage_is_an_error() {
        assert!(rows(b"a\t\"b\nc").unwrap_err().to_string().contains("never closed"));
        assert!(rows(b"a\t\xff\n").unwrap_err().to_string().contains("not UTF-8"));
    }
}
