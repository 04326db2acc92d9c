//! Pictures from folders, archives and shards: found in every layout, from many threads, damage explained.

use std::io::Write;
use std::path::Path;

use flmm_data::ImageStore;
use image::{ImageFormat, Rgb, RgbImage};
use proptest::prelude::*;

/// A PNG whose pixels tell which picture it is.
fn picture(number: u8) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    RgbImage::from_pixel(5, 4, Rgb([number, 0, 7])).write_to(&mut bytes, ImageFormat::Png).unwrap();
    bytes.into_inner()
}

fn write_zip(path: &Path, entries: &[(&str, Vec<u8>)]) {
    let mut zip = zip::ZipWriter::new(std::fs::File::create(path).unwrap());
    for (name, bytes) in entries {
        zip.start_file(*name, zip::write::SimpleFileOptions::default()).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap();
}

fn write_tar(path: &Path, entries: &[(&str, Vec<u8>)]) {
    let mut tar = tar::Builder::new(std::fs::File::create(path).unwrap());
    for (name, bytes) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, bytes.as_slice()).unwrap();
    }
    tar.finish().unwrap();
}

fn root() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(root.path().join("coco")).unwrap();
    root
}

fn first_pixel(store: &ImageStore, name: &str) -> u8 {
    store.read(name).unwrap_or_else(|error| panic!("{name}: {error}")).get_pixel(0, 0)[0]
}

#[test]
fn every_layout_is_found() {
    let root = root();
    let coco = root.path().join("coco");
    std::fs::create_dir(coco.join("a")).unwrap();
    std::fs::write(coco.join("a/1.png"), picture(1)).unwrap();
    write_zip(&coco.join("b.zip"), &[("b/2.png", picture(2)), ("b/in/3.png", picture(3))]);
    write_tar(&coco.join("c.tar"), &[("4.png", picture(4))]);
    write_tar(&coco.join("d-000.tar"), &[("x/5.png", picture(5)), ("x/5.json", b"{}".to_vec())]);
    write_tar(&coco.join("d-001.tar"), &[("y/6.png", picture(6))]);
    std::fs::create_dir(coco.join("e")).unwrap();
    write_tar(&coco.join("e/00000.tar"), &[("./7.png", picture(7))]);
    // A file beside an archive comes first.
    std::fs::create_dir(coco.join("b")).unwrap();
    std::fs::write(coco.join("b/8.png"), picture(8)).unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    for (name, number) in [
        ("coco/a/1.png", 1),
        ("coco/b/2.png", 2),
        ("coco/b/in/3.png", 3),
        ("coco/c/4.png", 4),
        ("coco/d/5.png", 5),
        ("coco/d/6.png", 6),
        ("coco/e/7.png", 7),
        ("coco/b/8.png", 8),
    ] {
        assert_eq!(first_pixel(&store, name), number, "{name}");
        assert_eq!(store.dimensions(name).unwrap(), (5, 4), "{name}");
    }
    assert!(
        ["coco/a", "coco/b", "coco/c", "coco/d", "coco/e", "coco/a/1.png"].iter().all(|path| store.has(path))
    );
    assert!(!store.has("coco/f") && !store.has("coco/a/2.png"));
    assert!(store.read("coco/a/2.png").is_err());
    assert!(store.read("coco/zzz/2.png").unwrap_err().to_string().contains("coco/zzz/2.png"));
    for name in ["../x.png", "/etc/passwd", "", "coco/./../a"] {
        assert!(store.read(name).unwrap_err().to_string().contains("not a path below"), "{name}");
    }
    assert!(ImageStore::open(root.path().join("none")).is_err());
    assert!(ImageStore::open(root.path().join("coco/c.tar")).is_err());
}

#[test]
fn a_plain_name_in_two_folders_of_an_archive_is_not_guessed() {
    let root = root();
    write_tar(&root.path().join("coco/a.tar"), &[("x/1.png", picture(1)), ("y/1.png", picture(2))]);
    let store = ImageStore::open(root.path()).unwrap();
    assert!(store.read("coco/a/1.png").unwrap_err().to_string().contains("no such picture"));
    assert_eq!(first_pixel(&store, "coco/a/y/1.png"), 2);
}

#[test]
fn threads_share_an_archive() {
    let root = root();
    let names: Vec<String> = (0..50).map(|i| format!("t/{i}.png")).collect();
    let entries: Vec<(&str, Vec<u8>)> =
        names.iter().enumerate().map(|(i, name)| (name.as_str(), picture(i as u8))).collect();
    write_zip(&root.path().join("coco/t.zip"), &entries);
    write_tar(&root.path().join("coco/u.tar"), &entries);
    let store = ImageStore::open(root.path()).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let store = &store;
            scope.spawn(move || {
                for i in (0..50).map(|i| (i * 7 + thread) % 50) {
                    assert_eq!(first_pixel(store, &format!("coco/t/{i}.png")), i as u8);
                    assert_eq!(first_pixel(store, &format!("coco/u/{i}.png")), i as u8);
                }
            });
        }
    });
}

#[test]
fn damage_is_explained_and_never_panics() {
    let root = root();
    let coco = root.path().join("coco");
    let entries = [("1.png", picture(1)), ("2.png", picture(2))];
    write_zip(&coco.join("a.zip"), &entries);
    write_tar(&coco.join("b.tar"), &entries);
    let (zip, tar) = (std::fs::read(coco.join("a.zip")).unwrap(), std::fs::read(coco.join("b.tar")).unwrap());
    std::fs::write(coco.join("a.zip"), &zip[..zip.len() - 30]).unwrap();
    std::fs::write(coco.join("b.tar"), &tar[..520]).unwrap();
    std::fs::write(coco.join("c.tar"), vec![7; 4096]).unwrap();
    std::fs::write(coco.join("d.tar"), b"").unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    for (folder, kind) in [("a", "zip"), ("b", "tar"), ("c", "tar"), ("d", "tar")] {
        let error = store.read(&format!("coco/{folder}/1.png")).unwrap_err();
        assert!(error.to_string().contains(&format!("{folder}.{kind}")), "{error}");
        assert!(error.hint().unwrap().contains("again"), "{error}");
        assert!(store.archives(&format!("coco/{folder}"))[0].is_err());
    }
}

#[test]
fn a_size_that_no_picture_has_is_refused_before_memory_is_taken() {
    let root = root();
    let path = root.path().join("coco/a.tar");
    let mut header = tar::Header::new_gnu();
    header.set_path("1.png").unwrap();
    header.set_size(1 << 40);
    header.set_mode(0o644);
    header.set_cksum();
    // A sparse file: as long as the header says, without taking space.
    let mut file = std::fs::File::create(&path).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    if file.set_len((1 << 40) + 4096).is_err() {
        return;
    }
    let store = ImageStore::open(root.path()).unwrap();
    let error = store.read("coco/a/1.png").unwrap_err();
    assert!(error.to_string().contains("1099511627776 bytes"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn any_byte_may_be_wrong(position in 0usize..4000, value in any::<u8>(), zipped in any::<bool>()) {
        let root = root();
        let path = root.path().join(if zipped { "coco/a.zip" } else { "coco/a.tar" });
        let entries = [("1.png", picture(1)), ("2.png", picture(2))];
        if zipped { write_zip(&path, &entries) } else { write_tar(&path, &entries) }
        let mut bytes = std::fs::read(&path).unwrap();
        let at = position % bytes.len();
        bytes[at] = value;
        std::fs::write(&path, bytes).unwrap();
        let store = ImageStore::open(root.path()).unwrap();
        for name in ["coco/a/1.png", "coco/a/2.png"] {
            let _ = store.read(name);
            let _ = store.dimensions(name);
        }
    }
}
