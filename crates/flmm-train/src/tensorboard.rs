//! Curves and pictures for TensorBoard: event files, which are TFRecords of small protocol buffers.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use flmm::{Error, Result};
use image::RgbImage;

/// Writes one event file.
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Begins a new file in `dir`, created where needed, for a run that goes on after `step` steps: TensorBoard drops
    /// what older files in the folder say about later steps.
    pub fn create(dir: &Path, step: u64) -> Result<Self> {
        std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        let seconds = now() as u64;
        let file_of = |number: u32| {
            dir.join(format!("events.out.tfevents.{seconds:010}.flmm.{}.{number}", std::process::id()))
        };
        let mut number = 0;
        let (path, file) = loop {
            match File::create_new(file_of(number)) {
                Ok(file) => break (file_of(number), file),
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => number += 1,
                Err(e) => return Err(Error::io(file_of(number), e)),
            }
        };
        let mut writer = Self { path, file };
        let mut version = event(0);
        field_bytes(&mut version, 3, b"brain.Event:2");
        writer.record(&version)?;
        // SessionLog { status: START } at the step that comes next.
        let mut start = event(step + 1);
        field_bytes(&mut start, 7, &[0x08, 0x01]);
        writer.record(&start)?;
        Ok(writer)
    }

    /// Adds values to the curves of their names.
    pub fn scalars<'a>(&mut self, step: u64, values: impl IntoIterator<Item = (&'a str, f64)>) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut entry = Vec::new();
            field_bytes(&mut entry, 1, tag.as_bytes());
            entry.push(2 << 3 | 5);
            entry.extend((value as f32).to_le_bytes());
            field_bytes(&mut summary, 1, &entry);
        }
        self.summary(step, &summary)
    }

    /// Adds a picture.
    pub fn picture(&mut self, step: u64, tag: &str, picture: &RgbImage) -> Result<()> {
        let mut png = std::io::Cursor::new(Vec::new());
        picture
            .write_to(&mut png, image::ImageFormat::Png)
            .map_err(|e| Error::image(format!("cannot be encoded for TensorBoard: {e}"), "this is a bug"))?;
        let mut content = Vec::new();
        // Three channels: RGB.
        for (number, value) in [(1, u64::from(picture.height())), (2, u64::from(picture.width())), (3, 3)] {
            field_number(&mut content, number, value);
        }
        field_bytes(&mut content, 4, png.get_ref());
        let mut entry = Vec::new();
        field_bytes(&mut entry, 1, tag.as_bytes());
        field_bytes(&mut entry, 4, &content);
        let mut summary = Vec::new();
        field_bytes(&mut summary, 1, &entry);
        self.summary(step, &summary)
    }

    fn summary(&mut self, step: u64, summary: &[u8]) -> Result<()> {
        let mut event = event(step);
        field_bytes(&mut event, 5, summary);
        self.record(&event)
    }

    /// Appends one record: length, its checksum, content, its checksum.
    fn record(&mut self, content: &[u8]) -> Result<()> {
        let length = (content.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(content.len() + 16);
        record.extend(length);
        record.extend(masked_crc(&length).to_le_bytes());
        record.extend(content);
        record.extend(masked_crc(content).to_le_bytes());
        self.file.write_all(&record).map_err(|e| Error::io(&self.path, e))
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// The beginning of an Event: time and step.
fn event(step: u64) -> Vec<u8> {
    let mut out = vec![1 << 3 | 1];
    out.extend(now().to_le_bytes());
    field_number(&mut out, 2, step);
    out
}

fn field_number(out: &mut Vec<u8>, number: u8, value: u64) {
    out.push(number << 3);
    varint(out, value);
}

fn field_bytes(out: &mut Vec<u8>, number: u8, value: &[u8]) {
    out.push(number << 3 | 2);
    varint(out, value.len() as u64);
    out.extend(value);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// The checksum that TFRecords use: CRC-32C, rotated and shifted so that a checksum of checksums is harmless.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32 with Castagnoli's polynomial, bits reflected.
fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut byte = 0;
        while byte < 256 {
            let (mut crc, mut bit) = (byte as u32, 0);
            while bit < 8 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
                bit += 1;
            }
            table[byte] = crc;
            byte += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |crc, byte| crc >> 8 ^ TABLE[(crc as u8 ^ byte) as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_the_published_ones() {
        // The check value of CRC-32C, and RFC 3720 B.4.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }

    /// Fields of a message: number and content (the value's bytes).
    fn fields(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
        let varint = |bytes: &mut &[u8]| {
            let mut value = 0u64;
            for shift in (0..).step_by(7) {
                let (&byte, rest) = bytes.split_first().unwrap();
                *bytes = rest;
                value |= u64::from(byte & 0x7f) << shift;
                if byte < 0x80 {
                    return value;
                }
            }
            value
        };
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let key = varint(&mut bytes);
            let length = match key & 7 {
                0 => {
                    found.push(((key >> 3) as u8, varint(&mut bytes).to_le_bytes().to_vec()));
                    continue;
                }
                1 => 8,
                5 => 4,
                2 => varint(&mut bytes) as usize,
                other => panic!("wire type {other}"),
            };
            found.push(((key >> 3) as u8, bytes[..length].to_vec()));
            bytes = &bytes[length..];
        }
        found
    }

    #[test]
    fn events_can_be_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path(), 300).unwrap();
        writer.scalars(301, [("train/loss", 0.5), ("lr", 1e-4)]).unwrap();
        writer.picture(302, "overlay", &RgbImage::new(300, 2)).unwrap();
        let second = EventWriter::create(dir.path(), 302).unwrap();
        assert_ne!(writer.path, second.path);

        let bytes = std::fs::read(&writer.path).unwrap();
        let (mut at, mut events) = (0, Vec::new());
        while at < bytes.len() {
            let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
            let crc = |range: std::ops::Range<usize>| u32::from_le_bytes(bytes[range].try_into().unwrap());
            assert_eq!(crc(at + 8..at + 12), masked_crc(&bytes[at..at + 8]));
            let content = &bytes[at + 12..at + 12 + length];
            assert_eq!(crc(at + 12 + length..at + 16 + length), masked_crc(content));
            events.push(fields(content));
            at += 16 + length;
        }
        let get = |fields: &[(u8, Vec<u8>)], number: u8| {
            fields.iter().find(|(found, _)| *found == number).map(|(_, value)| value.clone())
        };
        let step = |event: &[(u8, Vec<u8>)]| u64::from_le_bytes(get(event, 2).unwrap().try_into().unwrap());
        assert_eq!(events.iter().map(|event| step(event)).collect::<Vec<_>>(), [0, 301, 301, 302]);
        assert_eq!(get(&events[0], 3).unwrap(), b"brain.Event:2");
        assert_eq!(get(&events[1], 7).unwrap(), [8, 1]);
        let values: Vec<_> = fields(&get(&events[2], 5).unwrap()).iter().map(|(_, v)| fields(v)).collect();
        assert_eq!(get(&values[0], 1).unwrap(), b"train/loss");
        assert_eq!(get(&values[0], 2).unwrap(), 0.5f32.to_le_bytes());
        assert_eq!(get(&values[1], 2).unwrap(), 1e-4f32.to_le_bytes());
        let value = fields(&get(&events[3], 5).unwrap())[0].1.clone();
        let picture = fields(&get(&fields(&value), 4).unwrap());
        assert_eq!(get(&picture, 2).unwrap(), 300u64.to_le_bytes());
        let decoded = image::load_from_memory(&get(&picture, 4).unwrap()).unwrap();
        assert_eq!((decoded.width(), decoded.height()), (300, 2));
    }
}
