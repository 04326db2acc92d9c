//! Composing a scene: where objects go, and painting them back to front with exact visible masks.

use super::catalog::{Class, Colour, Level, classes};
use super::dice::{Dice, cos, sin};
use super::sprites::{self, Raster};
use super::texture::{self, Background};
use crate::mask::Mask;
use image::RgbImage;

/// One countable thing of a scene.
#[derive(Debug, Clone)]
pub struct Object {
    /// Index into [`classes`](super::classes).
    pub class: usize,
    /// The colour that texts name, for classes that come in several.
    pub colour: Option<Colour>,
    /// The visible pixels.
    pub mask: Mask,
    /// Tight box of the visible pixels: x, y, width, height.
    pub bbox: [u32; 4],
    /// Number of visible pixels.
    pub area: u32,
    /// Number of pixels it would have if nothing lay in front of it.
    pub full_area: u32,
    /// Painter's order: an object with a larger number lies in front. Equals its index in the scene.
    pub depth: usize,
    /// Rotation in degrees, clockwise.
    pub angle: f64,
    /// Whether it is mirrored left to right.
    pub flipped: bool,
}

impl Object {
    /// Its class.
    pub fn class(&self) -> &'static Class {
        &classes(Level::Two)[self.class]
    }
}

/// One background region.
#[derive(Debug, Clone)]
pub struct StuffRegion {
    /// Index into [`stuff_classes`](super::stuff_classes).
    pub class: usize,
    /// The visible pixels.
    pub mask: Mask,
}

/// A scene before anything is said about it.
pub(super) struct Painted {
    pub(super) image: RgbImage,
    pub(super) objects: Vec<Object>,
    pub(super) stuff: Vec<StuffRegion>,
    /// `covered[a][b]`: pixels of object `a` that object `b`, in front of it, hides.
    pub(super) covered: Vec<Vec<u32>>,
}

/// Most objects of a scene: the numbers that texts name end here.
const MOST_OBJECTS: usize = 6;

/// How a level composes scenes. Lengths are fractions of the picture's shorter side.
struct Rules {
    /// Weights of 1, 2, 3 … objects.
    counts: &'static [f64],
    /// Chance that a scene of two or more objects holds copies of a class.
    copies: f64,
    /// Longest side of an object.
    size: (f64, f64),
    /// Largest overlap of two boxes, relative to the smaller one.
    overlap: f64,
    /// Smallest visible share of an object.
    visible: f64,
}

fn rules(level: Level) -> Rules {
    match level {
        Level::One => Rules {
            counts: &[0.25, 0.40, 0.35],
            copies: 0.35,
            size: (0.25, 0.48),
            overlap: 0.15,
            visible: 0.8,
        },
        Level::Two => Rules {
            counts: &[0.0, 0.15, 0.25, 0.25, 0.2, 0.15],
            copies: 0.45,
            size: (0.17, 0.40),
            overlap: 0.45,
            visible: 0.55,
        },
    }
}

/// What an object is, before it has a place.
#[derive(Clone, Copy)]
struct Kind {
    class: usize,
    sprite: usize,
}

/// Where an object is: centre and longest side in pixels.
#[derive(Clone, Copy)]
struct Place {
    x: f64,
    y: f64,
    side: f64,
    angle: f64,
    flipped: bool,
}

/// Composes and paints a scene of this size (width, height), of so many objects at least and at most.
pub(super) fn paint(
    dice: &mut Dice,
    level: Level,
    objects: Option<[usize; 2]>,
    (width, height): (u32, u32),
) -> Painted {
    let rules = rules(level);
    let background = texture::background(dice, width as usize, height as usize);
    let mut count = match objects {
        None => dice.weighted(rules.counts) + 1,
        Some([fewest, most]) => {
            let fewest = fewest.clamp(1, MOST_OBJECTS);
            fewest + dice.below(most.clamp(fewest, MOST_OBJECTS) - fewest + 1)
        }
    };
    let mut attempts = 0;
    loop {
        let kinds = choose_kinds(dice, level, count, rules.copies);
        if let Some(places) = arrange(dice, &kinds, &rules, width, height) {
            let painted = render(&background, &kinds, &places, width, height);
            let seen =
                |object: &Object| f64::from(object.area) >= rules.visible * f64::from(object.full_area);
            // A single object always fits, so the loop ends.
            if count == 1 || painted.objects.iter().all(seen) {
                return painted;
            }
        }
        attempts += 1;
        if attempts % 20 == 0 && count > 1 {
            count -= 1;
        }
    }
}

fn choose_kinds(dice: &mut Dice, level: Level, count: usize, copies: f64) -> Vec<Kind> {
    let all = classes(level);
    let mut order: Vec<usize> = (0..all.len()).collect();
    dice.shuffle(&mut order);
    let mut chosen = order[..count].to_vec();
    if count >= 2 && dice.chance(copies) {
        let same = 2 + dice.below(2.min(count - 1));
        for i in 1..same {
            chosen[i] = chosen[0];
        }
        dice.shuffle(&mut chosen);
    }
    chosen.into_iter().map(|class| Kind { class, sprite: dice.below(all[class].sprites.len()) }).collect()
}

/// Finds a place for every object, or gives up.
fn arrange(dice: &mut Dice, kinds: &[Kind], rules: &Rules, width: u32, height: u32) -> Option<Vec<Place>> {
    let (w, h) = (f64::from(width), f64::from(height));
    let short = w.min(h);
    let mut places: Vec<Place> = Vec::with_capacity(kinds.len());
    let mut boxes: Vec<[f64; 4]> = Vec::with_capacity(kinds.len());
    for kind in kinds {
        let side = short * dice.range(rules.size.0, rules.size.1);
        let (angle, flipped) = (dice.range(-20.0, 20.0), dice.chance(0.5));
        let (box_w, box_h) = extent(sprites::raster(kind.class, kind.sprite, side), side, angle);
        let mut found = None;
        for _ in 0..30 {
            let x = dice.range(box_w / 2.0 + 2.0, (w - box_w / 2.0 - 2.0).max(box_w / 2.0 + 2.5));
            let y = dice.range(box_h / 2.0 + 2.0, (h - box_h / 2.0 - 2.0).max(box_h / 2.0 + 2.5));
            let candidate = [x - box_w / 2.0, y - box_h / 2.0, x + box_w / 2.0, y + box_h / 2.0];
            if boxes.iter().all(|other| overlap(other, &candidate) <= rules.overlap) {
                found = Some((Place { x, y, side, angle, flipped }, candidate));
                break;
            }
        }
        let (place, candidate) = found?;
        places.push(place);
        boxes.push(candidate);
    }
    Some(places)
}

/// Width and height of the box around a rotated sprite.
fn extent(raster: &Raster, side: f64, angle: f64) -> (f64, f64) {
    let scale = side / f64::from(raster.side());
    let (w, h) = (f64::from(raster.width - 2) * scale, f64::from(raster.height - 2) * scale);
    let (s, c) = (sin(angle.to_radians()).abs(), cos(angle.to_radians()).abs());
    (w * c + h * s, w * s + h * c)
}

/// Intersection of two boxes (x0, y0, x1, y1) relative to the smaller one.
fn overlap(a: &[f64; 4], b: &[f64; 4]) -> f64 {
    let w = (a[2].min(b[2]) - a[0].max(b[0])).max(0.0);
    let h = (a[3].min(b[3]) - a[1].max(b[1])).max(0.0);
    let area = |r: &[f64; 4]| (r[2] - r[0]) * (r[3] - r[1]);
    w * h / area(a).min(area(b))
}

/// Paints the objects in order. A pixel belongs to the last object that covers at least half of it.
fn render(background: &Background, kinds: &[Kind], places: &[Place], width: u32, height: u32) -> Painted {
    let (w, h) = (width as usize, height as usize);
    let mut canvas = background.pixels.clone();
    let mut owner: Vec<Option<usize>> = vec![None; w * h];
    let mut covers: Vec<Vec<usize>> = Vec::with_capacity(kinds.len());
    for (index, (kind, place)) in kinds.iter().zip(places).enumerate() {
        let raster = sprites::raster(kind.class, kind.sprite, place.side);
        let mut cover = Vec::new();
        stamp(raster, place, w, h, |at, [r, g, b, alpha]| {
            let keep = 1.0 - alpha / 255.0;
            let under = canvas[at];
            canvas[at] = [r + under[0] * keep, g + under[1] * keep, b + under[2] * keep];
            if alpha >= 127.5 {
                owner[at] = Some(index);
                cover.push(at);
            }
        });
        covers.push(cover);
    }
    let bytes = canvas.iter().flat_map(|pixel| pixel.map(|c| (c + 0.5).clamp(0.0, 255.0) as u8)).collect();
    let image = RgbImage::from_raw(width, height, bytes).expect("three bytes for every pixel");

    let mask = |keep: &dyn Fn(usize) -> bool| Mask { width, height, data: (0..w * h).map(keep).collect() };
    let mut covered = vec![vec![0; kinds.len()]; kinds.len()];
    let mut covers_at = vec![vec![false; w * h]; kinds.len()];
    for (cover, flags) in covers.iter().zip(&mut covers_at) {
        cover.iter().for_each(|&at| flags[at] = true);
    }
    for (a, cover) in covers.iter().enumerate() {
        for (b, flags) in covers_at.iter().enumerate().skip(a + 1) {
            covered[a][b] = cover.iter().filter(|&&at| flags[at]).count() as u32;
        }
    }
    let objects = kinds.iter().zip(places).enumerate().map(|(index, (kind, place))| {
        let mask = mask(&|at| owner[at] == Some(index));
        Object {
            class: kind.class,
            colour: classes(Level::Two)[kind.class].sprites[kind.sprite].colour,
            bbox: mask.bbox(),
            area: mask.area(),
            mask,
            full_area: covers[index].len() as u32,
            depth: index,
            angle: place.angle,
            flipped: place.flipped,
        }
    });
    let objects = objects.collect();
    let stuff = background.classes.iter().enumerate().map(|(region, &class)| StuffRegion {
        class,
        mask: mask(&|at| owner[at].is_none() && usize::from(background.owner[at]) == region),
    });
    Painted { image, objects, stuff: stuff.collect(), covered }
}

/// Resamples a sprite at its place: calls `put(pixel index, premultiplied RGBA)` for every pixel it touches.
fn stamp(raster: &Raster, place: &Place, width: usize, height: usize, mut put: impl FnMut(usize, [f32; 4])) {
    let (box_w, box_h) = extent(raster, place.side, place.angle);
    let clip = |value: f64, end: usize| value.max(0.0).min(end as f64) as usize;
    let (x0, x1) = (clip(place.x - box_w / 2.0 - 2.0, width), clip(place.x + box_w / 2.0 + 3.0, width));
    let (y0, y1) = (clip(place.y - box_h / 2.0 - 2.0, height), clip(place.y + box_h / 2.0 + 3.0, height));
    let (s, c) = (sin(place.angle.to_radians()), cos(place.angle.to_radians()));
    let zoom = f64::from(raster.side()) / place.side;
    let (centre_u, centre_v) = (f64::from(raster.width) / 2.0, f64::from(raster.height) / 2.0);
    for y in y0..y1 {
        for x in x0..x1 {
            let (dx, dy) = (x as f64 + 0.5 - place.x, y as f64 + 0.5 - place.y);
            let (mut u, v) = (zoom * (c * dx + s * dy), zoom * (c * dy - s * dx));
            if place.flipped {
                u = -u;
            }
            if let Some(colour) = raster.sample((centre_u + u - 0.5) as f32, (centre_v + v - 0.5) as f32) {
                put(y * width + x, colour);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visible_masks_equal_the_painters_order() {
        for seed in 0..30 {
            let mut dice = Dice::new([seed; 32], 0);
            let (width, height) = (160, 120);
            let background = texture::background(&mut dice, width as usize, height as usize);
            let kinds = choose_kinds(&mut dice, Level::Two, 4, 0.5);
            // Places at random, overlapping freely.
            let places: Vec<Place> = (0..4)
                .map(|_| Place {
                    x: dice.range(20.0, 140.0),
                    y: dice.range(20.0, 100.0),
                    side: dice.range(30.0, 70.0),
                    angle: dice.range(-20.0, 20.0),
                    flipped: dice.chance(0.5),
                })
                .collect();
            let together = render(&background, &kinds, &places, width, height);
            let alone: Vec<Mask> = (0..4)
                .map(|i| {
                    render(&background, &kinds[i..=i], &places[i..=i], width, height).objects[0].mask.clone()
                })
                .collect();
            for (i, object) in together.objects.iter().enumerate() {
                let expected: Vec<bool> = (0..(width * height) as usize)
                    .map(|at| alone[i].data[at] && !alone[i + 1..].iter().any(|front| front.data[at]))
                    .collect();
                assert!(object.mask.data == expected, "object {i} of seed {seed}");
                assert_eq!(object.full_area, alone[i].area());
                for (j, front) in alone.iter().enumerate().skip(i + 1) {
                    let both = alone[i].data.iter().zip(&front.data).filter(|(a, b)| **a && **b).count();
                    assert_eq!(together.covered[i][j] as usize, both);
                }
            }
        }
    }
}
