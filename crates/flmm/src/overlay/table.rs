//! A table of numbers as a picture: one coloured cell per number, rows and columns numbered.

use image::{Rgb, RgbImage};
use noto_sans_mono_bitmap::{FontWeight, RasterHeight};

use super::canvas::{self, Font};
use super::heat::ramp;

const LABEL: Font = Font { weight: FontWeight::Regular, height: RasterHeight::Size20, zoom: 1 };
const INK: [u8; 3] = [33, 33, 36];
const GAP: u32 = 8;
/// Side of a cell: small tables have large cells.
const CELLS: [u32; 2] = [12, 28];
/// Width that a table should have about.
const WIDTH: u32 = 900;
/// Digits of the scale's ends.
const SCALE_LETTERS: usize = 6;

/// `rows` of numbers as cells between the colours of `low` and `high`; values outside have the colour of the nearer end,
/// a value that is not a number is grey. Row and column numbers stand beside every fourth, or every, row and column. The
/// scale is below.
pub fn heat_table(rows: &[Vec<f64>], (low, high): (f64, f64)) -> RgbImage {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0) as u32;
    let cell = (WIDTH / columns.max(1)).clamp(CELLS[0], CELLS[1]);
    let (letter_width, letter_height) = LABEL.cell();
    let (letter_width, letter_height) = (letter_width as u32, letter_height as u32);
    let left = 3 * letter_width + GAP;
    let top = letter_height + GAP;
    let smallest = 2 * (SCALE_LETTERS as u32 * letter_width) + 10 * GAP;
    let width = (left + columns * cell + GAP).max(smallest);
    let table_height = rows.len() as u32 * cell;
    let mut canvas =
        RgbImage::from_pixel(width, top + table_height + 3 * GAP + letter_height, Rgb([250, 250, 248]));
    let every = if cell >= 2 * letter_width { 1 } else { 4 };
    let write = |canvas: &mut RgbImage, text: &str, x: u32, y: u32| {
        for (i, letter) in text.chars().enumerate() {
            canvas::letter(
                canvas,
                letter,
                (i64::from(x + i as u32 * letter_width), i64::from(y)),
                LABEL,
                INK,
            );
        }
    };
    for column in (0..columns).step_by(every) {
        write(&mut canvas, &column.to_string(), left + column * cell, 0);
    }
    let level = |value: f64| ((value - low) / (high - low).max(f64::MIN_POSITIVE)).clamp(0.0, 1.0) as f32;
    for (r, row) in rows.iter().enumerate() {
        let y = top + r as u32 * cell;
        if r % every.max(letter_height.div_ceil(cell) as usize) == 0 {
            write(&mut canvas, &format!("{r:>3}"), 0, y);
        }
        for (c, &value) in row.iter().enumerate() {
            let colour = if value.is_nan() { [190; 3] } else { ramp(level(value)) };
            fill(&mut canvas, [left + c as u32 * cell, y, cell - 1, cell - 1], colour);
        }
    }
    // The scale: its ends in numbers, between them the colours.
    let (y, number) = (top + table_height + 2 * GAP, SCALE_LETTERS as u32 * letter_width);
    write(&mut canvas, &format!("{low:>6.3}"), 0, y);
    let bar = (width - 2 * number - 3 * GAP).min(300);
    for x in 0..bar {
        fill(&mut canvas, [number + GAP + x, y, 1, letter_height], ramp(x as f32 / bar.max(2) as f32));
    }
    write(&mut canvas, &format!("{high:.3}"), number + 2 * GAP + bar, y);
    canvas
}

fn fill(canvas: &mut RgbImage, [x, y, width, height]: [u32; 4], colour: [u8; 3]) {
    for (x, y) in (y..y + height).flat_map(|y| (x..x + width).map(move |x| (x, y))) {
        if let Some(pixel) = canvas.get_pixel_mut_checked(x, y) {
            *pixel = Rgb(colour);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_number_is_the_brightest_and_odd_tables_are_drawn() {
        let table = heat_table(&[vec![0.0, 1.0], vec![f64::NAN, 0.5]], (0.0, 1.0));
        let colours: std::collections::HashSet<[u8; 3]> = table.pixels().map(|p| p.0).collect();
        assert!(colours.contains(&ramp(0.0)) && colours.contains(&ramp(1.0)) && colours.contains(&[190; 3]));
        heat_table(&[], (0.0, 0.0));
        heat_table(&vec![vec![1.0; 200]; 40], (f64::NAN, f64::NAN));
    }
}
