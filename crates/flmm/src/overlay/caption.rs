//! The answer below the picture: wrapped words, phrases on their colour, numbers that point to the masks.

use image::{Rgb, RgbImage};
use noto_sans_mono_bitmap::{FontWeight, RasterHeight};

use super::canvas::{self, Font};
use super::{Region, colour, ink_on};

const PAPER: [u8; 3] = [250, 250, 248];
const INK: [u8; 3] = [33, 33, 36];

/// Letter sizes of one picture.
pub(super) struct Style {
    font: Font,
    bold: Font,
}

/// One letter cell of the answer.
#[derive(Clone, Copy, PartialEq)]
enum Cell {
    Letter(char, Option<usize>),
    /// The number of a phrase, right behind it; two cells wide.
    Number(usize),
}

impl Cell {
    fn columns(self) -> usize {
        match self {
            Self::Letter(..) => 1,
            Self::Number(_) => 2,
        }
    }

    fn is_space(self) -> bool {
        matches!(self, Self::Letter(c, _) if c.is_whitespace())
    }

    fn owner(self) -> Option<usize> {
        match self {
            Self::Letter(_, owner) => owner,
            Self::Number(_) => None,
        }
    }
}

impl Style {
    /// Letters that suit a picture of this width.
    pub(super) fn for_width(width: usize) -> Self {
        let (height, zoom) = match width {
            0..900 => (RasterHeight::Size20, 1),
            900..2400 => (RasterHeight::Size32, 1),
            _ => (RasterHeight::Size32, width as i64 / 1200),
        };
        let font = |weight| Font { weight, height, zoom };
        Self { font: font(FontWeight::Regular), bold: font(FontWeight::Bold) }
    }

    /// Radius of the number badges on the picture.
    pub(super) fn badge_radius(&self) -> i64 {
        self.font.cell().1 * 3 / 5
    }

    /// Phrase number `index + 1` on a disc of its colour.
    pub(super) fn badge(&self, canvas: &mut RgbImage, at: (i64, i64), index: usize) {
        let radius = self.badge_radius() as f32;
        canvas::disc(canvas, at, radius + 1.5, [255; 3]);
        canvas::disc(canvas, at, radius, colour(index));
        self.number(canvas, at, index, ink_on(colour(index)));
    }

    /// Digits centred on a point.
    fn number(&self, canvas: &mut RgbImage, (cx, cy): (i64, i64), index: usize, ink: [u8; 3]) {
        let digits = (index + 1).to_string();
        let (w, h) = self.bold.cell();
        let left = cx - w * digits.len() as i64 / 2;
        for (i, digit) in digits.chars().enumerate() {
            canvas::letter(canvas, digit, (left + i as i64 * w, cy - h / 2), self.bold, ink);
        }
    }

    /// The strip with the answer, `width` pixels wide.
    pub(super) fn strip(&self, width: usize, answer: &str, regions: &[Region]) -> RgbImage {
        let (cell_width, cell_height) = self.font.cell();
        let (margin, leading) = (cell_width, cell_height * 3 / 2);
        let columns = ((width as i64 - 2 * margin) / cell_width).max(4) as usize;
        let lines = wrap(&cells(answer.trim_end(), regions), columns);
        let height = lines.len() as i64 * leading + 2 * margin - (leading - cell_height);
        let mut strip = RgbImage::from_pixel(width as u32, height.max(1) as u32, Rgb(PAPER));
        for (row, line) in lines.iter().enumerate() {
            self.line(&mut strip, (margin, margin + row as i64 * leading), line);
        }
        strip
    }

    fn line(&self, strip: &mut RgbImage, (left, top): (i64, i64), line: &[Cell]) {
        let (cell_width, cell_height) = self.font.cell();
        let pad = cell_height / 8;
        let places: Vec<i64> = line
            .iter()
            .scan(left, |x, cell| {
                let here = *x;
                *x += cell.columns() as i64 * cell_width;
                Some(here)
            })
            .collect();
        // Boxes first: letters reach a little into the neighbouring cell.
        let mut at = 0;
        while at < line.len() {
            let owner = line[at].owner();
            let run = line[at..].iter().take_while(|cell| cell.owner() == owner && owner.is_some()).count();
            if let Some(phrase) = owner {
                let place =
                    [places[at] - pad, top - pad, run as i64 * cell_width + 2 * pad, cell_height + 2 * pad];
                canvas::rounded_box(strip, place, pad as f32 * 2.0, colour(phrase));
            }
            at += run.max(1);
        }
        for (cell, &x) in line.iter().zip(&places) {
            match *cell {
                Cell::Letter(c, None) => canvas::letter(strip, c, (x, top), self.font, INK),
                Cell::Letter(c, Some(phrase)) => {
                    canvas::letter(strip, c, (x, top), self.bold, ink_on(colour(phrase)));
                }
                Cell::Number(phrase) => {
                    let centre = (x + cell_width, top + cell_height / 2);
                    let radius = (cell_height as f32 * 0.48).min(cell_width as f32 * 0.95);
                    canvas::disc(strip, centre, radius, INK);
                    self.number(strip, centre, phrase, [255; 3]);
                }
            }
        }
    }
}

/// The answer as cells; where phrases overlap, a letter belongs to the one that starts last.
fn cells(answer: &str, regions: &[Region]) -> Vec<Cell> {
    let count = answer.chars().count();
    let mut cells = Vec::new();
    for (i, c) in answer.chars().enumerate() {
        let owner = (0..regions.len())
            .filter(|&r| regions[r].chars.contains(&i))
            .max_by_key(|&r| (regions[r].chars.start, std::cmp::Reverse(regions[r].chars.end)));
        cells.push(Cell::Letter(c, owner));
        let ends = |chars: &std::ops::Range<usize>| chars.start <= i && chars.end.min(count) == i + 1;
        cells.extend((0..regions.len()).filter(|&r| ends(&regions[r].chars)).map(Cell::Number));
    }
    cells
}

/// Breaks at blanks and line ends; a word longer than a line is cut.
fn wrap(cells: &[Cell], columns: usize) -> Vec<Vec<Cell>> {
    let mut lines: Vec<Vec<Cell>> = vec![Vec::new()];
    let used = |line: &[Cell]| line.iter().map(|cell| cell.columns()).sum::<usize>();
    let mut at = 0;
    while at < cells.len() {
        let gap = cells[at..].iter().take_while(|cell| cell.is_space()).count();
        let word = cells[at + gap..].iter().take_while(|cell| !cell.is_space()).count();
        let (space, word) = cells[at..at + gap + word].split_at(gap);
        at += space.len() + word.len();
        let breaks = space.iter().filter(|cell| matches!(cell, Cell::Letter('\n', _))).count();
        let line = lines.last().map_or(&[][..], Vec::as_slice);
        let fits = used(line) + used(space) + used(word) <= columns;
        if breaks > 0 || (!fits && !line.is_empty()) {
            lines.extend(std::iter::repeat_n(Vec::new(), breaks.clamp(1, 2)));
        } else if let Some(line) = lines.last_mut() {
            line.extend(space);
        }
        for &cell in word {
            if lines.last().is_some_and(|line| used(line) + cell.columns() > columns) {
                lines.push(Vec::new());
            }
            if let Some(line) = lines.last_mut() {
                line.push(cell);
            }
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_wrap_and_long_ones_are_cut() {
        let text = |lines: Vec<Vec<Cell>>| -> Vec<String> {
            let letter = |cell: &Cell| match cell {
                Cell::Letter(c, _) => c.to_string(),
                Cell::Number(n) => format!("#{n}"),
            };
            lines.iter().map(|line| line.iter().map(letter).collect()).collect()
        };
        let mask = crate::masks::Mask::empty(1, 1);
        let regions = [Region { mask: &mask, chars: 2..5 }];
        assert_eq!(text(wrap(&cells("a dog\nabcdefghi jk", &regions), 7)), ["a dog#0", "abcdefg", "hi jk"]);
        assert_eq!(text(wrap(&cells("ab\ncd", &[]), 7)), ["ab", "cd"]);
        assert_eq!(text(wrap(&cells("", &[]), 7)), [""]);
    }
}
