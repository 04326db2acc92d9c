//! Tab-separated tables with pictures in base64.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use csv::{Position, Reader, ReaderBuilder, StringRecord};
use flmm::{Error, Result};
use serde_json::{Map, Value};

use super::Picture;
use super::table::Row;
use crate::coco::malformed;

/// A cell of the picture column that is no longer than this names another row's index instead.
const LONGEST_REFERENCE: usize = 64;
/// The column with pictures.
const COLUMN: &str = "image";

/// A table of which only the places of its rows are kept.
#[derive(Debug)]
pub(super) struct TsvFile {
    path: PathBuf,
    reader: Mutex<Reader<File>>,
    /// Where every row is found that has its picture.
    places: Vec<Position>,
    column: usize,
}

impl TsvFile {
    /// Opens `path` and hands every row to `visit`, with pictures as rows of table number `table`.
    pub(super) fn read(path: &Path, table: usize, visit: &mut dyn FnMut(&Row) -> Result<()>) -> Result<Self> {
        let file = File::open(path).map_err(|error| Error::io(path, error))?;
        let mut reader = ReaderBuilder::new().delimiter(b'\t').from_reader(file);
        let names: Vec<String> =
            reader.headers().map_err(|error| broken(path, &error))?.iter().map(str::to_owned).collect();
        let column = names.iter().position(|name| name == COLUMN).ok_or_else(|| {
            malformed(
                path,
                format!("no column `{COLUMN}`; there are {}", names.join(", ")),
                "a TSV file with a header",
            )
        })?;
        let mut places: Vec<Position> = Vec::new();
        let mut by_index: HashMap<String, Position> = HashMap::new();
        let mut record = StringRecord::new();
        loop {
            let place = reader.position().clone();
            if !reader.read_record(&mut record).map_err(|error| broken(path, &error))? {
                break;
            }
            let number = places.len() as u64 + 1;
            let cells = names.iter().zip(record.iter()).filter(|(name, _)| *name != COLUMN);
            let cells: Map<String, Value> = cells.map(|(n, text)| (n.clone(), Value::from(text))).collect();
            let picture = record.get(column).unwrap_or_default();
            let row = Row { file: path, number, cells, picture: Picture::Row(table, number - 1) };
            let place = match picture.len() {
                0..=LONGEST_REFERENCE => by_index.get(picture.trim()).cloned().ok_or_else(|| {
                    let what = format!(
                        "`{COLUMN}` is {picture:?}: neither a picture in base64 nor an earlier index"
                    );
                    row.error(what, "download the file again")
                })?,
                _ => place,
            };
            if let Some(index) = row.optional_text("index")? {
                by_index.insert(index, place.clone());
            }
            visit(&row)?;
            places.push(place);
        }
        Ok(Self { path: path.to_owned(), reader: Mutex::new(reader), places, column })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The bytes of the picture in `row`, counted from 0.
    pub(super) fn picture(&self, row: u64) -> Result<Vec<u8>> {
        let place =
            usize::try_from(row).ok().and_then(|row| self.places.get(row)).cloned().ok_or_else(|| {
                malformed(&self.path, format!("has no row {}", row + 1), "the file changed while it was read")
            })?;
        let mut record = StringRecord::new();
        {
            let mut reader = self.reader.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            reader.seek(place).map_err(|error| broken(&self.path, &error))?;
            reader.read_record(&mut record).map_err(|error| broken(&self.path, &error))?;
        }
        let text = record.get(self.column).unwrap_or_default();
        STANDARD.decode(text.trim()).map_err(|error| {
            let what = format!("row {}: the picture is not base64: {error}", row + 1);
            malformed(&self.path, what, "download the file again")
        })
    }
}

fn broken(path: &Path, error: &csv::Error) -> Error {
    malformed(path, format!("not a table: {error}"), "expected tab-separated text in UTF-8 with a header")
}
