//! Pictures and requests that cannot be served: a clear error, the right exit status, no file left behind.

use image::{DynamicImage, Frame, Rgba, RgbaImage, codecs::gif::GifEncoder};
use insta::assert_snapshot;

use crate::support::{Place, fixture, png_header};

#[test]
fn pictures_that_cannot_be_used() {
    let place = Place::new();
    let whole = std::fs::read(fixture("lmm/llava15/images/a.png")).unwrap();
    place.write("text.png", b"this is not a picture");
    place.write("empty.png", b"");
    place.write("truncated.png", &whole[..whole.len() / 2]);
    place.write("nothing.png", &png_header(0, 0));
    place.write("huge.png", &png_header(60_000, 60_000));
    std::fs::create_dir(place.path("folder")).unwrap();
    let before = place.files();
    for name in ["text.png", "empty.png", "truncated.png", "nothing.png", "huge.png", "folder", "absent.png"]
    {
        let ran = place.run_with_model(&["ground", name, "--text", "a dog"]);
        assert_eq!((ran.status, ran.out.as_str()), (1, ""), "{name}: {}", ran.err);
        assert_snapshot!(format!("picture_{}", name.replace('.', "_")), ran.err);
    }
    assert_eq!(place.files(), before);
}

#[test]
fn unusual_pictures_are_read() {
    let place = Place::new();
    let picture = image::open(fixture("lmm/llava15/images/a.png")).unwrap();
    DynamicImage::ImageRgb16(picture.to_rgb16()).save(place.path("deep.png")).unwrap();
    picture.to_luma8().save(place.path("grey.png")).unwrap();
    let mut animation = Vec::new();
    GifEncoder::new(&mut animation)
        .encode_frames(
            [[255, 0, 0, 255], [0, 0, 255, 255]].map(|c| Frame::new(RgbaImage::from_pixel(40, 30, Rgba(c)))),
        )
        .unwrap();
    place.write("moving.gif", &animation);
    for name in ["deep.png", "grey.png", "moving.gif"] {
        let ran = place.run_with_model(&["ground", name, "--text", "a dog", "--phrase", "a dog", "--json"]);
        let found: serde_json::Value = serde_json::from_str(ran.ok()).unwrap();
        assert_eq!(found["phrases"][0]["text"], "a dog", "{name}");
    }
}

#[test]
fn requests_that_cannot_be_served() {
    let place = Place::new();
    let long = "why ".repeat(6000);
    let ran = place.run_with_model(&["chat", "a.png", &long]);
    assert_eq!((ran.status, ran.out.as_str()), (1, ""));
    assert_snapshot!("prompt_too_long", ran.err);
    let ran = place.run_with_model(&["ground", "a.png", "--text", "a dog", "--phrase", "a cat"]);
    assert_eq!((ran.status, ran.out.as_str()), (2, ""));
    assert_snapshot!("phrase_not_in_text", ran.err);
    assert_eq!(place.files(), ["a.png"]);
}

#[test]
fn places_that_cannot_be_written() {
    let place = Place::new();
    std::fs::create_dir(place.path("folder")).unwrap();
    for (name, overlay) in [("folder", "folder"), ("no_folder", "none/b.png"), ("itself", "a.png")] {
        let ran = place.run_with_model(&["ground", "a.png", "--text", "a dog", "--overlay", overlay]);
        assert_eq!((ran.status, ran.out.as_str()), (2, ""), "{name}");
        assert_snapshot!(format!("overlay_{name}"), ran.err);
    }
    assert_eq!(place.files(), ["a.png", "folder"]);
}
