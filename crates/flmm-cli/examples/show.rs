//! scratch
use flmm::masks::Mask;
use flmm::overlay::{Region, draw, save_png};
use flmm_data::world::*;
fn main() {
    for index in 0..4u64 {
        let scene = generate(&WorldConfig::new(if index < 2 { Level::One } else { Level::Two }), Split::Test, 5, index);
        let n = &scene.texts.narrations[0];
        println!("{}", n.text());
        for q in scene.texts.questions.iter().take(5) { println!("   {q:?}"); }
        let masks: Vec<Mask> = scene.objects.iter().map(|o| Mask::from_fn(scene.image.width() as usize, scene.image.height() as usize, |x, y| o.mask.get(x as u32, y as u32))).collect();
        let mut answer = String::new();
        let mut regions = Vec::new();
        for (i, (o, m)) in scene.objects.iter().zip(&masks).enumerate() {
            if i > 0 { answer.push_str(if i + 1 == masks.len() { " and behind all of them there is " } else { " to the left of " }); }
            let s = answer.chars().count();
            answer.push_str(&format!("the {}", o.class().name));
            regions.push(Region { mask: m, chars: s..answer.chars().count() });
        }
        answer.push('.');
        save_png(&draw(&scene.image, &answer, &regions).unwrap(), format!("/tmp/clitry/w{index}.png").as_ref()).unwrap();
    }
}
