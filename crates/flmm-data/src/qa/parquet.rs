//! Parquet tables as the hub distributes data sets: pictures as `{bytes, path}` inside rows.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use flmm::{Error, Result};
use parquet::basic::{ConvertedType, LogicalType, Repetition, Type as Physical};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::record::reader::{ReaderIter, TreeBuilder};
use parquet::schema::types::{SchemaDescPtr, SchemaDescriptor, Type, TypePtr};
use serde_json::{Map, Value};

use super::Picture;
use super::table::Row;
use crate::coco::malformed;

/// Rows decoded at a time: pictures are large.
const ROWS_AT_ONCE: usize = 16;
/// The field of a picture that holds the file's bytes.
const BYTES: &str = "bytes";

/// A table whose row groups are read one after the other.
pub(super) struct ParquetFile {
    path: PathBuf,
    reader: SerializedFileReader<File>,
    /// The column with pictures, alone.
    pictures: Option<SchemaDescPtr>,
    /// Where the last picture was read: the next one is read from there.
    cursor: Mutex<Option<Cursor>>,
}

struct Cursor {
    rows: ReaderIter,
    /// Number of the row that `rows` gives next, and of the first row behind its group.
    next: u64,
    end: u64,
}

impl std::fmt::Debug for ParquetFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("ParquetFile").field(&self.path).finish()
    }
}

impl ParquetFile {
    /// Opens `path` and hands every row to `visit`, with pictures as rows of table number `table`. Columns with
    /// pictures, and those of kinds that no benchmark uses, are not read.
    pub(super) fn read(path: &Path, table: usize, visit: &mut dyn FnMut(&Row) -> Result<()>) -> Result<Self> {
        guarded(path, || Self::read_rows(path, table, visit))
    }

    fn read_rows(path: &Path, table: usize, visit: &mut dyn FnMut(&Row) -> Result<()>) -> Result<Self> {
        let file = File::open(path).map_err(|error| Error::io(path, error))?;
        let reader = SerializedFileReader::new(file).map_err(|error| broken(path, &error))?;
        let root = reader.metadata().file_metadata().schema_descr().root_schema();
        let columns = root.get_fields();
        let pictures = columns.iter().find(|column| is_picture(column));
        let select = |columns: Vec<TypePtr>| {
            let root = Type::group_type_builder(root.name()).with_fields(columns).build();
            root.map(|root| Arc::new(SchemaDescriptor::new(Arc::new(root))))
                .map_err(|error| broken(path, &error))
        };
        let texts =
            columns.iter().filter(|column| !is_picture(column) && is_plain(column)).cloned().collect();
        let texts = select(texts)?;
        let pictures = pictures.map(|column| select(vec![column.clone()])).transpose()?;
        let file = Self { path: path.to_owned(), reader, pictures, cursor: Mutex::default() };
        let mut number = 0;
        for group in 0..file.reader.num_row_groups() {
            for fields in file.group(group, &texts, 1024)? {
                number += 1;
                let fields = fields.map_err(|error| file.broken_row(number, &error))?;
                let cells = fields.into_columns().into_iter().map(|(name, field)| (name, value(field)));
                let cells: Map<String, Value> = cells.collect();
                let picture = match file.pictures {
                    Some(_) => Picture::Row(table, number - 1),
                    None => Picture::Missing,
                };
                visit(&Row { file: path, number, cells, picture })?;
            }
        }
        Ok(file)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn group(&self, group: usize, columns: &SchemaDescPtr, at_once: usize) -> Result<ReaderIter> {
        let rows = self.reader.get_row_group(group).and_then(|group| {
            TreeBuilder::new().with_batch_size(at_once).as_iter(columns.clone(), group.as_ref())
        });
        rows.map_err(|error| broken(&self.path, &error))
    }

    fn broken_row(&self, number: u64, error: &ParquetError) -> Error {
        malformed(&self.path, format!("row {number}: {error}"), "download the file again")
    }

    /// The bytes of the picture in `row`, counted from 0. Going back means reading the row's group from its start.
    pub(super) fn picture(&self, row: u64) -> Result<Vec<u8>> {
        guarded(&self.path, || self.read_picture(row))
    }

    fn read_picture(&self, row: u64) -> Result<Vec<u8>> {
        let mut cursor = self.cursor.lock().unwrap_or_else(PoisonError::into_inner);
        // Left empty by an error, so that the next picture starts afresh.
        let mut at = match cursor.take().filter(|cursor| (cursor.next..cursor.end).contains(&row)) {
            Some(at) => at,
            None => self.seek(row)?,
        };
        loop {
            let fields = at.rows.next().ok_or_else(|| self.no_row(row))?;
            let fields = fields.map_err(|error| self.broken_row(at.next + 1, &error))?;
            at.next += 1;
            if at.next == row + 1 {
                *cursor = Some(at);
                let bytes = fields.into_columns().into_iter().find_map(|(_, field)| bytes_of(field));
                return bytes.ok_or_else(|| {
                    malformed(
                        &self.path,
                        format!("row {}: the picture is empty", row + 1),
                        "download the file again",
                    )
                });
            }
        }
    }

    /// The start of the group of `row`.
    fn seek(&self, row: u64) -> Result<Cursor> {
        let columns = self.pictures.as_ref().ok_or_else(|| self.no_row(row))?;
        let mut start = 0;
        for group in 0..self.reader.num_row_groups() {
            let rows = self.reader.metadata().row_group(group).num_rows().max(0) as u64;
            if row < start + rows {
                let rows_of_group = self.group(group, columns, ROWS_AT_ONCE)?;
                return Ok(Cursor { rows: rows_of_group, next: start, end: start + rows });
            }
            start += rows;
        }
        Err(self.no_row(row))
    }

    fn no_row(&self, row: u64) -> Error {
        malformed(
            &self.path,
            format!("has no picture in row {}", row + 1),
            "the file changed while it was read",
        )
    }
}

/// Turns a panic into an error: the library that reads rows takes the levels of damaged pages for granted.
fn guarded<T>(path: &Path, read: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(read))
        .unwrap_or_else(|_| Err(malformed(path, "its pages are damaged", "download the file again")))
}

fn broken(path: &Path, error: &ParquetError) -> Error {
    let hint = match error.to_string().contains("Disabled feature") {
        true => "write the file again with snappy compression, as the hub distributes it",
        false => "download the file again",
    };
    malformed(path, format!("not a readable Parquet file: {error}"), hint)
}

/// Whether a column holds pictures: a group with `bytes`, or bytes that are not text.
fn is_picture(column: &Type) -> bool {
    match column.is_group() {
        true => column.get_fields().iter().any(|field| field.name() == BYTES && !field.is_group()),
        false => {
            column.get_physical_type() == Physical::BYTE_ARRAY && !is_text(column) && column.name() == "image"
        }
    }
}

fn is_text(column: &Type) -> bool {
    let info = column.get_basic_info();
    info.converted_type() == ConvertedType::UTF8 || info.logical_type_ref() == Some(&LogicalType::String)
}

/// Whether a column is made of values, lists in the usual form and groups. Others are left out: their readers take the
/// form for granted.
fn is_plain(column: &Type) -> bool {
    let fields = match column.is_group() {
        false => return column.get_basic_info().repetition() != Repetition::REPEATED,
        true => column.get_fields(),
    };
    match column.get_basic_info().converted_type() {
        ConvertedType::LIST => match fields {
            [items] if items.get_basic_info().repetition() == Repetition::REPEATED && items.is_group() => {
                !items.get_fields().is_empty() && items.get_fields().iter().all(|field| is_plain(field))
            }
            _ => false,
        },
        ConvertedType::NONE => {
            column.get_basic_info().repetition() != Repetition::REPEATED
                && !fields.is_empty()
                && fields.iter().all(|field| is_plain(field))
        }
        _ => false,
    }
}

/// The content of a picture column.
fn bytes_of(field: Field) -> Option<Vec<u8>> {
    match field {
        Field::Bytes(bytes) => Some(bytes.data().to_vec()),
        Field::Group(row) => {
            row.into_columns().into_iter().find(|(name, _)| name == BYTES).and_then(|(_, f)| bytes_of(f))
        }
        _ => None,
    }
    .filter(|bytes| !bytes.is_empty())
}

/// A cell as JSON; dates and the like are null.
fn value(field: Field) -> Value {
    match field {
        Field::Bool(v) => v.into(),
        Field::Byte(v) => v.into(),
        Field::Short(v) => v.into(),
        Field::Int(v) => v.into(),
        Field::Long(v) => v.into(),
        Field::UByte(v) => v.into(),
        Field::UShort(v) => v.into(),
        Field::UInt(v) => v.into(),
        Field::ULong(v) => v.into(),
        Field::Float(v) => v.into(),
        Field::Double(v) => v.into(),
        Field::Str(text) => text.into(),
        // Some writers do not say that a column is text.
        Field::Bytes(bytes) => String::from_utf8(bytes.data().to_vec()).map_or(Value::Null, Value::from),
        Field::ListInternal(list) => list.elements().iter().cloned().map(value).collect(),
        Field::Group(row) => {
            Value::Object(row.into_columns().into_iter().map(|(name, field)| (name, value(field))).collect())
        }
        _ => Value::Null,
    }
}
