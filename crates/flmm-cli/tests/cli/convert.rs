//! `flmm convert`.

use std::path::Path;

use insta::assert_snapshot;

use crate::pickles::{self, Ops};
use crate::support::{Place, Ran, fixture, model, model_with};

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn lmm() -> String {
    text(&fixture("lmm/llava15/model"))
}

fn convert(place: &Place, file: &str, more: &[&str]) -> Ran {
    place.run(&[&["convert", "head", file, "--lmm", &lmm(), "--out", "head"], more].concat())
}

#[test]
fn a_converted_head_gives_the_same_masks() {
    let place = Place::new();
    let heads = text(&fixture("lmm/llava15/heads.pth"));
    let ran = convert(&place, &heads, &[]);
    assert_eq!(ran.ok(), "");
    assert_snapshot!("head", ran.err);
    let sam = text(&fixture("lmm/_sam/sam_vit_tiny.pth"));
    assert_snapshot!("sam", place.run(&["convert", "sam", &sam, "--out", "sam"]).err);
    assert_eq!(place.files(), ["a.png", "head", "sam"]);
    let args =
        ["ground", "a.png", "--text", "A red ball.", "--phrase", "A red ball", "--json", "--no-overlay"];
    let converted = ["--model", &lmm(), "--sam", "sam", "--head", "head"];
    let masks = |json: &str| {
        let json: serde_json::Value = serde_json::from_str(json).unwrap();
        json["phrases"].clone()
    };
    let expected = masks(place.run_with_model(&args).ok());
    assert_eq!(masks(place.run(&[&args[..], &converted].concat()).ok()), expected);
    // What is there is kept, unless told otherwise.
    let again = convert(&place, &heads, &[]);
    assert_eq!(again.status, 2);
    assert_snapshot!("head_exists", again.err);
    assert_eq!(convert(&place, &heads, &["--force", "-q"]).all(), "exit status 0\n-- stdout\n-- stderr\n");
}

#[test]
fn a_converted_lmm_answers_as_the_one_that_is_converted_while_it_is_opened() {
    let place = Place::new();
    let ran = place.run(&["convert", "lmm", &lmm(), "--dtype", "int4", "--out", "small"]);
    assert_eq!(ran.ok(), "");
    assert_snapshot!("lmm", ran.err);
    let mut small = model_with(&place.path("small"));
    let chat = ["chat", "a.png", "What is this?", "--json", "--no-overlay", "--max-new-tokens", "8"];
    let run = |model: &[String], more: &[&str]| {
        place.ran(place.command(&chat).args(more).args(model).output().unwrap())
    };
    let answer = |ran: &Ran| serde_json::from_str::<serde_json::Value>(ran.ok()).unwrap();
    // --dtype need not be said again, but may be.
    let expected = answer(&run(&model(), &["--dtype", "int4"]));
    assert_eq!(answer(&run(&small, &[]))["phrases"], expected["phrases"]);
    assert_eq!(answer(&run(&small, &["--dtype", "int4"]))["answer"], expected["answer"]);
    let other = run(&small, &["--dtype", "bf16"]);
    assert_eq!(other.status, 1);
    assert_snapshot!("lmm_in_another_format", other.err);
    assert_snapshot!("lmm_inspected", place.run(&["inspect", "model", "small"]).ok());
    assert_snapshot!(
        "lmm_twice",
        place.run(&["convert", "lmm", "small", "--dtype", "int8", "--out", "b"]).err
    );
    assert_eq!(place.files(), ["a.png", "small"]);
    // A head that goes with it is checked as ever.
    let heads = text(&fixture("lmm/llava15/heads.pth"));
    place.run(&["convert", "head", &heads, "--lmm", "small", "--out", "head"]).ok();
    // What was not converted takes every format; what is not there has none.
    small[1] = "none".to_owned();
    assert_eq!(run(&small, &[]).status, 2);
    assert_eq!(place.run(&["convert", "lmm", "none", "--dtype", "int8", "--out", "b"]).status, 2);
}

#[test]
fn heads_that_do_not_fit_are_explained() {
    let place = Place::new();
    let heads = text(&fixture("lmm/llava15/heads.pth"));
    let run = |lmm: &str, file: &str| place.run(&["convert", "head", file, "--lmm", lmm, "--out", "head"]);
    let wrong = run("llava-hf/llava-1.5-7b-hf", &heads);
    assert_eq!(wrong.status, 1);
    assert_snapshot!("head_of_another_model", wrong.err);
    let unknown = run("gpt-4", &heads);
    assert_eq!(unknown.status, 2);
    assert!(unknown.err.contains("`gpt-4` is neither a model folder nor a known model"), "{}", unknown.err);
    assert_eq!(run(&lmm(), "none.pth").status, 2);
    let sam = run(&lmm(), &text(&fixture("lmm/_sam/sam_vit_tiny.pth")));
    assert_eq!(sam.status, 1);
    assert_snapshot!("head_is_a_sam", sam.err);
    let head = place.run(&["convert", "sam", &heads, "--out", "sam"]);
    assert_eq!(head.status, 1);
    assert_snapshot!("sam_is_a_head", head.err);
    assert_eq!(place.files(), ["a.png"]);
}

#[test]
fn hostile_files_are_refused_and_nothing_is_written() {
    let place = Place::new();
    let marker = std::env::temp_dir().join(format!("flmm-owned-{}", std::process::id()));
    let command = format!("touch {}", marker.display());
    // A whole head in which one tensor is not what it should be.
    let call = |module: &str, name: &str, argument: &str| {
        head_with(pickles::call(pickles::global(module, name), &[pickles::text(argument)]))
    };
    let view = |shape: &[i64], strides: &[i64], key: &str, count: i64| {
        head_with(pickles::tensor(pickles::storage("FloatStorage", key, count), 0, shape, strides))
    };
    let whole = std::fs::read(fixture("lmm/llava15/heads.pth")).unwrap();
    let hostile = [
        ("os_system", call("os", "system", &command)),
        ("posix_system", call("posix", "system", &command)),
        ("builtins_eval", call("builtins", "eval", "__import__('os').abort()")),
        ("huge_storage", view(&[8], &[1], "bad", 1 << 40)),
        ("huge_view", view(&[1 << 40, 1 << 20], &[0, 0], "bad", 1)),
        ("overflow", view(&[i64::MAX, i64::MAX], &[1, 1], "bad", 1)),
        ("outside_storage", view(&[8], &[1], "bad", 1)),
        ("path_in_key", view(&[8], &[1], "../../../../etc/passwd", 8)),
        ("path_in_archive", path_in_archive()),
        ("truncated", whole[..whole.len() / 2].to_vec()),
        ("no_archive", b"#!/bin/sh\ntouch owned\n".to_vec()),
        ("empty", Vec::new()),
    ];
    for (name, bytes) in &hostile {
        let file = format!("{name}.pth");
        place.write(&file, bytes);
        let before = place.files();
        for args in [
            &["convert", "head", &file, "--lmm", &lmm(), "--out", "out"][..],
            &["convert", "sam", &file, "--out", "out"],
            &["inspect", "model", &file],
        ] {
            // A header alone may look harmless: what is not read is not judged.
            let ran = place.run(args);
            assert!(args[0] == "inspect" || (ran.status == 1 && ran.out.is_empty()), "{name}: {}", ran.all());
            assert!(ran.status == 0 || ran.err.contains("hint: "), "{name}: {}", ran.all());
            assert_eq!(place.files(), before, "{name}");
            if args[1] == "head" {
                assert_snapshot!(format!("hostile_{name}"), ran.err);
            }
        }
    }
    assert!(!marker.exists());
}

/// The head of `fixtures/` with `tensor` as `mask_head.decoder.0.conv_block.convs.0.gn.weight`.
fn head_with(tensor: Ops) -> Vec<u8> {
    const CHANGED: &str = "mask_head.decoder.0.conv_block.convs.0.gn.weight";
    let file = fixture("lmm/llava15/heads.pth");
    let read = flmm::weights::load_checkpoint(file, None, &candle_core::Device::Cpu).unwrap();
    let mut entries = vec![(CHANGED, tensor)];
    let mut records = vec![("bad".to_owned(), pickles::counting(1))];
    for (i, (name, tensor)) in read.iter().filter(|(name, _)| *name != CHANGED).enumerate() {
        let shape: Vec<i64> = tensor.dims().iter().map(|&n| n as i64).collect();
        let strides: Vec<i64> = (0..shape.len()).map(|axis| shape[axis + 1..].iter().product()).collect();
        let storage = pickles::storage("FloatStorage", &i.to_string(), shape.iter().product());
        entries.push((name, pickles::tensor(storage, 0, &shape, &strides)));
        records.push((i.to_string(), pickles::floats(&tensor.flatten_all().unwrap().to_vec1().unwrap())));
    }
    let records: Vec<(&str, Vec<u8>)> =
        records.iter().map(|(key, bytes)| (key.as_str(), bytes.clone())).collect();
    pickles::archive(&pickles::pickle(pickles::dict(&entries)), &records)
}

/// An archive with a record that leads out of it.
fn path_in_archive() -> Vec<u8> {
    use std::io::Write;
    let whole = std::fs::read(fixture("lmm/llava15/heads.pth")).unwrap();
    let mut zip = zip::ZipWriter::new_append(std::io::Cursor::new(whole)).unwrap();
    let options = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    zip.start_file("heads/data/../../../evil.txt", options).unwrap();
    zip.write_all(b"owned").unwrap();
    zip.finish().unwrap().into_inner()
}
