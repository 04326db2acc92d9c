//! Answers as text and as JSON.

use std::fmt::Write;
use std::time::Duration;

use flmm::grounder::{GroundedAnswer, GroundedPhrase};
use flmm::masks::Segmentation;
use flmm::overlay::{Region, colour};
use image::RgbImage;
use serde::Serialize;

use crate::failure::Result;

/// The object that `--json` prints; the order of its keys is part of the format (docs/json.md).
#[derive(Serialize)]
struct Report<'a> {
    model: &'a str,
    image: Size,
    #[serde(skip_serializing_if = "Option::is_none")]
    ground_image: Option<usize>,
    answer: &'a str,
    phrases: Vec<Phrase<'a>>,
    timings_ms: Timings,
}

#[derive(Serialize)]
struct Size {
    width: u32,
    height: u32,
}

#[derive(Serialize)]
struct Phrase<'a> {
    text: &'a str,
    start: usize,
    end: usize,
    tokens: [usize; 2],
    score: f64,
    bbox: [usize; 4],
    area: usize,
    segmentation: Segmentation,
    coarse: Segmentation,
}

#[derive(Serialize)]
struct Timings {
    read: f64,
    generate: f64,
    encode: f64,
    segment: f64,
    total: f64,
}

/// One line of JSON. `number` tells which picture `image` is, where there are several.
pub(crate) fn json(
    model: &str,
    (image, number): (&RgbImage, Option<usize>),
    answer: &GroundedAnswer,
) -> Result<String> {
    let t = &answer.timings;
    let ms = |time: Duration| (time.as_secs_f64() * 1e4).round() / 10.0;
    let report = Report {
        model,
        image: Size { width: image.width(), height: image.height() },
        ground_image: number,
        answer: &answer.answer,
        phrases: answer.phrases.iter().map(phrase).collect::<Result<_>>()?,
        timings_ms: Timings {
            read: ms(t.read),
            generate: ms(t.generate),
            encode: ms(t.encode),
            segment: ms(t.segment),
            total: ms(t.read + t.generate + t.encode + t.segment),
        },
    };
    serde_json::to_string(&report).map_err(|e| crate::Failure::other(format!("cannot write JSON: {e}")))
}

fn phrase(phrase: &GroundedPhrase) -> Result<Phrase<'_>> {
    Ok(Phrase {
        text: &phrase.text,
        start: phrase.start,
        end: phrase.end,
        tokens: [phrase.tokens.0, phrase.tokens.1],
        // Six digits: more than the number means, fewer than the noise of another machine.
        score: (f64::from(phrase.score) * 1e6).round() / 1e6,
        bbox: phrase.mask.bbox(),
        area: phrase.mask.area(),
        segmentation: phrase.mask.to_coco()?,
        coarse: phrase.coarse_mask.to_coco()?,
    })
}

/// The answer with its phrases marked: in colour with their numbers, or as `[phrase]¹` and a list of the masks.
pub(crate) fn text(answer: &GroundedAnswer, coloured: bool) -> String {
    let mut out = marked(&answer.answer, &answer.phrases, coloured);
    if !coloured && !answer.phrases.is_empty() {
        out.push('\n');
        for (i, phrase) in answer.phrases.iter().enumerate() {
            let [x, y, w, h] = phrase.mask.bbox();
            let pixels = (phrase.mask.width() * phrase.mask.height()) as f64;
            let share = 100.0 * phrase.mask.area() as f64 / pixels;
            let place = match phrase.mask.area() {
                0 => "nothing found".to_owned(),
                _ => format!("{w}×{h} at {x},{y}, {share:.1} % of the picture"),
            };
            let _ =
                write!(out, "\n{} {}: {place}, score {:.2}", superscript(i + 1), phrase.text, phrase.score);
        }
    }
    out
}

fn marked(answer: &str, phrases: &[GroundedPhrase], coloured: bool) -> String {
    let chars: Vec<char> = answer.chars().collect();
    let mut out = String::new();
    for at in 0..=chars.len() {
        // Inner phrases close first and open last.
        let mut closing: Vec<usize> = (0..phrases.len()).filter(|&p| phrases[p].end == at).collect();
        closing.sort_by_key(|&p| std::cmp::Reverse(phrases[p].start));
        for p in closing {
            let number = superscript(p + 1);
            out.push_str(&if coloured { format!("\x1b[0m{number}") } else { format!("]{number}") });
        }
        let mut opening: Vec<usize> = (0..phrases.len()).filter(|&p| phrases[p].start == at).collect();
        opening.sort_by_key(|&p| std::cmp::Reverse(phrases[p].end));
        for p in opening {
            let [r, g, b] = colour(p);
            out.push_str(&if coloured { format!("\x1b[1;38;2;{r};{g};{b}m") } else { "[".to_owned() });
        }
        out.extend(chars.get(at).map(|&c| printable(c)));
    }
    out
}

/// Control characters of a model's answer must not steer the terminal.
fn printable(c: char) -> char {
    if c.is_control() && !matches!(c, '\n' | '\t') { '\u{fffd}' } else { c }
}

fn superscript(number: usize) -> String {
    const DIGITS: [char; 10] = ['⁰', '¹', '²', '³', '⁴', '⁵', '⁶', '⁷', '⁸', '⁹'];
    number.to_string().bytes().map(|digit| DIGITS[usize::from(digit - b'0')]).collect()
}

/// The picture with the masks of an answer.
pub(crate) fn overlay(image: &RgbImage, answer: &GroundedAnswer) -> Result<RgbImage> {
    let regions: Vec<Region> = answer
        .phrases
        .iter()
        .map(|phrase| Region { mask: &phrase.mask, chars: phrase.start..phrase.end })
        .collect();
    Ok(flmm::overlay::draw(image, &answer.answer, &regions)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use flmm::masks::Mask;

    fn grounded(text: &str, start: usize, end: usize) -> GroundedPhrase {
        GroundedPhrase {
            text: text.into(),
            start,
            end,
            tokens: (0, 1),
            score: 0.5,
            mask: Mask::from_fn(4, 2, |x, _| x == 1),
            coarse_mask: Mask::empty(4, 2),
            maps: None,
        }
    }

    #[test]
    fn phrases_are_marked_and_listed() {
        let answer = GroundedAnswer {
            answer: "A Käfer, a cat.\u{1b}[31m".into(),
            token_ids: Vec::new(),
            phrases: vec![grounded("A Käfer", 0, 7), grounded("a cat", 9, 14)],
            timings: Default::default(),
        };
        assert_eq!(
            text(&answer, false),
            "[A Käfer]¹, [a cat]².\u{fffd}[31m\n\n¹ A Käfer: 1×2 at 1,0, 25.0 % of the picture, score 0.50\
             \n² a cat: 1×2 at 1,0, 25.0 % of the picture, score 0.50"
        );
        assert!(text(&answer, true).starts_with("\x1b[1;38;2;0;114;178mA Käfer\x1b[0m¹, "));
        assert_eq!(superscript(120), "¹²⁰");
    }
}
