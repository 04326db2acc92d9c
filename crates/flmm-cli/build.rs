//! Embeds the default model: every file of `models/flmm-tiny/{lmm,sam,head}` that exists when the program is built.

use std::io::Write;
use std::path::{Path, PathBuf};

fn main() -> std::io::Result<()> {
    let bundle = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/flmm-tiny");
    println!("cargo:rerun-if-changed={}", bundle.display());
    let mut files = Vec::new();
    for part in ["head", "lmm", "sam"] {
        let folder = bundle.join(part);
        println!("cargo:rerun-if-changed={}", folder.display());
        if folder.is_dir() {
            let mut names: Vec<PathBuf> =
                std::fs::read_dir(&folder)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
            names.sort();
            files.extend(names.into_iter().filter(|path| path.is_file()));
        }
    }
    let out = std::env::var_os("OUT_DIR").ok_or_else(|| std::io::Error::other("OUT_DIR is not set"))?;
    let mut table = std::fs::File::create(Path::new(&out).join("embedded.rs"))?;
    writeln!(table, "&[")?;
    for file in files {
        let file = file.canonicalize()?;
        println!("cargo:rerun-if-changed={}", file.display());
        let mut parts = file.components().rev().map(|part| part.as_os_str().to_string_lossy().into_owned());
        let (name, folder) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        writeln!(
            table,
            "    ({:?}, include_bytes!({:?})),",
            format!("{folder}/{name}"),
            file.display().to_string()
        )?;
    }
    writeln!(table, "]")
}
