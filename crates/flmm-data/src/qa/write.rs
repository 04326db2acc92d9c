//! Writing tables with pictures inside, as the readers of this module read them: for the synthetic world and tests.

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use flmm::{Error, Result};
use parquet::basic::{Compression, ConvertedType, Repetition, Type as Physical};
use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedColumnWriter, SerializedFileWriter};
use parquet::schema::types::{Type, TypePtr};

/// Fills one leaf column.
type Fill<'a> = dyn FnMut(&mut SerializedColumnWriter<'_>) -> Result<(), ParquetError> + 'a;

/// A column of a Parquet table.
#[derive(Debug, Clone)]
pub enum Column {
    /// Text.
    Texts(Vec<String>),
    /// Whole numbers.
    Numbers(Vec<i64>),
    /// Lists of text.
    Lists(Vec<Vec<String>>),
    /// Lists of groups with one text of this name, as VQAv2's answers.
    Groups(&'static str, Vec<Vec<String>>),
    /// Picture files.
    Pictures(Vec<Vec<u8>>),
}

impl Column {
    fn len(&self) -> usize {
        match self {
            Self::Texts(rows) => rows.len(),
            Self::Numbers(rows) => rows.len(),
            Self::Lists(rows) | Self::Groups(_, rows) => rows.len(),
            Self::Pictures(rows) => rows.len(),
        }
    }

    fn schema(&self, name: &str) -> Result<TypePtr, ParquetError> {
        let leaf = |name: &str, kind, converted| {
            let leaf = Type::primitive_type_builder(name, kind).with_repetition(Repetition::OPTIONAL);
            leaf.with_converted_type(converted).build().map(Arc::new)
        };
        let group = |name: &str, repetition, converted, fields| {
            let group = Type::group_type_builder(name).with_repetition(repetition);
            group.with_converted_type(converted).with_fields(fields).build().map(Arc::new)
        };
        let list = |element: TypePtr| {
            let items = group("list", Repetition::REPEATED, ConvertedType::NONE, vec![element])?;
            group(name, Repetition::OPTIONAL, ConvertedType::LIST, vec![items])
        };
        let text = |name: &str| leaf(name, Physical::BYTE_ARRAY, ConvertedType::UTF8);
        match self {
            Self::Texts(_) => text(name),
            Self::Numbers(_) => leaf(name, Physical::INT64, ConvertedType::NONE),
            Self::Lists(_) => list(text("element")?),
            Self::Groups(field, _) => {
                list(group("element", Repetition::OPTIONAL, ConvertedType::NONE, vec![text(field)?])?)
            }
            Self::Pictures(_) => {
                let fields = vec![leaf("bytes", Physical::BYTE_ARRAY, ConvertedType::NONE)?, text("path")?];
                group(name, Repetition::OPTIONAL, ConvertedType::NONE, fields)
            }
        }
    }

    /// Writes rows `from..to` into the next leaf columns.
    fn write(
        &self,
        from: usize,
        to: usize,
        next: &mut dyn FnMut(&mut Fill<'_>) -> Result<(), ParquetError>,
    ) -> Result<(), ParquetError> {
        let mut bytes = |values: &[ByteArray], definition: &[i16], repetition: Option<&[i16]>| {
            next(&mut |leaf| {
                leaf.typed::<ByteArrayType>().write_batch(values, Some(definition), repetition).map(|_| ())
            })
        };
        match self {
            Self::Texts(rows) => {
                let values: Vec<ByteArray> = rows[from..to].iter().map(|text| text.as_str().into()).collect();
                bytes(&values, &vec![1; values.len()], None)
            }
            Self::Numbers(rows) => next(&mut |leaf| {
                let present = vec![1; to - from];
                leaf.typed::<Int64Type>().write_batch(&rows[from..to], Some(&present), None).map(|_| ())
            }),
            Self::Lists(rows) | Self::Groups(_, rows) => {
                // An item is defined through the list, its repeated group, the group if there is one, and itself.
                let item = if matches!(self, Self::Lists(_)) { 3 } else { 4 };
                let (mut values, mut definition, mut repetition) = (Vec::new(), Vec::new(), Vec::new());
                for row in &rows[from..to] {
                    if row.is_empty() {
                        definition.push(1);
                        repetition.push(0);
                    }
                    for (at, text) in row.iter().enumerate() {
                        values.push(ByteArray::from(text.as_str()));
                        definition.push(item);
                        repetition.push(i16::from(at > 0));
                    }
                }
                bytes(&values, &definition, Some(&repetition))
            }
            Self::Pictures(rows) => {
                let values: Vec<ByteArray> = rows[from..to].iter().map(|file| file.clone().into()).collect();
                bytes(&values, &vec![2; values.len()], None)?;
                // Paths are null, as in data sets with embedded pictures.
                bytes(&[], &vec![1; values.len()], None)
            }
        }
    }
}

/// A Parquet table, snappy-compressed, in groups of `rows_per_group` rows. All columns must have the same length.
pub fn parquet(columns: &[(&str, Column)], rows_per_group: usize) -> Result<Vec<u8>> {
    let write = || -> Result<Vec<u8>, ParquetError> {
        let fields =
            columns.iter().map(|(name, column)| column.schema(name)).collect::<Result<Vec<_>, _>>()?;
        let schema = Arc::new(Type::group_type_builder("schema").with_fields(fields).build()?);
        let properties = WriterProperties::builder()
            .set_compression(Compression::SNAPPY)
            // Files of the same settings are the same bytes whatever library version wrote them.
            .set_created_by("flmm".to_owned())
            .build();
        let mut writer = SerializedFileWriter::new(Vec::new(), schema, Arc::new(properties))?;
        let rows = columns.first().map_or(0, |(_, column)| column.len());
        for from in (0..rows).step_by(rows_per_group.max(1)) {
            let to = (from + rows_per_group.max(1)).min(rows);
            let mut group = writer.next_row_group()?;
            for (_, column) in columns {
                column.write(from, to, &mut |fill| {
                    let Some(mut leaf) = group.next_column()? else {
                        return Err(ParquetError::General("more columns than in the schema".into()));
                    };
                    fill(&mut leaf)?;
                    leaf.close()
                })?;
            }
            group.close()?;
        }
        writer.into_inner()
    };
    if let Some((name, _)) = columns.iter().find(|(_, column)| column.len() != columns[0].1.len()) {
        return Err(Error::request(format!("column `{name}` has another number of rows"), "this is a bug"));
    }
    write().map_err(|error| Error::request(format!("cannot write a Parquet table: {error}"), "this is a bug"))
}

/// A tab-separated table with a header; pictures go into it through [`base64()`].
pub fn tsv<R: AsRef<[String]>>(header: &[&str], rows: &[R]) -> String {
    let quoted = |cell: &str| match cell.contains(['\t', '"', '\n', '\r']) {
        true => format!("\"{}\"", cell.replace('"', "\"\"")),
        false => cell.to_owned(),
    };
    let line = |cells: Vec<String>| cells.join("\t") + "\n";
    let mut text = line(header.iter().map(|cell| quoted(cell)).collect());
    for row in rows {
        text += &line(row.as_ref().iter().map(|cell| quoted(cell)).collect());
    }
    text
}

/// A picture file as text.
pub fn base64(file: &[u8]) -> String {
    STANDARD.encode(file)
}
