//! Running the program in a folder of its own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A small picture of three shapes, 80×60.
const PICTURE: &str = "lmm/llava15/images/a.png";

/// A folder that is removed at the end, and the program to run in it.
pub(crate) struct Place {
    folder: tempfile::TempDir,
}

/// What a run printed.
pub(crate) struct Ran {
    pub(crate) status: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

pub(crate) fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(path)
}

/// Options that choose the model of random weights in `fixtures/`.
pub(crate) fn model() -> Vec<String> {
    model_with(&fixture("lmm/llava15/model"))
}

/// The same with the LMM in another folder.
pub(crate) fn model_with(lmm: &Path) -> Vec<String> {
    let path = |path: PathBuf| path.display().to_string();
    vec![
        "--model".into(),
        path(lmm.to_owned()),
        "--sam".into(),
        path(fixture("lmm/_sam/sam_vit_tiny.pth")),
        "--head".into(),
        path(fixture("lmm/llava15/heads.pth")),
    ]
}

impl Place {
    /// A folder with the picture `a.png`.
    pub(crate) fn new() -> Self {
        let place = Self { folder: tempfile::tempdir().unwrap() };
        std::fs::copy(fixture(PICTURE), place.path("a.png")).unwrap();
        place
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path(name), bytes).unwrap();
    }

    /// Names of the files in the folder.
    pub(crate) fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_flmm"));
        command.args(args).current_dir(self.folder.path()).stdin(Stdio::null());
        for name in ["NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "COLUMNS", "TERM", "RAYON_NUM_THREADS"] {
            command.env_remove(name);
        }
        // No test may find, or ask for, what a developer has downloaded.
        for name in ["HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN_PATH", "TRANSFORMERS_OFFLINE"] {
            command.env_remove(name);
        }
        command.env("HF_HOME", self.path("hf")).env("HF_ENDPOINT", "http://127.0.0.1:9").env("NO_PROXY", "*");
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Ran {
        self.ran(self.command(args).output().unwrap())
    }

    /// Runs a command with the model of `fixtures/`.
    pub(crate) fn run_with_model(&self, args: &[&str]) -> Ran {
        self.ran(self.command(args).args(model()).output().unwrap())
    }

    /// As text, with the folder's and the fixtures' place left out.
    pub(crate) fn ran(&self, output: Output) -> Ran {
        let text = |bytes: Vec<u8>| {
            let text = String::from_utf8(bytes).unwrap();
            let here = format!("{}/", self.folder.path().display());
            let fixtures = format!("{}/", fixture("").display()).replace("//", "/");
            text.replace(&here, "").replace(&fixtures, "[fixtures]/")
        };
        Ran { status: output.status.code().unwrap_or(-1), out: text(output.stdout), err: text(output.stderr) }
    }
}

impl Ran {
    /// Everything, for a snapshot.
    pub(crate) fn all(&self) -> String {
        format!("exit status {}\n-- stdout\n{}-- stderr\n{}", self.status, self.out, self.err)
    }

    /// Asserts success and gives standard output.
    #[track_caller]
    pub(crate) fn ok(&self) -> &str {
        assert_eq!(self.status, 0, "{}", self.all());
        &self.out
    }
}

/// A PNG whose header says `width × height`, with no pixels behind it.
pub(crate) fn png_header(width: u32, height: u32) -> Vec<u8> {
    let mut chunk = b"IHDR".to_vec();
    chunk.extend(width.to_be_bytes());
    chunk.extend(height.to_be_bytes());
    chunk.extend([8, 2, 0, 0, 0]);
    let mut bytes = b"\x89PNG\r\n\x1a\n\0\0\0\x0d".to_vec();
    bytes.extend(&chunk);
    bytes.extend(crc32(&chunk).to_be_bytes());
    bytes.extend(b"\0\0\0\0IDAT");
    bytes.extend(crc32(b"IDAT").to_be_bytes());
    bytes
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(
            crc ^ u32::from(*byte),
            |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 },
        )
    };
    !bytes.iter().fold(!0, step)
}

/// A JSON value with every leaf replaced by its kind, keys in order.
pub(crate) fn shape(value: &serde_json::Value) -> serde_json::Value {
    use serde_json::Value::{Array, Bool, Null, Number, Object, String};
    match value {
        Object(map) => Object(map.iter().map(|(key, value)| (key.clone(), shape(value))).collect()),
        Array(items) => Array(items.iter().map(shape).collect()),
        String(_) => "text".into(),
        Number(number) => if number.is_f64() { "number" } else { "whole number" }.into(),
        Bool(_) => "flag".into(),
        Null => Null,
    }
}

/// Files of a folder copied to another one.
pub(crate) fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Named values of a line-based listing: `name  value`.
pub(crate) fn listing(text: &str) -> BTreeMap<String, String> {
    let pair =
        |line: &str| line.split_once("  ").map(|(name, value)| (name.to_owned(), value.trim().to_owned()));
    text.lines().filter_map(pair).collect()
}
