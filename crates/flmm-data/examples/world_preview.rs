//! Prints a scene's texts and writes a contact sheet of the first scenes of a split:
//! `cargo run --release -p flmm-data --example world_preview -- [LEVEL] [SEED] [OUT.png]`.

use flmm_data::world::{Level, Split, WorldConfig, generate};
use std::time::Instant;

fn main() {
    let mut args = std::env::args().skip(1);
    let level = if args.next().as_deref() == Some("2") { Level::Two } else { Level::One };
    let seed = args.next().and_then(|seed| seed.parse().ok()).unwrap_or(0);
    let out = args.next().unwrap_or_else(|| "world.png".to_owned());
    let config = WorldConfig::new(level);
    let mut sheet = image::RgbImage::new(5 * 244, 4 * 244);
    for index in 0..20 {
        let scene = generate(&config, Split::Train, seed, index);
        let (x, y) = ((index % 5) * 244, (index / 5) * 244);
        image::imageops::replace(&mut sheet, &scene.image, x as i64, y as i64);
        if index < 5 {
            println!("== scene {index}");
            for q in scene.texts.questions.iter().chain(&scene.texts.reasoning) {
                println!(
                    "{:?}: {} -> {}  {:?}",
                    q.kind,
                    q.question,
                    q.answer,
                    q.links.iter().map(|l| &q.answer[l.range.clone()]).collect::<Vec<_>>()
                );
            }
            for n in &scene.texts.narrations {
                println!("N: {:?}", n.segments.iter().map(|s| s.utterance.as_str()).collect::<Vec<_>>());
            }
            for r in &scene.texts.referring {
                println!("R{}: {:?} {} {:?}", r.target, r.kind, r.text, r.alternatives);
            }
        }
    }
    sheet.save(&out).expect("write the sheet");
    let start = Instant::now();
    let mut questions = 0;
    for index in 0..2000 {
        questions += generate(&config, Split::Val, seed, index).texts.questions.len();
    }
    println!("{:.3} ms a scene, {questions} questions", start.elapsed().as_secs_f64() / 2.0);
}
