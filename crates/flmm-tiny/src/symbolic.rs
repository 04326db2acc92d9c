//! What an image token should say: the word of the thing under the patch and where that thing is.
//!
//! flmm-tiny has no CLIP to inherit the alignment of words and patches from, so it is given one: the tower
//! learns to output these codes, and the decoder first learns to read them with noise in place of pictures
//! ("symbolic" pre-training), before it ever sees a projected patch.

use anyhow::{Result, anyhow, ensure};
use candle_core::{Device, Tensor};
use flmm::Geometry;
use flmm_data::world::{self, Level, Scene};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokenizers::Tokenizer;

use crate::store::gaussian_pair;

/// Radial features per coordinate.
const BINS: usize = 10;
/// Coordinates: patch x and y; the thing's centre x and y, width and height.
const COORDINATES: usize = 6;

/// The code book: a unit vector per class, stuff, colour and padding, and a fixed map of coordinates.
pub(crate) struct Codes {
    width: usize,
    objects: Vec<Vec<f32>>,
    stuff: Vec<Vec<f32>>,
    colours: Vec<Vec<f32>>,
    padding: Vec<f32>,
    /// Directions that every word and every image token carries, so that an attention head can tell them apart.
    text_mark: Vec<f32>,
    image_mark: Vec<f32>,
    /// `[COORDINATES · BINS, width]`
    places: Vec<Vec<f32>>,
}

/// The thing under a patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Thing {
    /// An object of the scene, by index.
    Object(usize),
    /// A region of the background, by index.
    Stuff(usize),
    /// The border that makes the picture square.
    Padding,
}

/// The words a code stands for: the singular and, for objects, the plural.
fn words(level: Level) -> (Vec<[String; 2]>, Vec<String>, Vec<String>) {
    let objects = world::classes(level).iter().map(|c| [c.name.to_string(), c.plural.to_string()]).collect();
    let stuff = world::stuff_classes().iter().map(|s| s.name.to_string()).collect();
    let colours = world::Colour::ALL.iter().map(|c| c.name().to_string()).collect();
    (objects, stuff, colours)
}

impl Codes {
    /// The code book of `level` for a decoder of `width`; always the same for the same seed.
    ///
    /// Codes of level 1, colours, stuff and places come from one stream, as in the models made before there was another
    /// level. Every later class has a stream of its own, by its name: classes that are added move no code.
    pub(crate) fn new(level: Level, width: usize, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut shared = || unit(width, &mut rng);
        let (objects, stuff, colours) = words(level);
        let first = objects.len().min(world::classes(Level::One).len());
        let mut book = Self {
            width,
            objects: objects[..first].iter().map(|_| shared()).collect(),
            stuff: stuff.iter().map(|_| shared()).collect(),
            colours: colours.iter().map(|_| shared()).collect(),
            padding: shared(),
            places: (0..COORDINATES * BINS).map(|_| shared()).collect(),
            text_mark: shared(),
            image_mark: shared(),
        };
        book.objects.extend(objects[first..].iter().map(|[name, _]| unit(width, &mut rng_of(name, seed))));
        book
    }

    /// What every word's embedding and every image token is marked with.
    pub(crate) fn marks(&self) -> [&[f32]; 2] {
        [&self.text_mark, &self.image_mark]
    }

    /// Directions of a thing's centre (all bins of x and y) and size (the small bins of width and height, which are
    /// the usual ones): what a head of 32 components can carry from a patch to a word.
    pub(crate) fn place_directions(&self) -> impl Iterator<Item = &[f32]> {
        [(2, BINS), (3, BINS), (4, 6), (5, 6)].into_iter().flat_map(|(coordinate, bins)| {
            self.places[coordinate * BINS..coordinate * BINS + bins].iter().map(Vec::as_slice)
        })
    }

    /// Adds the image mark to image tokens.
    pub(crate) fn mark_image(&self, tokens: &mut [f32]) {
        for token in tokens.chunks_exact_mut(self.width) {
            token.iter_mut().zip(&self.image_mark).for_each(|(value, mark)| *value += mark);
        }
    }

    /// Directions to classify a token against: objects, then stuff, then padding, `[classes, width]`.
    pub(crate) fn directions(&self) -> Result<Tensor> {
        let rows: Vec<f32> =
            self.objects.iter().chain(&self.stuff).chain([&self.padding]).flatten().copied().collect();
        let count = rows.len() / self.width;
        Ok(Tensor::from_vec(rows, (count, self.width), &Device::Cpu)?)
    }

    /// The row of [`Codes::directions`] for a thing of `scene`.
    pub(crate) fn class_of(&self, scene: &Scene, thing: Thing) -> usize {
        match thing {
            Thing::Object(i) => scene.objects[i].class,
            Thing::Stuff(i) => self.objects.len() + scene.stuff[i].class,
            Thing::Padding => self.objects.len() + self.stuff.len(),
        }
    }

    /// Embedding rows in which the world's nouns and colours start at their codes, everything else small noise.
    pub(crate) fn embeddings(
        &self,
        level: Level,
        tokenizer: &Tokenizer,
        rng: &mut ChaCha8Rng,
    ) -> Result<Tensor> {
        let vocab = tokenizer.get_vocab_size(true);
        let std = (1.0 / self.width as f32).sqrt();
        let mut rows: Vec<f32> = (0..vocab * self.width).map(|_| gaussian_pair(rng).0 * std).collect();
        let (objects, stuff, colours) = words(level);
        let pairs =
            objects.iter().zip(&self.objects).flat_map(|(words, code)| words.iter().map(move |w| (w, code)));
        for (word, code) in
            pairs.chain(stuff.iter().zip(&self.stuff)).chain(colours.iter().zip(&self.colours))
        {
            let encoding =
                tokenizer.encode(word.as_str(), false).map_err(|e| anyhow!("cannot encode {word}: {e}"))?;
            ensure!(encoding.len() == 1, "the tokenizer splits `{word}` into {} tokens", encoding.len());
            let row = encoding.get_ids()[0] as usize * self.width;
            // The plural and other forms start a little apart.
            for (value, code) in rows[row..row + self.width].iter_mut().zip(code) {
                *value = code + 0.15 * *value;
            }
        }
        for row in rows.chunks_exact_mut(self.width) {
            row.iter_mut().zip(&self.text_mark).for_each(|(value, mark)| *value += mark);
        }
        Ok(Tensor::from_vec(rows, (vocab, self.width), &Device::Cpu)?)
    }

    /// The code of each patch, `[grid² · width]`.
    pub(crate) fn tokens(&self, scene: &Scene, things: &[Thing], geometry: &Geometry) -> Vec<f32> {
        let grid = (things.len() as f64).sqrt().round() as usize;
        let mut out = Vec::with_capacity(things.len() * self.width);
        for (at, thing) in things.iter().enumerate() {
            let mut code = match thing {
                Thing::Object(i) => self.objects[scene.objects[*i].class].clone(),
                Thing::Stuff(i) => self.stuff[scene.stuff[*i].class].clone(),
                Thing::Padding => self.padding.clone(),
            };
            let mut add = |weight: f32, direction: &[f32]| {
                code.iter_mut().zip(direction).for_each(|(c, d)| *c += weight * d);
            };
            let patch = [(at % grid) as f32 + 0.5, (at / grid) as f32 + 0.5].map(|v| v / grid as f32);
            let mut coordinates = vec![(patch[0], 0.35), (patch[1], 0.35)];
            if let Thing::Object(i) = thing {
                let object = &scene.objects[*i];
                if let Some(colour) = object.colour {
                    add(0.6, &self.colours[colour as usize]);
                }
                let [x, y, w, h] = box_in_square(object.bbox, geometry);
                coordinates.extend([(x + w / 2.0, 0.5), (y + h / 2.0, 0.5), (w, 0.35), (h, 0.35)]);
            }
            for (coordinate, (value, weight)) in coordinates.into_iter().enumerate() {
                for bin in 0..BINS {
                    let centre = bin as f32 / (BINS - 1) as f32;
                    let closeness = (-0.5 * ((value - centre) * (BINS - 1) as f32 / 0.8).powi(2)).exp();
                    if closeness > 1e-3 {
                        add(weight * closeness, &self.places[coordinate * BINS + bin]);
                    }
                }
            }
            out.extend(code);
        }
        out
    }
}

/// A random direction.
fn unit(width: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
    let mut v: Vec<f32> = (0..width).map(|_| gaussian_pair(rng).0).collect();
    let norm = v.iter().map(|v| v * v).sum::<f32>().sqrt();
    v.iter_mut().for_each(|v| *v /= norm);
    v
}

/// The stream of a name, by its first 24 bytes.
fn rng_of(name: &str, seed: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..].iter_mut().zip(name.bytes()).for_each(|(to, byte)| *to = byte);
    ChaCha8Rng::from_seed(key)
}

/// A box of the picture in the padded square, as fractions of its side: x, y, width, height.
fn box_in_square(bbox: [u32; 4], geometry: &Geometry) -> [f32; 4] {
    let side = geometry.padded_shape.0 as f32;
    let scale = geometry.image_shape.1 as f32 / geometry.original.1 as f32;
    let [x, y, w, h] = bbox.map(|v| v as f32 * scale);
    [(x + geometry.before.1 as f32) / side, (y + geometry.before.0 as f32) / side, w / side, h / side]
}

/// The thing that covers the most of each of `grid²` patches; objects win from 35 % of the patch on.
pub(crate) fn things(scene: &Scene, geometry: &Geometry, grid: usize) -> Vec<Thing> {
    const SAMPLES: usize = 4;
    let side = geometry.padded_shape.0 as f64;
    let scale = geometry.original.1 as f64 / geometry.image_shape.1 as f64;
    let at = |row: f64, column: f64| -> Thing {
        let y = (row * side / grid as f64 - geometry.before.0 as f64) * scale;
        let x = (column * side / grid as f64 - geometry.before.1 as f64) * scale;
        let (height, width) = geometry.original;
        if y < 0.0 || x < 0.0 || y >= height as f64 || x >= width as f64 {
            return Thing::Padding;
        }
        let (x, y) = (x as u32, y as u32);
        let object = scene.objects.iter().position(|o| o.mask.get(x, y)).map(Thing::Object);
        object
            .or_else(|| scene.stuff.iter().position(|s| s.mask.get(x, y)).map(Thing::Stuff))
            .unwrap_or(Thing::Padding)
    };
    let mut out = Vec::with_capacity(grid * grid);
    for row in 0..grid {
        for column in 0..grid {
            let mut counts: Vec<(Thing, usize)> = Vec::new();
            for sample in 0..SAMPLES * SAMPLES {
                let inside = |i: usize| (i as f64 + 0.5) / SAMPLES as f64;
                let y = row as f64 + inside(sample / SAMPLES);
                let x = column as f64 + inside(sample % SAMPLES);
                let thing = at(y, x);
                match counts.iter_mut().find(|(t, _)| *t == thing) {
                    Some((_, count)) => *count += 1,
                    None => counts.push((thing, 1)),
                }
            }
            let is_object = |t: &Thing| matches!(t, Thing::Object(_));
            let object = counts.iter().filter(|(t, _)| is_object(t)).max_by_key(|(_, count)| *count);
            let best = counts.iter().max_by_key(|(_, count)| *count);
            let chosen = object.filter(|(_, count)| *count * 100 >= SAMPLES * SAMPLES * 35).or(best);
            out.push(chosen.map_or(Thing::Padding, |(thing, _)| *thing));
        }
    }
    out
}

/// Adds independent normal noise of standard deviation `std / √width` to every component.
pub(crate) fn add_noise(tokens: &mut [f32], width: usize, std: f32, rng: &mut ChaCha8Rng) {
    // A sum of four uniform values is close enough to normal and much cheaper.
    let scale = std / (width as f32).sqrt() * (12.0f32 / 4.0).sqrt();
    for value in tokens {
        let sum: f32 = (0..4).map(|_| rng.random::<f32>() - 0.5).sum();
        *value += sum * scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flmm::vision::preprocess::{LlavaProcessor, Normalisation, SizeRule};
    use flmm_data::world::{Split, WorldConfig, generate};
    use std::path::Path;

    #[test]
    fn a_larger_code_book_moves_no_code() {
        let (one, two) = (Codes::new(Level::One, 160, 20), Codes::new(Level::Two, 160, 20));
        assert_eq!(one.objects[..], two.objects[..one.objects.len()]);
        assert_eq!((&one.stuff, &one.colours, &one.padding), (&two.stuff, &two.colours, &two.padding));
        assert_eq!((&one.places, one.marks()), (&two.places, two.marks()));
        // Names, not their order, decide about later classes; and no two are the same.
        let horse = world::classes(Level::Two).iter().position(|c| c.name == "horse").unwrap();
        assert_eq!(two.objects[horse], unit(160, &mut rng_of("horse", 20)));
        for (at, code) in two.objects.iter().enumerate() {
            let close = |other: &Vec<f32>| code.iter().zip(other).map(|(a, b)| a * b).sum::<f32>() > 0.5;
            assert!(!two.objects[..at].iter().any(close), "{}", world::classes(Level::Two)[at].name);
        }
    }

    /// The shipped model reads these codes: its nouns are still near them.
    #[test]
    fn the_code_book_is_the_shipped_models() -> Result<()> {
        let lmm = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/flmm-tiny/lmm");
        let tokenizer = Tokenizer::from_file(lmm.join("tokenizer.json")).map_err(|e| anyhow!("{e}"))?;
        let tensors = candle_core::safetensors::load(lmm.join("model.safetensors"), &Device::Cpu)?;
        let words = tensors["language_model.model.embed_tokens.weight"].to_dtype(candle_core::DType::F32)?;
        let codes = Codes::new(Level::Two, words.dim(1)?, crate::MODEL_SEED);
        for (class, code) in world::classes(Level::One).iter().zip(&codes.objects) {
            let id = tokenizer.encode(class.name, false).map_err(|e| anyhow!("{e}"))?.get_ids()[0];
            let word = words.get(id as usize)?.to_vec1::<f32>()?;
            let length = word.iter().map(|v| v * v).sum::<f32>().sqrt();
            let cosine = word.iter().zip(code).map(|(a, b)| a * b).sum::<f32>() / length;
            assert!(cosine > 0.4, "{}: {cosine}", class.name);
        }
        Ok(())
    }

    #[test]
    fn things_are_found_on_any_grid() -> Result<()> {
        let processor = LlavaProcessor::new(144, SizeRule::MultiplyFirst, Normalisation::CLIP);
        let scene = generate(&WorldConfig::new(Level::Two), Split::Val, 7, 3);
        let geometry = processor.geometry((scene.image.height() as usize, scene.image.width() as usize))?;
        for grid in [6, 8, 12, 16] {
            let things = things(&scene, &geometry, grid);
            assert_eq!(things.len(), grid * grid);
            for object in 0..scene.objects.len() {
                // The smallest object may win no patch of a sixth of the picture's side.
                let found = things.contains(&Thing::Object(object));
                assert!(found || grid < 8, "object {object} on {grid}x{grid}");
            }
            assert_eq!(
                Codes::new(Level::Two, 32, 1).tokens(&scene, &things, &geometry).len(),
                32 * grid * grid
            );
        }
        Ok(())
    }

    /// The centre that the strongest bins of a code name is the centre of the object's box.
    #[test]
    fn a_code_tells_where_its_object_is() -> Result<()> {
        let codes = Codes::new(Level::One, 160, 20);
        let processor = LlavaProcessor::new(144, SizeRule::MultiplyFirst, Normalisation::CLIP);
        let (mut near, mut all) = (0, 0);
        for index in 0..40 {
            let scene = generate(&WorldConfig::new(Level::One), Split::Val, 7, index);
            let geometry =
                processor.geometry((scene.image.height() as usize, scene.image.width() as usize))?;
            let things = things(&scene, &geometry, 12);
            let tokens = codes.tokens(&scene, &things, &geometry);
            for (code, thing) in tokens.chunks_exact(160).zip(&things) {
                let Thing::Object(object) = thing else { continue };
                let strongest = |coordinate: usize| {
                    let along = |bin: usize| -> f32 {
                        let direction = &codes.places[coordinate * BINS + bin];
                        code.iter().zip(direction).map(|(c, d)| c * d).sum()
                    };
                    let best =
                        (0..BINS).fold(0, |best, bin| if along(bin) > along(best) { bin } else { best });
                    best as f32 / (BINS - 1) as f32
                };
                let [x, y, w, h] = box_in_square(scene.objects[*object].bbox, &geometry);
                let off = (strongest(2) - x - w / 2.0).abs().max((strongest(3) - y - h / 2.0).abs());
                near += usize::from(off < 0.12);
                all += 1;
            }
        }
        assert!(near * 10 > all * 9, "{near} of {all}");
        Ok(())
    }
}
