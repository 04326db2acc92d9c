//! SAM checkpoints and grounding heads from a stand-in for the hub on loopback.

#[path = "common/fake_hub.rs"]
mod fake_hub;

use std::path::PathBuf;
use std::time::Duration;

use fake_hub::{COMMIT, FakeHub};
use flmm::Error;
use flmm::hub::{Hub, HubSettings};

const LARGE: &[u8] = b"the larger checkpoint of the two, long enough to be cut in the middle";
const HEAD_INDEX: &[u8] = br#"{"weight_map": {"a": "head-00001-of-00001.safetensors"}}"#;

fn files() -> Vec<(&'static str, &'static [u8])> {
    vec![
        ("README.md", b"# Parts"),
        ("checkpoints/sam_config.json", b"{}"),
        ("checkpoints/sam_vit_b.pth", b"the smaller one"),
        ("checkpoints/sam_vit_l.pth", LARGE),
        ("head.json", b"{}"),
        ("head.safetensors", b"a head"),
        ("sharded/head-00001-of-00001.safetensors", b"another head"),
        ("sharded/model.safetensors.index.json", HEAD_INDEX),
    ]
}

struct Place {
    cache: tempfile::TempDir,
    server: FakeHub,
}

impl Place {
    fn new() -> Self {
        Self { cache: tempfile::tempdir().unwrap(), server: FakeHub::new(&files()) }
    }

    fn hub(&self, offline: bool) -> Hub {
        Hub::new(HubSettings {
            endpoint: self.server.endpoint.clone(),
            cache: self.cache.path().join("hub"),
            token: None,
            offline,
            attempts: 3,
            pause: Duration::from_millis(1),
            silence: Duration::from_secs(5),
        })
    }

    fn bring(&self, part: &str, offline: bool) -> Result<PathBuf, Error> {
        let hub = self.hub(offline);
        let plan = hub.plan_part(&part.parse()?)?;
        hub.download(&plan, &mut |_| Ok(()), &mut |_| {})
    }

    /// The message and hint of a part that cannot be had.
    #[track_caller]
    fn refused(&self, part: &str, offline: bool) -> String {
        let error = self.bring(part, offline).expect_err("it should have failed");
        assert!(matches!(error, Error::Hub { .. }), "{error:?}");
        format!("{error}\nhint: {}", error.hint().unwrap())
    }

    fn snapshot(&self) -> PathBuf {
        self.cache.path().join("hub/models--org--model/snapshots").join(COMMIT)
    }

    /// What was downloaded, as paths below the snapshot.
    fn files(&self) -> Vec<String> {
        let has = |name: &&str| self.snapshot().join(name).is_file();
        files().iter().map(|(name, _)| *name).filter(has).map(str::to_owned).collect()
    }
}

#[test]
fn a_file_comes_with_its_configuration_and_nothing_else() {
    let place = Place::new();
    let part = "org/model:checkpoints/sam_vit_l.pth";
    let file = place.bring(part, false).unwrap();
    assert_eq!(file, place.snapshot().join("checkpoints/sam_vit_l.pth"));
    assert_eq!(std::fs::read(&file).unwrap(), LARGE);
    assert_eq!(place.files(), ["checkpoints/sam_config.json", "checkpoints/sam_vit_l.pth"]);
    // From now on nobody is asked, with and without the network.
    place.server.gets();
    for offline in [false, true] {
        assert_eq!(place.bring(part, offline).unwrap(), file);
    }
    assert_eq!(place.bring(&format!("org/model@{COMMIT}:checkpoints/sam_vit_l.pth"), true).unwrap(), file);
    assert_eq!(place.server.gets(), Vec::<String>::new());
}

#[test]
fn a_repository_and_a_folder_are_parts_too() {
    let place = Place::new();
    assert_eq!(place.bring("org/model", false).unwrap(), place.snapshot());
    assert_eq!(place.files(), ["head.json", "head.safetensors"]);
    assert_eq!(place.bring("org/model:sharded", false).unwrap(), place.snapshot().join("sharded"));
    assert_eq!(place.files()[2..], files().iter().map(|(name, _)| *name).collect::<Vec<_>>()[6..]);
    place.server.gets();
    assert!(place.bring("org/model", true).is_ok() && place.bring("org/model:sharded", true).is_ok());
    // A shard that is not there makes it incomplete.
    std::fs::remove_file(place.snapshot().join("sharded/head-00001-of-00001.safetensors")).unwrap();
    assert!(place.refused("org/model:sharded", true).contains("`sharded` is not in the cache"));
    assert!(place.bring("org/model:sharded", false).is_ok());
}

#[test]
fn a_cut_connection_is_resumed_and_damage_is_not_kept() {
    let place = Place::new();
    place.server.script().cuts = vec![20, 20];
    let file = place.bring("org/model:checkpoints/sam_vit_l.pth", false).unwrap();
    assert_eq!(std::fs::read(file).unwrap(), LARGE);
    assert!(place.server.script().cuts.is_empty());

    let place = Place::new();
    place.server.script().corrupt.insert("head.safetensors".into());
    assert!(
        place.refused("org/model:head.safetensors", false).contains("`head.safetensors` has the checksum")
    );
    assert_eq!(place.files(), ["head.json"]);
    place.server.script().corrupt.clear();
    assert!(place.bring("org/model:head.safetensors", false).is_ok());
}

#[test]
fn what_is_not_there_is_explained() {
    let place = Place::new();
    let offline = place.refused("org/model:checkpoints/sam_vit_l.pth", true);
    assert!(offline.contains("`checkpoints/sam_vit_l.pth` is not in the cache"), "{offline}");
    assert!(offline.contains("HF_HUB_OFFLINE") && offline.contains("hf download org/model"), "{offline}");
    let absent = place.refused("org/model:sam_vit_l.pth", false);
    assert!(absent.contains("there is no `sam_vit_l.pth`"), "{absent}");
    assert!(absent.contains("org/model:checkpoints/sam_vit_l.pth, org/model:head.safetensors"), "{absent}");
    let several = place.refused("org/model:checkpoints", false);
    assert!(several.contains("not one file with weights in `checkpoints`"), "{several}");
    assert!(place.refused("org/none:x.pth", false).contains("org/none"));
    assert_eq!(place.files(), Vec::<String>::new());
}
