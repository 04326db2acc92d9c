//! Downloads against a stand-in for the hub on loopback.

#[path = "common/fake_hub.rs"]
mod fake_hub;

use std::path::{Path, PathBuf};
use std::time::Duration;

use fake_hub::{COMMIT, FakeHub, sha256};
use flmm::Error;
use flmm::hub::{Hub, HubSettings, Progress, RepoId};

const INDEX: &[u8] =
    br#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;

/// A repository with shards, and things that no model needs.
fn sharded() -> Vec<(&'static str, &'static [u8])> {
    vec![
        (".gitattributes", b"x"),
        ("README.md", b"# A model"),
        ("config.json", br#"{"model_type": "llava"}"#),
        ("model-00001-of-00002.safetensors", b"the first shard, which is a little longer than the other"),
        ("model-00002-of-00002.safetensors", b"the second shard"),
        ("model.safetensors.index.json", INDEX),
        ("pytorch_model.bin", b"the same once more"),
        ("tokenizer.json", b"{}"),
    ]
}

struct Place {
    cache: tempfile::TempDir,
    server: FakeHub,
}

impl Place {
    fn new(files: &[(&str, &[u8])]) -> Self {
        Self { cache: tempfile::tempdir().unwrap(), server: FakeHub::new(files) }
    }

    fn settings(&self) -> HubSettings {
        HubSettings {
            endpoint: self.server.endpoint.clone(),
            cache: self.cache.path().join("hub"),
            token: None,
            offline: false,
            attempts: 3,
            pause: Duration::from_millis(1),
            silence: Duration::from_secs(5),
        }
    }

    fn resolve(&self, repo: &str) -> Result<PathBuf, Error> {
        Hub::new(self.settings()).resolve(&repo.parse()?, &mut |_| {})
    }

    /// The message and hint of a download that must fail.
    #[track_caller]
    fn refused(&self, repo: &str) -> String {
        let error = self.resolve(repo).expect_err("the download should have failed");
        assert!(matches!(error, Error::Hub { .. }), "{error:?}");
        format!("{error}\nhint: {}", error.hint().unwrap())
    }

    fn repo(&self) -> PathBuf {
        self.cache.path().join("hub/models--org--model")
    }

    fn blobs(&self) -> Vec<String> {
        names(&self.repo().join("blobs"))
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_is_needed_is_laid_out_as_huggingface_hub_does() {
    let place = Place::new(&sharded());
    let mut events = Vec::new();
    let repo: RepoId = "org/model".parse().unwrap();
    let hub = Hub::new(place.settings());
    assert_eq!(hub.cached(&repo), None);
    let folder = hub.resolve(&repo, &mut |event| events.push(format!("{event:?}"))).unwrap();
    assert_eq!(folder, place.repo().join("snapshots").join(COMMIT));
    let expected = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ];
    assert_eq!(names(&folder), expected);
    for (name, content) in sharded().iter().filter(|(name, _)| expected.contains(name)) {
        assert_eq!(std::fs::read(folder.join(name)).unwrap(), *content, "{name}");
        let sum = sha256(content);
        let etag = if name.ends_with(".json") { &sum[..40] } else { &sum };
        #[cfg(unix)]
        assert_eq!(
            std::fs::read_link(folder.join(name)).unwrap(),
            Path::new("../../blobs").join(etag),
            "{name}"
        );
        assert!(place.repo().join("blobs").join(etag).is_file());
    }
    assert_eq!(std::fs::read_to_string(place.repo().join("refs/main")).unwrap(), COMMIT);
    assert_eq!(place.blobs().len(), 5);
    assert_eq!(names(&place.repo()), ["blobs", "refs", "snapshots"]);
    // Configurations first, then the shards with their size.
    assert_eq!(events[0], format!("{:?}", Progress::Begin { files: 3, bytes: 23 + 2 + INDEX.len() as u64 }));
    assert!(events.contains(&format!("{:?}", Progress::Begin { files: 2, bytes: 56 + 16 })), "{events:?}");
    let shard = "model-00002-of-00002.safetensors";
    assert_eq!(events[events.len() - 1], format!("{:?}", Progress::Done { file: shard }));
    assert_eq!(
        events[events.len() - 2],
        format!("{:?}", Progress::At { file: shard, bytes: 16, size: Some(16) })
    );

    // A second use asks nobody, not even with a server that would refuse.
    place.server.gets();
    assert_eq!(place.resolve("org/model").unwrap(), folder);
    assert_eq!(hub.cached(&repo), Some(folder));
    assert_eq!(place.server.gets(), Vec::<String>::new());
}

#[test]
fn a_cut_connection_is_resumed_at_once() {
    let place = Place::new(&sharded());
    // Headers of small files are not cut short of their end: 20 bytes fit the shards and the index.
    place.server.script().cuts = vec![20, 20];
    let folder = place.resolve("org/model").unwrap();
    assert_eq!(std::fs::read(folder.join("model.safetensors.index.json")).unwrap(), INDEX);
    let log = &place.server.script().log;
    let ranges: Vec<&str> = log
        .iter()
        .filter_map(|(host, _, path, headers)| {
            (*host == "cdn" || path.contains("/content/"))
                .then(|| headers.get("range").map(String::as_str))
                .flatten()
        })
        .collect();
    assert_eq!(ranges, ["bytes=20-", "bytes=20-"]);
    assert!(place.blobs().iter().all(|name| !name.ends_with(".incomplete")));
}

#[test]
fn a_download_that_ended_is_resumed_by_the_next() {
    let place = Place::new(&sharded());
    let first = sharded()[3].1;
    let (sum, size) = (sha256(first), first.len());
    // Three attempts, of which the later two bring nothing.
    place.server.script().cuts = vec![30, 0, 0, 0];
    // The small files are not larger than the first cut allows.
    place.server.script().files.get_mut(COMMIT).unwrap().remove("model.safetensors.index.json");
    place.server.script().files.get_mut(COMMIT).unwrap().remove("model-00002-of-00002.safetensors");
    place.server.script().files.get_mut(COMMIT).unwrap().remove("pytorch_model.bin");
    let message = place.refused("org/model");
    assert!(
        message.contains("model-00001-of-00002.safetensors") && message.contains("failed 3 times"),
        "{message}"
    );
    let partial = place.repo().join("blobs").join(format!("{sum}.incomplete"));
    assert_eq!(std::fs::read(&partial).unwrap(), &first[..30]);
    assert!(!place.repo().join("snapshots").join(COMMIT).join("model-00001-of-00002.safetensors").exists());

    place.server.script().cuts.clear();
    place.server.script().log.clear();
    let folder = place.resolve("org/model").unwrap();
    assert_eq!(std::fs::read(folder.join("model-00001-of-00002.safetensors")).unwrap(), first);
    assert!(!partial.exists());
    let script = place.server.script();
    let range =
        script.log.iter().find_map(|(host, _, _, headers)| (*host == "cdn").then(|| headers.get("range")));
    assert_eq!(range.flatten().map(String::as_str), Some("bytes=30-"));
    assert_eq!(size, 56);
}

#[test]
fn a_server_without_ranges_sends_the_whole_file() {
    let place = Place::new(&[
        ("config.json", b"{}"),
        ("model.safetensors", b"0123456789"),
        ("tokenizer.json", b"{}"),
    ]);
    place.server.script().cuts = vec![4];
    place.server.script().no_ranges = true;
    let folder = place.resolve("org/model").unwrap();
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), b"0123456789");
}

#[test]
fn a_wrong_checksum_is_refused_and_not_kept() {
    let place = Place::new(&sharded());
    place.server.script().corrupt.insert("model-00001-of-00002.safetensors".into());
    let message = place.refused("org/model");
    assert!(message.contains("`model-00001-of-00002.safetensors` has the checksum"), "{message}");
    let sum = sha256(sharded()[3].1);
    assert!(place.blobs().iter().all(|name| !name.starts_with(&sum)), "{:?}", place.blobs());
    // Damage in what an earlier attempt left is mended by one from the beginning.
    std::fs::write(place.repo().join("blobs").join(format!("{sum}.incomplete")), b"not the shard").unwrap();
    place.server.script().corrupt.clear();
    let folder = place.resolve("org/model").unwrap();
    assert_eq!(std::fs::read(folder.join("model-00001-of-00002.safetensors")).unwrap(), sharded()[3].1);
}

#[test]
fn a_token_goes_to_the_hub_and_nowhere_else() {
    let place = Place::new(&sharded());
    place.server.script().token = Some("hf_secret");
    let message = place.refused("org/model");
    assert!(message.contains("private") && message.contains("HF_TOKEN"), "{message}");
    let settings = HubSettings { token: Some("hf_secret".into()), ..place.settings() };
    place.server.script().log.clear();
    Hub::new(settings).resolve(&"org/model".parse().unwrap(), &mut |_| {}).unwrap();
    let script = place.server.script();
    let (hub, cdn): (Vec<_>, Vec<_>) = script.log.iter().partition(|(host, ..)| *host == "hub");
    assert!(!cdn.is_empty() && cdn.iter().all(|(_, _, _, headers)| !headers.contains_key("authorization")));
    assert!(hub.iter().all(|(_, _, _, headers)| headers["authorization"] == "Bearer hf_secret"));
    // Only weights come from the other host.
    assert!(cdn.iter().all(|(_, _, path, _)| path.ends_with(".safetensors")), "{cdn:?}");
}

#[test]
fn refusals_say_what_to_do() {
    let place = Place::new(&sharded());
    for (refusal, says) in [
        ((401, ""), ["no such repository", "hf auth login"]),
        ((401, "GatedRepo"), ["accepted its licence", "HF_TOKEN"]),
        ((403, ""), ["accepted its licence", "HF_TOKEN"]),
        ((404, "RepoNotFound"), ["no such repository", "check the name"]),
        ((404, "RevisionNotFound"), ["no revision `main`", "leave the revision out"]),
        ((503, ""), ["status 503", "huggingface-cli download org/model"]),
        ((400, ""), ["status 400", "HF_ENDPOINT"]),
    ] {
        place.server.script().refusal = Some(refusal);
        let message = place.refused("org/model");
        assert!(says.iter().all(|part| message.contains(part)), "{refusal:?}: {message}");
    }
    // A busy server is asked again, a refusal is final.
    let count = |status| {
        place.server.script().refusal = Some((status, ""));
        place.server.gets();
        place.refused("org/model");
        place.server.gets().len()
    };
    assert_eq!((count(503), count(404)), (3, 1));
    assert!(!place.repo().exists());
}

#[test]
fn without_a_connection_the_error_names_every_way() {
    let place = Place::new(&sharded());
    let repo: RepoId = "org/model@v1".parse().unwrap();
    let offline = HubSettings { offline: true, ..place.settings() };
    let nobody = HubSettings { endpoint: "http://127.0.0.1:9".into(), ..place.settings() };
    for settings in [offline.clone(), nobody] {
        let error = Hub::new(settings).plan(&repo).unwrap_err();
        let hint = error.hint().unwrap().to_owned();
        assert!(error.to_string().contains("org/model@v1: all files are not in the cache"), "{error}");
        for part in ["huggingface-cli download org/model --revision v1", "HF_HOME", "a local folder"] {
            assert!(hint.contains(part), "{hint}");
        }
    }
    assert!(place.server.script().log.is_empty());
    // Once downloaded, offline is enough; a shard that is gone is named.
    let folder = place.resolve("org/model").unwrap();
    let offline = Hub::new(offline);
    let main: RepoId = "org/model".parse().unwrap();
    assert_eq!(offline.plan(&main).unwrap().folder(), folder);
    std::fs::remove_file(folder.join("model-00002-of-00002.safetensors")).unwrap();
    let error = offline.plan(&main).unwrap_err().to_string();
    assert!(error.contains("`model-00002-of-00002.safetensors` is not in the cache"), "{error}");
    // With a connection only that one is brought, from the blob that is still there.
    place.server.gets();
    place.resolve("org/model").unwrap();
    assert_eq!(place.server.gets(), ["hub /api/models/org/model/revision/main"]);
}

#[test]
fn revisions_have_their_own_snapshots() {
    let place = Place::new(&sharded());
    let other = "89abcdef0123456789abcdef0123456789abcdef";
    let mut files = sharded();
    files[2].1 = br#"{"model_type": "other"}"#;
    place.server.add("refs/pr/1", other, &files);
    let main = place.resolve("org/model").unwrap();
    let folder = place.resolve("org/model@refs/pr/1").unwrap();
    assert_eq!(folder, place.repo().join("snapshots").join(other));
    assert_eq!(std::fs::read_to_string(place.repo().join("refs/refs/pr/1")).unwrap(), other);
    assert_eq!(std::fs::read(folder.join("config.json")).unwrap(), files[2].1);
    assert_ne!(std::fs::read(main.join("config.json")).unwrap(), files[2].1);
    // What both have is stored once, and not downloaded twice.
    assert_eq!(place.blobs().len(), 6);
    assert_eq!(place.server.gets().iter().filter(|path| path.starts_with("cdn")).count(), 2);
    // A commit names itself; there is nothing to note in refs.
    assert_eq!(place.resolve(&format!("org/model@{other}")).unwrap(), folder);
    assert_eq!(names(&place.repo().join("refs")), ["main", "refs"]);
    let message = place.refused("org/model@v9");
    assert!(message.contains("no revision `v9`"), "{message}");
}

#[test]
fn folders_are_brought_with_their_structure() {
    let files: Vec<(&str, &[u8])> = vec![
        ("llm/config.json", b"{}"),
        ("llm/model.safetensors", b"llm"),
        ("llm/tokenizer.json", b"{}"),
        ("projector/config.json", b"{\"a\": 1}"),
        ("projector/model.safetensors", b"projector"),
        ("visual_encoder/config.json", b"{\"b\": 1}"),
        ("visual_encoder/model.safetensors", b"visual"),
        ("assets/demo.png", b"png"),
    ];
    let place = Place::new(&files);
    let folder = place.resolve("org/model").unwrap();
    assert_eq!(names(&folder), ["llm", "projector", "visual_encoder"]);
    assert_eq!(std::fs::read(folder.join("visual_encoder/model.safetensors")).unwrap(), b"visual");
    #[cfg(unix)]
    assert_eq!(
        std::fs::read_link(folder.join("llm/model.safetensors")).unwrap(),
        Path::new("../../../blobs").join(sha256(b"llm"))
    );
    place.server.gets();
    // Complete, until a folder loses its weights.
    place.resolve("org/model").unwrap();
    assert_eq!(place.server.gets(), Vec::<String>::new());
    std::fs::remove_file(folder.join("projector/model.safetensors")).unwrap();
    place.resolve("org/model").unwrap();
    assert!(folder.join("projector/model.safetensors").is_file());
}

#[test]
fn a_model_of_no_use_is_left_before_its_weights() {
    let place = Place::new(&sharded());
    let hub = Hub::new(place.settings());
    let plan = hub.plan(&"org/model".parse().unwrap()).unwrap();
    assert!(!plan.is_cached() && !plan.is_bundle());
    let mut check = |folder: &Path| {
        assert!(folder.join("config.json").is_file() && folder.join("tokenizer.json").is_file());
        Err(Error::request("unknown", "choose another"))
    };
    assert!(hub.download(&plan, &mut check, &mut |_| {}).is_err());
    assert!(place.server.gets().iter().all(|path| !path.starts_with("cdn")));
    let gguf = Place::new(&[("config.json", b"{}"), ("model.gguf", b"x")]);
    assert!(gguf.refused("org/model").contains("GGUF"), "{}", gguf.refused("org/model"));
}

#[test]
fn names_from_the_server_stay_in_the_cache() {
    let place = Place::new(&[
        ("config.json", b"{}"),
        ("tokenizer.json", b"{}"),
        ("../../../model.safetensors", b"outside"),
        ("/tmp/pytorch_model.bin", b"outside"),
        ("model.safetensors", b"inside"),
    ]);
    let folder = place.resolve("org/model").unwrap();
    assert_eq!(names(&folder), ["config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(names(place.cache.path()), ["hub"]);
    // A folder above the snapshot, with all that would make it one of the model's.
    let place = Place::new(&[
        ("../config.json", b"{}"),
        ("../model.safetensors", b"outside"),
        ("llm/config.json", b"{}"),
        ("llm/model.safetensors", b"inside"),
        ("llm/tokenizer.json", b"{}"),
    ]);
    let folder = place.resolve("org/model").unwrap();
    assert_eq!(names(&folder), ["llm"]);
    assert_eq!(names(&place.repo().join("snapshots")), [COMMIT]);
    // The name of the content becomes a file name too.
    let place = Place::new(&[("config.json", b"{}"), ("model.safetensors", b"x")]);
    place.server.script().etag = Some("../../../../evil");
    assert!(place.refused("org/model").contains("no usable ETag"));
    place.server.script().etag = None;
    let index = br#"{"weight_map": {"a": "../../model.safetensors"}}"#;
    place.server.add("main", COMMIT, &[("config.json", b"{}"), ("model.safetensors.index.json", index)]);
    let error = place.resolve("org/model").unwrap_err().to_string();
    assert!(error.contains("is not a file name"), "{error}");
}
