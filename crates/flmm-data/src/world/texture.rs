//! Backgrounds: procedural pictures of the stuff classes, and the layout of one or two of them in a scene.

use super::catalog::stuff_index::{GRASS, ROAD, SAND, SKY, SNOW, WALL, WATER};
use super::dice::{Dice, sin};
use std::sync::OnceLock;

/// Side of the precomputed noise tiles, a power of two.
const TILE: usize = 256;

/// Tileable value noise in -1..=1, made once per process from a fixed seed.
struct Noise {
    grain: Vec<f32>,
    fine: Vec<f32>,
    soft: Vec<f32>,
    broad: Vec<f32>,
    upright: Vec<f32>,
    level: Vec<f32>,
}

fn noise() -> &'static Noise {
    static NOISE: OnceLock<Noise> = OnceLock::new();
    NOISE.get_or_init(|| {
        let mut dice = Dice::new([0x5a; 32], 0);
        let mut tile = |cell_w, cell_h| value_noise(&mut dice, cell_w, cell_h);
        Noise {
            grain: tile(1, 1),
            fine: tile(4, 4),
            soft: tile(16, 16),
            broad: tile(64, 64),
            upright: tile(2, 8),
            level: tile(32, 4),
        }
    })
}

/// A tile of random lattice values with smooth interpolation; cells of `cell_w` x `cell_h` pixels.
fn value_noise(dice: &mut Dice, cell_w: usize, cell_h: usize) -> Vec<f32> {
    let (columns, rows) = (TILE / cell_w, TILE / cell_h);
    let lattice: Vec<f32> = (0..columns * rows).map(|_| dice.range(-1.0, 1.0) as f32).collect();
    let smooth = |t: f32| t * t * (3.0 - 2.0 * t);
    let mut tile = Vec::with_capacity(TILE * TILE);
    for y in 0..TILE {
        let (r0, ty) = (y / cell_h, smooth((y % cell_h) as f32 / cell_h as f32));
        let r1 = (r0 + 1) % rows;
        for x in 0..TILE {
            let (c0, tx) = (x / cell_w, smooth((x % cell_w) as f32 / cell_w as f32));
            let c1 = (c0 + 1) % columns;
            let top = lattice[r0 * columns + c0] * (1.0 - tx) + lattice[r0 * columns + c1] * tx;
            let bottom = lattice[r1 * columns + c0] * (1.0 - tx) + lattice[r1 * columns + c1] * tx;
            tile.push(top * (1.0 - ty) + bottom * ty);
        }
    }
    tile
}

/// One stuff region's look: everything that is drawn at random for it.
struct Look {
    class: usize,
    tint: [f32; 3],
    offset: (usize, usize),
    /// Bricks or lane marks: width, height and shift in pixels.
    pattern: (f32, f32, f32),
    clouds: f32,
}

impl Look {
    fn draw(dice: &mut Dice, class: usize) -> Self {
        let shade = dice.range(0.88, 1.06);
        let tint = [0; 3].map(|_| (shade * dice.range(0.96, 1.04)) as f32);
        let offset = (dice.below(TILE), dice.below(TILE));
        let pattern =
            (dice.range(26.0, 38.0) as f32, dice.range(11.0, 15.0) as f32, dice.range(0.0, 60.0) as f32);
        Self { class, tint, offset, pattern, clouds: dice.range(-0.3, 0.35) as f32 }
    }

    /// The colour of pixel (x, y) in 0..=255; `depth` is how far down its region the pixel lies, 0..=1, and
    /// `below` how many pixels below the region's top, `height` the region's height.
    fn colour(&self, noise: &Noise, x: usize, y: usize, depth: f32, below: f32, height: f32) -> [f32; 3] {
        let at = ((y + self.offset.1) % TILE) * TILE + (x + self.offset.0) % TILE;
        let scaled = |base: [f32; 3], gain: f32| base.map(|c| c * gain);
        let mixed = |a: [f32; 3], b: [f32; 3], t: f32| [0, 1, 2].map(|k| a[k] + (b[k] - a[k]) * t);
        let colour = match self.class {
            GRASS => scaled(
                [104.0, 152.0, 72.0],
                1.0 + 0.17 * noise.upright[at] + 0.10 * noise.soft[at] + 0.05 * noise.grain[at],
            ),
            SAND => scaled([222.0, 198.0, 150.0], 1.0 + 0.06 * noise.grain[at] + 0.05 * noise.soft[at]),
            SKY => {
                let clear = mixed([120.0, 178.0, 236.0], [196.0, 224.0, 247.0], depth);
                let cloud =
                    0.65 * noise.broad[at] + 0.30 * noise.soft[at] + 0.05 * noise.fine[at] + self.clouds;
                mixed(clear, [250.0, 251.0, 253.0], (cloud * 2.2).clamp(0.0, 0.9))
            }
            WATER => {
                let wave = 0.7 * noise.level[at] + 0.3 * noise.soft[at];
                let deep = scaled([58.0, 128.0, 168.0], 1.0 + 0.16 * wave);
                mixed(deep, [205.0, 230.0, 240.0], ((wave - 0.48) * 2.5).clamp(0.0, 0.6))
            }
            SNOW => {
                let shadow = (0.5 * noise.broad[at] + 0.5 * noise.soft[at]).clamp(0.0, 1.0);
                let white = mixed([242.0, 246.0, 251.0], [206.0, 219.0, 238.0], shadow);
                scaled(white, 1.0 + 0.02 * noise.grain[at])
            }
            ROAD => {
                let tar = scaled([112.0, 112.0, 117.0], 1.0 + 0.11 * noise.grain[at] + 0.05 * noise.soft[at]);
                let mark = (below - height * 0.5).abs() < 2.5 && (x as f32 + self.pattern.2) % 44.0 < 26.0;
                if mark { mixed(tar, [236.0, 232.0, 214.0], 0.85) } else { tar }
            }
            _ => self.brick(noise, at, x, y),
        };
        [0, 1, 2].map(|k| (colour[k] * self.tint[k]).clamp(0.0, 255.0))
    }

    fn brick(&self, noise: &Noise, at: usize, x: usize, y: usize) -> [f32; 3] {
        let (w, h, shift) = self.pattern;
        let row = (y as f32 + shift) / h;
        let column = (x as f32 + shift + if row as usize % 2 == 1 { w * 0.5 } else { 0.0 }) / w;
        let (inside_x, inside_y) = (column.fract() * w, row.fract() * h);
        if inside_x < 2.0 || inside_y < 2.0 {
            return [214.0, 206.0, 196.0].map(|c| c * (1.0 + 0.04 * noise.grain[at]));
        }
        let own = noise.grain[((row as usize * 37) % TILE) * TILE + (column as usize * 101 + 11) % TILE];
        [184.0, 124.0, 104.0].map(|c| c * (1.0 + 0.10 * own + 0.05 * noise.fine[at]))
    }
}

/// A painted background.
pub(super) struct Background {
    /// Row-major RGB in 0..=255.
    pub(super) pixels: Vec<[f32; 3]>,
    /// Stuff class of each region, from top to bottom.
    pub(super) classes: Vec<usize>,
    /// Index into `classes` for every pixel.
    pub(super) owner: Vec<u8>,
}

/// Draws one region, or two that meet at a horizon.
pub(super) fn background(dice: &mut Dice, width: usize, height: usize) -> Background {
    let classes = if dice.chance(0.45) {
        vec![*dice.pick(&[GRASS, SAND, SKY, WATER, SNOW, ROAD, WALL])]
    } else if dice.chance(0.75) {
        vec![SKY, *dice.pick(&[GRASS, SAND, WATER, SNOW, ROAD])]
    } else {
        vec![WALL, *dice.pick(&[GRASS, SAND, SNOW, ROAD])]
    };
    let looks: Vec<Look> = classes.iter().map(|&class| Look::draw(dice, class)).collect();
    let horizon =
        if classes.len() == 1 { vec![height as f64; width] } else { horizon(dice, &classes, width, height) };
    let noise = noise();
    let mut pixels = Vec::with_capacity(width * height);
    let mut owner = Vec::with_capacity(width * height);
    for y in 0..height {
        for (x, &edge) in horizon.iter().enumerate() {
            let region = usize::from(y as f64 + 0.5 >= edge);
            let (top, end) = if region == 0 { (0.0, edge as f32) } else { (edge as f32, height as f32) };
            let below = y as f32 - top;
            pixels.push(looks[region].colour(noise, x, y, below / (end - top).max(1.0), below, end - top));
            owner.push(region as u8);
        }
    }
    Background { pixels, classes, owner }
}

/// The height of the border between two regions in every column, in pixels from the top.
fn horizon(dice: &mut Dice, classes: &[usize], width: usize, height: usize) -> Vec<f64> {
    let (side, base) = (height as f64, dice.range(0.32, 0.60));
    let tilt = dice.range(-0.05, 0.05);
    // A wall ends in a straight line; land and sea are a little wavy.
    let wave = match (classes[0], classes[1]) {
        (WALL, _) => 0.0,
        (_, WATER | ROAD) => 0.004,
        _ => dice.range(0.008, 0.03),
    };
    let tilt = if wave < 0.005 { 0.0 } else { tilt };
    let (p1, p2) = (dice.range(0.0, 6.0), dice.range(0.0, 6.0));
    let (f1, f2) = (dice.range(4.0, 9.0), dice.range(11.0, 19.0));
    (0..width)
        .map(|x| {
            let t = x as f64 / width as f64;
            side * (base + tilt * (t - 0.5) + wave * (sin(f1 * t + p1) + 0.4 * sin(f2 * t + p2)))
        })
        .collect()
}
