//! Pictures from users: decoded with limits, every way they can be broken explained.

use std::io::Cursor;
use std::path::Path;

use image::error::ImageError;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, RgbImage};

use crate::error::{Error, Result};

/// The largest picture that is decoded. Everything is checked from the header, before memory is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Longest side in pixels.
    pub side: u32,
    /// Number of pixels.
    pub pixels: u64,
    /// Size of the file in bytes.
    pub bytes: u64,
}

impl Default for Limits {
    /// 32,768 pixels a side, 100 million pixels (300 MB decoded), 256 MB of file.
    fn default() -> Self {
        Self { side: 32_768, pixels: 100_000_000, bytes: 256 << 20 }
    }
}

const SUPPORTED: &str = "use a PNG, JPEG, WebP, GIF, BMP or TIFF file";
/// Memory in bytes for what is not pixels.
const HEADER_MEMORY: u64 = 64 << 20;
const BROKEN: &str = "copy or download the picture again, or open and save it in an image editor";

/// Reads and decodes the picture in `path` with the default [`Limits`]; see [`decode_image`].
pub fn read_image(path: impl AsRef<Path>) -> Result<RgbImage> {
    read_image_with(path, &Limits::default())
}

/// Reads and decodes the picture in `path`.
///
/// # Errors
/// [`Error::Io`] if the file cannot be read, [`Error::Image`] if it is a folder, empty, too large, or as
/// [`decode_image`].
pub fn read_image_with(path: impl AsRef<Path>, limits: &Limits) -> Result<RgbImage> {
    let path = path.as_ref();
    let name = path.display().to_string();
    let metadata = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if metadata.is_dir() {
        return Err(Error::image(format!("`{name}` is a folder"), "name one picture inside it"));
    }
    if metadata.len() > limits.bytes {
        let what = format!("`{name}` is {} bytes long (limit {})", metadata.len(), limits.bytes);
        return Err(Error::image(what, "make the picture smaller"));
    }
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    decode_image_with(&bytes, &name, limits)
}

/// Decodes a picture with the default [`Limits`]; `name` is what errors call it.
///
/// The kind is told from the content, never from a file name. Alpha is dropped, grey is repeated, palettes are
/// looked up, CMYK is converted as in the reference's image library, 16-bit channels keep their high byte. Of an
/// animation the first frame is used, of a file with several pages the first page. EXIF orientation is ignored,
/// as everywhere in the published pipeline (`spec/models.md` §10.4).
///
/// # Errors
/// [`Error::Image`] if this is not a picture, if it is truncated or damaged, has no pixels, or exceeds a limit.
pub fn decode_image(bytes: &[u8], name: &str) -> Result<RgbImage> {
    decode_image_with(bytes, name, &Limits::default())
}

/// As [`decode_image`], with other limits.
pub fn decode_image_with(bytes: &[u8], name: &str, limits: &Limits) -> Result<RgbImage> {
    let (format, (width, height)) = header(bytes, name, limits)?;
    let explain = |error| explain(error, name, format, limits);
    if format == ImageFormat::Jpeg && !jpeg_is_complete(bytes) {
        // The decoder would fill what is missing with grey.
        return Err(Error::image(format!("`{name}` is truncated: its JPEG data has no end"), BROKEN));
    }
    let pixels = u64::from(width) * u64::from(height);
    let decoder = decoder(bytes, format, limits, pixels).map_err(explain)?;
    Ok(to_rgb(DynamicImage::from_decoder(decoder).map_err(explain)?))
}

/// Width and height from the header alone, with what [`decode_image_with`] checks before it takes memory for pixels.
///
/// # Errors
/// [`Error::Image`] if this is not a picture, has no pixels, or exceeds a limit.
pub fn image_size(bytes: &[u8], name: &str, limits: &Limits) -> Result<(u32, u32)> {
    Ok(header(bytes, name, limits)?.1)
}

/// Kind, width and height of a picture within the limits.
fn header(bytes: &[u8], name: &str, limits: &Limits) -> Result<(ImageFormat, (u32, u32))> {
    if bytes.is_empty() {
        return Err(Error::image(format!("`{name}` is empty"), BROKEN));
    }
    if bytes.len() as u64 > limits.bytes {
        let what = format!("`{name}` is {} bytes long (limit {})", bytes.len(), limits.bytes);
        return Err(Error::image(what, "make the picture smaller"));
    }
    let format = image::guess_format(bytes)
        .map_err(|_| Error::image(format!("`{name}` is not a picture of a known kind"), SUPPORTED))?;
    let explain = |error| explain(error, name, format, limits);
    // First the header alone, with little memory for what it brings along (colour profiles can be bombs), then
    // the pixels, with memory for four 16-bit channels of the size that the header told.
    let (width, height) = decoder(bytes, format, limits, 0).map_err(explain)?.dimensions();
    if width == 0 || height == 0 {
        let what = format!("`{name}` is {width} × {height}: it has no pixels");
        return Err(Error::image(what, "choose another picture"));
    }
    let pixels = u64::from(width) * u64::from(height);
    if width > limits.side || height > limits.side || pixels > limits.pixels {
        return Err(too_large(name, Some((width, height)), limits));
    }
    Ok((format, (width, height)))
}

/// A decoder with its header read, and memory for `pixels`.
fn decoder<'a>(
    bytes: &'a [u8],
    format: ImageFormat,
    limits: &Limits,
    pixels: u64,
) -> Result<impl ImageDecoder + 'a, ImageError> {
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut allowed = image::Limits::no_limits();
    allowed.max_image_width = Some(limits.side);
    allowed.max_image_height = Some(limits.side);
    allowed.max_alloc = Some(pixels.saturating_mul(8).saturating_add(HEADER_MEMORY));
    reader.limits(allowed);
    reader.into_decoder()
}

/// Eight bits per channel, no alpha.
fn to_rgb(image: DynamicImage) -> RgbImage {
    // Wide channels keep their high byte, as Pillow does; rounding would differ by one.
    let high = |wide: u16| (wide >> 8) as u8;
    let (width, height) = (image.width(), image.height());
    let bytes = match &image {
        DynamicImage::ImageLuma16(wide) => wide.iter().flat_map(|&v| [high(v); 3]).collect(),
        DynamicImage::ImageLumaA16(wide) => wide.pixels().flat_map(|p| [high(p.0[0]); 3]).collect(),
        DynamicImage::ImageRgb16(wide) => wide.iter().map(|&v| high(v)).collect(),
        DynamicImage::ImageRgba16(wide) => {
            wide.pixels().flat_map(|p| [p.0[0], p.0[1], p.0[2]].map(high)).collect()
        }
        _ => return image.into_rgb8(),
    };
    RgbImage::from_raw(width, height, bytes).unwrap_or_default()
}

/// The decoder's error in words for the user.
fn explain(error: ImageError, name: &str, format: ImageFormat, limits: &Limits) -> Error {
    let kind = format!("{format:?}").to_uppercase();
    match error {
        ImageError::Limits(_) => too_large(name, None, limits),
        ImageError::Unsupported(e) => {
            Error::image(format!("`{name}`: this kind of {kind} is not supported: {e}"), SUPPORTED)
        }
        ImageError::IoError(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
            Error::image(format!("`{name}` is truncated: its {kind} data ends too early"), BROKEN)
        }
        other => Error::image(format!("`{name}` is a damaged {kind} file: {other}"), BROKEN),
    }
}

fn too_large(name: &str, found: Option<(u32, u32)>, limits: &Limits) -> Error {
    let found = found.map_or_else(|| "too large".to_owned(), |(w, h)| format!("{w} × {h} pixels"));
    let what =
        format!("`{name}` is {found}; at most {} a side and {} in all are read", limits.side, limits.pixels);
    Error::image(what, "make the picture smaller; the models see at most about 1,000 pixels a side anyway")
}

/// Whether the image data of a JPEG file reaches its end marker. Thumbnails inside headers do not count.
fn jpeg_is_complete(bytes: &[u8]) -> bool {
    // Behind the start marker comes a list of segments with lengths; image data without length follows a scan
    // header and lasts until the next marker that is neither a restart nor an escaped 0xFF.
    let mut at = 2;
    while let Some(&[prefix, marker]) = bytes.get(at..).and_then(|rest| rest.first_chunk::<2>()) {
        match (prefix, marker) {
            (0xff, 0xd9) => return true,
            // A stuffed byte of image data, a restart marker or a filler: image data goes on.
            (0xff, 0x00 | 0x01 | 0xd0..=0xd8) => at += 2,
            (0xff, 0xff) => at += 1,
            (0xff, _) => {
                let Some(length) = bytes.get(at + 2..).and_then(|rest| rest.first_chunk::<2>()) else {
                    return false;
                };
                at += 2 + usize::from(u16::from_be_bytes(*length)).max(2);
            }
            _ => match bytes[at..].iter().position(|&b| b == 0xff) {
                Some(next) => at += next,
                None => return false,
            },
        }
    }
    false
}
