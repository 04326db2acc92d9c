//! One scene of the world: prints what is said about it, and writes its picture as a PNG.
//!
//! ```text
//! cargo run --release -p flmm-data --example scene -- SPLIT LEVEL SEED INDEX OUT.png
//! ```
//!
//! With a range `FIRST..LAST` as index, writes a contact sheet of these scenes instead.

use flmm_data::world::{Level, Link, Scene, Split, WorldConfig, generate};
use image::RgbImage;
use std::error::Error;

const USAGE: &str = "usage: scene train|val|test 1|2 SEED INDEX|FIRST..LAST OUT.png";

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [split, level, seed, index, out] = &args[..] else { return Err(USAGE.into()) };
    let split = match split.as_str() {
        "train" => Split::Train,
        "val" => Split::Val,
        "test" => Split::Test,
        _ => return Err(USAGE.into()),
    };
    let config = WorldConfig::new(Level::from_number(level.parse()?).ok_or(USAGE)?);
    let seed = seed.parse()?;
    let picture = if let Some((first, last)) = index.split_once("..") {
        let scenes: Vec<Scene> =
            (first.parse()?..last.parse()?).map(|index| generate(&config, split, seed, index)).collect();
        sheet(&scenes)
    } else {
        let scene = generate(&config, split, seed, index.parse()?);
        print_texts(&scene);
        scene.image
    };
    picture.save(out)?;
    Ok(())
}

/// The scenes in rows of six.
fn sheet(scenes: &[Scene]) -> RgbImage {
    let mut sheet = RgbImage::new(6 * 244, scenes.len().div_ceil(6) as u32 * 244);
    for (i, scene) in scenes.iter().enumerate() {
        image::imageops::replace(&mut sheet, &scene.image, i as i64 % 6 * 244, i as i64 / 6 * 244);
    }
    sheet
}

fn print_texts(scene: &Scene) {
    let phrases = |text: &str, links: &[Link]| {
        links.iter().map(|link| format!("[{}]", &text[link.range.clone()])).collect::<Vec<_>>().join(" ")
    };
    for question in scene.texts.questions.iter().chain(&scene.texts.reasoning) {
        println!(
            "{}\n    {}  {}",
            question.question,
            question.answer,
            phrases(&question.answer, &question.links)
        );
    }
    for narration in &scene.texts.narrations {
        println!("{}", narration.text());
    }
    for referring in &scene.texts.referring {
        println!("object {}: {} | {}", referring.target, referring.text, referring.alternatives.join(" | "));
    }
}
