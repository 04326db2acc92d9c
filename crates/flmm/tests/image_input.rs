//! Pictures as users send them: every kind, every defect.

use std::io::Cursor;

use flmm::Error;
use flmm::image_input::{Limits, decode_image, decode_image_with, read_image};
use image::codecs::gif::GifEncoder;
use image::codecs::jpeg::JpegEncoder;
use image::{DynamicImage, Frame, ImageBuffer, ImageFormat, Luma, LumaA, Rgb, RgbImage, Rgba, RgbaImage};
use proptest::prelude::*;

fn gradient(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| Rgb([(x * 9) as u8, (y * 11) as u8, (x * y) as u8]))
}

fn encoded(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.into().write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// The message of an error about the picture, which must name it and have a hint.
fn refusal(bytes: &[u8]) -> String {
    explained(decode_image(bytes, "photo").expect_err("a bad picture was accepted"))
}

fn explained(error: Error) -> String {
    assert!(matches!(error, Error::Image { .. }), "{error:?}");
    assert!(error.hint().is_some_and(|hint| !hint.is_empty()), "{error}");
    let message = error.to_string();
    assert!(message.contains("photo"), "{message}");
    message
}

// ---- a PNG written by hand: headers can lie, palettes and 16 bits are exact ----

fn png(header: (u32, u32, u8, u8), chunks: &[(&[u8; 4], Vec<u8>)]) -> Vec<u8> {
    let (width, height, depth, colour) = header;
    let mut ihdr = [width.to_be_bytes(), height.to_be_bytes()].concat();
    ihdr.extend([depth, colour, 0, 0, 0]);
    let mut bytes = b"\x89PNG\r\n\x1a\n".to_vec();
    let end = (b"IEND", Vec::new());
    for (name, data) in std::iter::once(&(b"IHDR", ihdr)).chain(chunks).chain([&end]) {
        bytes.extend((data.len() as u32).to_be_bytes());
        let content = [name.as_slice(), data].concat();
        bytes.extend(&content);
        bytes.extend(crc32(&content).to_be_bytes());
    }
    bytes
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |c, _| if c & 1 == 1 { 0xedb8_8320 ^ (c >> 1) } else { c >> 1 })
    })
}

/// Rows, each behind a filter byte 0, as a zlib stream of one stored block.
fn stored(rows: &[&[u8]]) -> Vec<u8> {
    let raw: Vec<u8> = rows.iter().flat_map(|row| [&[0], *row].concat()).collect();
    let (mut a, mut b) = (1u32, 0u32);
    for &byte in &raw {
        a = (a + u32::from(byte)) % 65521;
        b = (b + a) % 65521;
    }
    let length = raw.len() as u16;
    let mut stream = vec![0x78, 0x01, 0x01];
    stream.extend(length.to_le_bytes());
    stream.extend((!length).to_le_bytes());
    stream.extend(raw);
    stream.extend(((b << 16) | a).to_be_bytes());
    stream
}

// ---- a JPEG written by hand: one 8 × 8 block of one colour per component ----

/// Four components with the given sample values, as Adobe writes CMYK (values inverted).
fn cmyk_jpeg(values: [u8; 4]) -> Vec<u8> {
    let segment = |marker: u8, data: &[u8]| {
        [&[0xff, marker], &((data.len() + 2) as u16).to_be_bytes()[..], data].concat()
    };
    let mut bytes = vec![0xff, 0xd8];
    bytes.extend(segment(0xee, b"Adobe\x00\x64\x00\x00\x00\x00\x00"));
    bytes.extend(segment(0xdb, &[&[0][..], &[1; 64]].concat()));
    let components: Vec<u8> = (1..=4).flat_map(|id| [id, 0x11, 0]).collect();
    bytes.extend(segment(0xc0, &[&[8, 0, 8, 0, 8, 4][..], &components].concat()));
    // DC lengths 0..=11 as four-bit codes; of AC only "end of block", as a one-bit code.
    let mut counts = [0u8; 16];
    counts[3] = 12;
    bytes.extend(segment(0xc4, &[&[0x00][..], &counts, &(0..12).collect::<Vec<u8>>()].concat()));
    let mut counts = [0u8; 16];
    counts[0] = 1;
    bytes.extend(segment(0xc4, &[&[0x10][..], &counts, &[0]].concat()));
    let scan: Vec<u8> = (1..=4).flat_map(|id| [id, 0]).collect();
    bytes.extend(segment(0xda, &[&[4][..], &scan, &[0, 63, 0]].concat()));
    // A block of one value v has the DC coefficient 8 · (v − 128).
    let mut bits = String::new();
    for value in values {
        let dc = 8 * (i32::from(value) - 128);
        let length = 32 - dc.unsigned_abs().leading_zeros();
        let code = if dc < 0 { dc + (1 << length) - 1 } else { dc };
        bits += &format!("{length:04b}");
        if length > 0 {
            bits += &format!("{code:0width$b}", width = length as usize);
        }
        bits.push('0');
    }
    while !bits.len().is_multiple_of(8) {
        bits.push('1');
    }
    for byte in bits.as_bytes().chunks(8) {
        let byte = u8::from_str_radix(std::str::from_utf8(byte).unwrap(), 2).unwrap();
        bytes.push(byte);
        if byte == 0xff {
            bytes.push(0);
        }
    }
    bytes.extend([0xff, 0xd9]);
    bytes
}

// ---- what must be read ----

#[test]
fn lossless_kinds_give_the_same_pixels() {
    let image = gradient(23, 17);
    for format in [ImageFormat::Png, ImageFormat::Bmp, ImageFormat::Tiff, ImageFormat::WebP] {
        assert_eq!(decode_image(&encoded(image.clone(), format), "photo").unwrap(), image, "{format:?}");
    }
    // The extension does not matter.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("photo.jpg");
    std::fs::write(&path, encoded(image.clone(), ImageFormat::Png)).unwrap();
    assert_eq!(read_image(&path).unwrap(), image);
}

#[test]
fn alpha_is_dropped_and_grey_repeated() {
    let rgba = RgbaImage::from_fn(3, 2, |x, y| Rgba([x as u8, y as u8, 77, (x * 50) as u8]));
    let found = decode_image(&encoded(rgba, ImageFormat::Png), "photo").unwrap();
    assert_eq!(found.get_pixel(0, 1).0, [0, 1, 77], "a transparent pixel keeps its colour");
    let grey = ImageBuffer::from_fn(3, 2, |x, _| Luma([x as u8 * 40]));
    assert_eq!(decode_image(&encoded(grey, ImageFormat::Png), "photo").unwrap().get_pixel(2, 0).0, [80; 3]);
    let grey_alpha = ImageBuffer::from_fn(3, 2, |x, _| LumaA([x as u8 * 40, 0]));
    assert_eq!(
        decode_image(&encoded(grey_alpha, ImageFormat::Png), "photo").unwrap().get_pixel(2, 0).0,
        [80; 3]
    );
}

#[test]
fn sixteen_bits_keep_the_high_byte() {
    // 0x80ff would round to 0x81.
    let wide = ImageBuffer::from_pixel(2, 2, Rgb([0x80ffu16, 0x00fe, 0xffff]));
    let found = decode_image(&encoded(wide, ImageFormat::Png), "photo").unwrap();
    assert_eq!(found.get_pixel(1, 1).0, [0x80, 0, 0xff]);
    let alpha = ImageBuffer::from_pixel(2, 2, Rgba([0x80ffu16, 0x00fe, 0xffff, 0]));
    assert_eq!(
        decode_image(&encoded(alpha, ImageFormat::Png), "photo").unwrap().get_pixel(0, 0).0,
        [0x80, 0, 0xff]
    );
    let grey = ImageBuffer::from_pixel(2, 2, Luma([0x80ffu16]));
    assert_eq!(decode_image(&encoded(grey, ImageFormat::Png), "photo").unwrap().get_pixel(0, 0).0, [0x80; 3]);
}

#[test]
fn palettes_are_looked_up() {
    let palette = (b"PLTE", vec![1, 2, 3, 10, 20, 30, 100, 110, 120]);
    let transparency = (b"tRNS", vec![0, 128, 255]);
    let pixels = (b"IDAT", stored(&[&[0, 1], &[2, 0]]));
    for chunks in [vec![palette.clone(), pixels.clone()], vec![palette.clone(), transparency, pixels]] {
        let found = decode_image(&png((2, 2, 8, 3), &chunks), "photo").unwrap();
        assert_eq!(found.as_raw(), &[1, 2, 3, 10, 20, 30, 100, 110, 120, 1, 2, 3]);
    }
    let bits = decode_image(&png((4, 1, 1, 0), &[(b"IDAT", stored(&[&[0b0110_0000]]))]), "photo").unwrap();
    assert_eq!(bits.as_raw(), &[0, 0, 0, 255, 255, 255, 255, 255, 255, 0, 0, 0]);
}

#[test]
fn cmyk_jpeg_becomes_rgb() {
    // Inverted CMYK: red is the paper's cyan times its black.
    let found = decode_image(&cmyk_jpeg([255, 128, 0, 255]), "photo").unwrap();
    assert_eq!(found.dimensions(), (8, 8));
    for (found, expected) in found.get_pixel(3, 3).0.into_iter().zip([255u8, 128, 0]) {
        assert!(found.abs_diff(expected) <= 1, "{found} {expected}");
    }
    let dark = decode_image(&cmyk_jpeg([200, 100, 50, 128]), "photo").unwrap();
    for (found, expected) in dark.get_pixel(0, 0).0.into_iter().zip([100u8, 50, 25]) {
        assert!(found.abs_diff(expected) <= 1, "{found} {expected}");
    }
}

#[test]
fn of_an_animation_the_first_frame_is_used() {
    let mut bytes = Vec::new();
    let mut encoder = GifEncoder::new(&mut bytes);
    for colour in [[255, 0, 0, 255], [0, 0, 255, 255]] {
        encoder.encode_frame(Frame::new(RgbaImage::from_pixel(4, 4, Rgba(colour)))).unwrap();
    }
    drop(encoder);
    assert!(decode_image(&bytes, "photo").unwrap().pixels().all(|p| p.0 == [255, 0, 0]));
}

fn jpeg(image: &RgbImage) -> Vec<u8> {
    let mut bytes = Vec::new();
    JpegEncoder::new_with_quality(&mut bytes, 95).encode_image(image).unwrap();
    bytes
}

#[test]
fn exif_orientation_is_ignored() {
    let plain = jpeg(&gradient(32, 16));
    // Orientation 6 (turn right) in a minimal EXIF segment behind the start marker.
    let tiff = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0";
    let mut turned = plain[..2].to_vec();
    turned.extend([0xff, 0xe1]);
    turned.extend((tiff.len() as u16 + 2).to_be_bytes());
    turned.extend(tiff);
    turned.extend(&plain[2..]);
    assert_eq!(decode_image(&turned, "photo").unwrap(), decode_image(&plain, "photo").unwrap());
    assert_eq!(decode_image(&turned, "photo").unwrap().dimensions(), (32, 16));
}

// ---- what must be refused ----

#[test]
fn files_that_are_not_pictures() {
    assert!(refusal(b"").contains("empty"));
    assert!(refusal(b"%PDF-1.7 hello").contains("not a picture"));
    assert!(refusal(b"\x89PNG\r\n\x1a\n").contains("truncated"));
    assert!(refusal(b"\xff\xd8\xff\xe0").contains("JPEG"));
    let folder = tempfile::tempdir().unwrap();
    let inside = folder.path().join("photo");
    std::fs::create_dir(&inside).unwrap();
    assert!(explained(read_image(&inside).unwrap_err()).contains("folder"));
    assert!(matches!(read_image(folder.path().join("absent.png")), Err(Error::Io { .. })));
}

#[test]
fn truncated_pictures() {
    let image = gradient(64, 48);
    for format in [ImageFormat::Png, ImageFormat::WebP, ImageFormat::Bmp, ImageFormat::Tiff, ImageFormat::Gif]
    {
        let bytes = encoded(image.clone(), format);
        for part in [4, 3, 2] {
            refusal(&bytes[..bytes.len() * (part - 1) / part]);
        }
    }
    let bytes = jpeg(&image);
    assert!(decode_image(&bytes, "photo").is_ok());
    for length in 2..bytes.len() {
        refusal(&bytes[..length]);
    }
    assert!(refusal(&bytes[..bytes.len() / 2]).contains("truncated"));
}

#[test]
fn pictures_without_pixels() {
    for (width, height) in [(0, 5), (5, 0), (0, 0)] {
        refusal(&png((width, height, 8, 2), &[(b"IDAT", stored(&[]))]));
    }
}

#[test]
fn headers_that_promise_too_much() {
    let bomb = png((60_000, 60_000, 8, 2), &[(b"IDAT", stored(&[&[0; 30]]))]);
    assert!(refusal(&bomb).contains("32768"));
    // Within the longest side, but too many pixels.
    let bomb = png((30_000, 30_000, 8, 2), &[(b"IDAT", stored(&[&[0; 30]]))]);
    assert!(refusal(&bomb).contains("30000 × 30000"));
    let mut bomb = jpeg(&gradient(16, 16));
    let size = bomb.windows(2).position(|w| w == [0xff, 0xc0]).unwrap() + 5;
    bomb[size..size + 4].copy_from_slice(&[0xff, 0xff, 0xff, 0xff]);
    refusal(&bomb);
    let mut bomb = encoded(gradient(16, 16), ImageFormat::Bmp);
    bomb[18..26].copy_from_slice(&[0x00, 0x70, 0, 0, 0x00, 0x70, 0, 0]);
    refusal(&bomb);
    let mut bomb = encoded(gradient(16, 16), ImageFormat::Gif);
    bomb[6..10].copy_from_slice(&[0xff; 4]);
    refusal(&bomb);
    let limits = Limits { side: 10, pixels: 80, bytes: 1 << 20 };
    assert!(decode_image_with(&encoded(gradient(10, 8), ImageFormat::Png), "photo", &limits).is_ok());
    for (width, height) in [(11, 1), (10, 9)] {
        let bytes = encoded(gradient(width, height), ImageFormat::Png);
        explained(decode_image_with(&bytes, "photo", &limits).unwrap_err());
    }
    let limits = Limits { bytes: 20, ..limits };
    assert!(explained(decode_image_with(&[0; 21], "photo", &limits).unwrap_err()).contains("21 bytes"));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damage_never_panics(
        which in 0usize..6, changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8), keep in 1usize..=100,
    ) {
        let image = gradient(16, 12);
        let formats = [ImageFormat::Png, ImageFormat::WebP, ImageFormat::Bmp, ImageFormat::Tiff, ImageFormat::Gif];
        let mut bytes = formats.get(which).map_or_else(|| jpeg(&image), |&format| encoded(image.clone(), format));
        bytes.truncate(bytes.len() * keep / 100);
        for (at, value) in changes {
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
        }
        match decode_image(&bytes, "photo") {
            Ok(found) => prop_assert!(found.width() > 0 && found.height() > 0),
            Err(error) => prop_assert!(matches!(error, Error::Image { .. }), "{error:?}"),
        }
    }
}
