//! `--model org/name`: models from a stand-in for the hub on loopback.

use std::path::{Path, PathBuf};

use insta::assert_snapshot;

use crate::fake_hub::{COMMIT, FakeHub};
use crate::support::{Place, Ran, fixture};

/// The files below `folder`, with `prefix` before their names.
fn files(folder: &Path, prefix: &str) -> Vec<(String, Vec<u8>)> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let named = |path: PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap();
        (format!("{prefix}{name}"), std::fs::read(&path).unwrap())
    };
    entries.filter(|path| path.is_file()).map(named).collect()
}

fn server(files: &[(String, Vec<u8>)]) -> FakeHub {
    let files: Vec<(&str, &[u8])> =
        files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    FakeHub::new(&files)
}

fn llava() -> Vec<(String, Vec<u8>)> {
    files(&fixture("lmm/llava15/model"), "")
}

struct Online {
    place: Place,
    server: FakeHub,
}

impl Online {
    fn new(files: &[(String, Vec<u8>)]) -> Self {
        Self { place: Place::new(), server: server(files) }
    }

    fn run(&self, args: &[&str], vars: &[(&str, &str)]) -> Ran {
        let mut command = self.place.command(args);
        command.env("HF_ENDPOINT", &self.server.endpoint).env("HF_HOME", self.place.path("hf"));
        command.envs(vars.iter().copied());
        let mut ran = self.place.ran(command.output().unwrap());
        ran.err = ran.err.replace(&self.server.endpoint, "[hub]");
        ran
    }

    fn inspect(&self, model: &str, vars: &[(&str, &str)], more: &[&str]) -> Ran {
        let path = |name: &str| fixture(name).display().to_string();
        let (sam, head) = (path("lmm/_sam/sam_vit_tiny.pth"), path("lmm/llava15/heads.pth"));
        let args = ["inspect", "model", "--model", model, "--sam", &sam, "--head", &head];
        self.run(&[&args[..], more].concat(), vars)
    }
}

#[test]
fn a_named_model_is_downloaded_once() {
    let online = Online::new(&llava());
    let first = online.inspect("org/model", &[], &[]);
    assert!(first.ok().starts_with("model  ") && first.out.contains("org/model"), "{}", first.all());
    assert_snapshot!("downloading", first.err);
    assert!(
        online.place.path(&format!("hf/hub/models--org--model/snapshots/{COMMIT}/config.json")).is_file()
    );
    online.server.gets();
    // From now on nobody is asked, with and without the network.
    assert_eq!(
        online.inspect("org/model", &[], &[]).all(),
        format!("exit status 0\n-- stdout\n{}-- stderr\n", first.out)
    );
    assert_eq!(online.inspect("org/model", &[("HF_HUB_OFFLINE", "1")], &[]).ok(), first.out);
    assert!(online.inspect(&format!("org/model@{COMMIT}"), &[], &["-q"]).err.is_empty());
    assert_eq!(online.server.gets(), Vec::<String>::new());
    // What is downloaded can be looked at by name.
    let listed = online.run(&["inspect", "model", "org/model"], &[]);
    assert!(listed.ok().contains("LLaVA-1.5-7B"), "{}", listed.all());
    assert_eq!(online.run(&["inspect", "model", "org/other"], &[]).status, 2);
    // A folder of that name comes before the repository.
    std::fs::create_dir_all(online.place.path("org/model")).unwrap();
    assert!(online.inspect("org/model", &[], &[]).err.contains("org/model/config.json"));
}

#[test]
fn quiet_downloads_say_nothing() {
    let online = Online::new(&llava());
    let ran = online.inspect("org/model", &[], &["-q"]);
    assert_eq!((ran.status, ran.err.as_str()), (0, ""));
}

#[test]
fn a_bundle_of_the_hub_needs_no_other_option() {
    let mut bundle = files(&fixture("lmm/llava15/model"), "lmm/");
    bundle.extend(
        files(&fixture("lmm/_sam"), "sam/").into_iter().filter(|(name, _)| !name.contains("expected")),
    );
    let heads = std::fs::read(fixture("lmm/llava15/heads.pth")).unwrap();
    bundle.push(("head/heads.pth".to_owned(), heads));
    let online = Online::new(&bundle);
    let ran = online.run(&["inspect", "model", "--model", "org/model"], &[]);
    assert!(ran.ok().contains("org/model"), "{}", ran.all());
}

#[test]
fn what_cannot_be_had_is_explained() {
    let online = Online::new(&llava());
    let refused = |ran: Ran, status: i32| {
        assert_eq!((ran.status, ran.out.as_str()), (status, ""), "{}", ran.err);
        ran.err
    };
    assert_snapshot!("offline", refused(online.inspect("org/model", &[("HF_HUB_OFFLINE", "1")], &[]), 1));
    let nobody = [("HF_ENDPOINT", "http://127.0.0.1:9")];
    assert_snapshot!("unreachable", refused(online.inspect("org/model@v1", &nobody, &[]), 1));
    assert_snapshot!("no_repository", refused(online.inspect("org/none", &[], &[]), 1));
    assert_snapshot!("no_revision", refused(online.inspect("org/model@v9", &[], &[]), 1));
    online.server.script().refusal = Some((403, "GatedRepo"));
    assert_snapshot!("gated", refused(online.inspect("org/model", &[], &[]), 1));
    online.server.script().refusal = Some((401, ""));
    assert_snapshot!("unauthorised", refused(online.inspect("org/model", &[], &[]), 1));
    online.server.script().refusal = None;
    online.server.script().corrupt.insert("model.safetensors".into());
    let damaged = refused(online.inspect("org/model", &[], &[]), 1);
    assert!(damaged.contains("`model.safetensors` has the checksum"), "{damaged}");
    // Parts that are missing are asked for before anything is downloaded.
    let online = Online::new(&llava());
    assert_snapshot!("parts", refused(online.run(&["inspect", "model", "--model", "org/model"], &[]), 2));
    let sam = ["inspect", "model", "--model", "org/model", "--sam", "sam_vit_l.pth", "--head", "head"];
    assert_snapshot!("no_sam", refused(online.run(&sam, &[]), 2));
    assert!(!online.place.path("hf").exists());
}

#[test]
fn a_model_of_an_unknown_family_is_left_before_its_weights() {
    let mut files = llava();
    let config = files.iter_mut().find(|(name, _)| name == "config.json").unwrap();
    config.1 = br#"{"model_type": "eyeball"}"#.to_vec();
    let online = Online::new(&files);
    let ran = online.inspect("org/model", &[], &[]);
    assert_eq!(ran.status, 1);
    assert!(ran.err.contains("`eyeball`"), "{}", ran.err);
    assert!(online.server.gets().iter().all(|path| !path.starts_with("cdn")));
}

#[test]
fn sam_and_head_may_come_from_the_hub() {
    let mut parts =
        vec![("head/heads.pth".to_owned(), std::fs::read(fixture("lmm/llava15/heads.pth")).unwrap())];
    for name in ["sam_vit_tiny.pth", "sam_config.json"] {
        parts.push((format!("checkpoints/{name}"), std::fs::read(fixture("lmm/_sam").join(name)).unwrap()));
    }
    let online = Online::new(&parts);
    let model = fixture("lmm/llava15/model").display().to_string();
    let inspect = |sam: &str, head: &str, vars: &[(&str, &str)]| {
        online.run(&["inspect", "model", "--model", &model, "--sam", sam, "--head", head], vars)
    };
    let (sam, head) = ("org/model:checkpoints/sam_vit_tiny.pth", "org/model@main:head");
    let first = inspect(sam, head, &[]);
    assert!(first.ok().contains("maps.channels"), "{}", first.all());
    assert!(first.err.contains("downloading org/model:checkpoints/sam_vit_tiny.pth: "), "{}", first.err);
    let again = inspect(sam, head, &[("HF_HUB_OFFLINE", "1")]);
    assert_eq!((again.ok(), again.err.as_str()), (first.out.as_str(), ""));
    let none = inspect("org/model:sam.pth", head, &[]);
    assert_eq!((none.status, none.out.as_str()), (1, ""));
    assert!(
        none.err.contains("there is no `sam.pth`") && none.err.contains("sam_vit_tiny.pth"),
        "{}",
        none.err
    );
    // So may those of a training, which is told that there is no data only after that.
    let train = |more: &[&str]| {
        let base = ["train", "--config", "flmm-tiny", "--model", &model, "--data", "none", "--out", "run"];
        let vars = [("HF_HUB_OFFLINE", "1")];
        let ran = online.run(&[&base[..], more].concat(), &vars);
        assert_ne!(ran.status, 0);
        ran.err
    };
    assert!(train(&[]).contains("no SAM checkpoint is given"), "{}", train(&[]));
    for parts in [&["--sam", sam][..], &["--sam", sam, "--head", head], &["--set", "head.refiner=none"]] {
        assert!(train(parts).starts_with("error: none: No such file"), "{}", train(parts));
    }
    assert!(train(&["--sam", "org/model:sam.pth"]).contains("`sam.pth`"));
    // A file that is not there is no repository.
    let typo = inspect("sam/vit_l.pth", head, &[]);
    assert_eq!((typo.status, typo.out.as_str()), (2, ""));
    assert!(typo.err.contains("`sam/vit_l.pth`: no such file or folder"), "{}", typo.err);
}
