//! `flmm world`.

use crate::support::Place;

const ARGS: [&str; 8] = ["world", "--split", "test", "--count", "2", "--seed", "7", "--out"];

#[test]
fn a_world_is_written_whole_or_not_at_all() {
    let place = Place::new();
    let ran = place.run(&[&ARGS[..], &["w"]].concat());
    assert!(ran.ok().is_empty() && ran.err.contains("2 scenes"), "{}", ran.all());
    assert!(place.path("w/world.json").is_file());
    // A folder with other things in it is left alone.
    std::fs::create_dir(place.path("full")).unwrap();
    place.write("full/note.txt", b"mine");
    let ran = place.run(&[&ARGS[..], &["full"]].concat());
    assert_eq!(ran.status, 1, "{}", ran.all());
    assert!(ran.err.contains("hint: "));
    assert_eq!(std::fs::read_dir(place.path("full")).unwrap().count(), 1);
    assert_eq!(place.files(), ["a.png", "full", "w"]);
}
