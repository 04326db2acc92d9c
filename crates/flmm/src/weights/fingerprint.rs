//! Telling one checkpoint from another without reading all of it.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::files;
use crate::error::{Error, Result};

/// Files up to this size are read whole.
const WHOLE: u64 = 4 << 20;
/// Of larger files, this many evenly spaced pieces are read, the first and the last among them …
const PIECES: u64 = 64;
/// … of this many bytes each.
const PIECE: u64 = 64 << 10;

/// A short text that changes when the files of a model folder (or the one file at `path`) change.
///
/// Names, sizes, all of small files (configuration, tokenizer) and pieces of large ones go into it: at most 4 MiB of
/// every file. Training changes every part of a weight file, so another state of the same
/// model is noticed. Hidden files and Markdown texts do not count.
///
/// # Errors
/// [`Error::Io`] naming the file that cannot be read.
pub fn fingerprint(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    if files::is_dir(path) {
        for (name, file) in below(path)? {
            hash.update((name.len() as u64).to_le_bytes());
            hash.update(name.as_bytes());
            add(&mut hash, &file)?;
        }
    } else {
        add(&mut hash, path)?;
    }
    Ok(crate::hex(&hash.finalize()[..12]))
}

/// Name below `folder` and path of every file that counts, sorted.
fn below(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    let mut folders = vec![(String::new(), folder.to_owned())];
    while let Some((prefix, folder)) = folders.pop() {
        for path in files::list(&folder)? {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if !name.starts_with('.') && !name.ends_with(".md") {
                found.push((format!("{prefix}{name}"), path));
            }
        }
        for path in files::list_folders(&folder)? {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if !name.starts_with('.') {
                folders.push((format!("{prefix}{name}/"), path));
            }
        }
    }
    found.sort();
    Ok(found)
}

fn add(hash: &mut Sha256, path: &Path) -> Result<()> {
    if let Some(bytes) = files::embedded_bytes(path) {
        let bytes = bytes?;
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
        return Ok(());
    }
    let failed = |e| Error::io(path, e);
    let mut file = File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    hash.update(size.to_le_bytes());
    let mut piece = Vec::new();
    let mut read = |file: &mut File, length: u64| {
        piece.clear();
        file.take(length).read_to_end(&mut piece).map_err(failed)?;
        hash.update(&piece);
        Ok::<_, Error>(())
    };
    if size <= WHOLE {
        return read(&mut file, size);
    }
    for number in 0..PIECES {
        file.seek(SeekFrom::Start(number * (size - PIECE) / (PIECES - 1))).map_err(failed)?;
        read(&mut file, PIECE)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_noticed_and_notes_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        std::fs::create_dir(root.join("llm")).unwrap();
        std::fs::write(root.join("config.json"), "{}").unwrap();
        let mut weights = vec![1u8; (WHOLE + 12345) as usize];
        std::fs::write(root.join("llm/model.safetensors"), &weights).unwrap();
        let first = fingerprint(root).unwrap();
        assert_eq!(first, fingerprint(root).unwrap());
        std::fs::write(root.join("README.md"), "read me").unwrap();
        assert_eq!(first, fingerprint(root).unwrap());

        let last = weights.len() - 1;
        weights[last] = 2;
        std::fs::write(root.join("llm/model.safetensors"), &weights).unwrap();
        let second = fingerprint(root).unwrap();
        assert_ne!(first, second);
        std::fs::write(root.join("config.json"), "{ }").unwrap();
        assert_ne!(second, fingerprint(root).unwrap());
        assert!(fingerprint(&root.join("none")).is_err());
    }

    #[test]
    fn an_embedded_folder_has_one_too() {
        let folder = files::embed("fingerprint", &[("lmm/a.json", b"{}"), ("sam/b.bin", b"1")]);
        assert_ne!(fingerprint(&folder.join("lmm")).unwrap(), fingerprint(&folder.join("sam")).unwrap());
        assert_ne!(fingerprint(&folder).unwrap(), fingerprint(&folder.join("sam")).unwrap());
    }
}
