//! One zip or tar file: an index of its entries, and their content from any thread.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flmm::{Error, Result};
use zip::ZipArchive;

use super::check_size;

/// An opened archive.
pub(super) struct Archive {
    file: PathBuf,
    /// Entries by their whole path.
    paths: HashMap<String, Place>,
    /// Entries by file name; `None` where several folders have that name.
    names: HashMap<String, Option<Place>>,
    content: Content,
}

enum Content {
    /// Clones share the directory, each has its own position.
    Zip(ZipArchive<Shared>),
    Tar(Shared),
}

/// Where an entry lies.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place {
    /// Number in a zip file's directory.
    Number(usize),
    /// First byte and length in a tar file.
    Bytes(u64, u64),
}

impl Archive {
    /// Reads the archive's directory; on an error, what is wrong with it.
    pub(super) fn open(file: &Path) -> Result<Self, String> {
        let shared = Shared::open(file).map_err(|error| error.to_string())?;
        let mut archive = match file.extension().is_some_and(|kind| kind == "zip") {
            true => {
                let zip = ZipArchive::new(shared).map_err(|error| format!("damaged zip file: {error}"))?;
                Self::new(file, Content::Zip(zip))
            }
            false => Self::new(file, Content::Tar(shared)),
        };
        for (path, place) in archive.entries()? {
            archive.add(path, place);
        }
        Ok(archive)
    }

    fn new(file: &Path, content: Content) -> Self {
        Self { file: file.to_owned(), paths: HashMap::new(), names: HashMap::new(), content }
    }

    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    /// Number of files inside.
    pub(super) fn len(&self) -> usize {
        self.paths.len()
    }

    /// The entry for the file `path` below the data root, in an archive that stands for `folder`.
    pub(super) fn find(&self, folder: &Path, path: &Path) -> Option<Place> {
        let below = path.strip_prefix(folder).ok()?;
        let leaf = Path::new(folder.file_name()?).join(below);
        for candidate in [below, &leaf] {
            if let Some(place) = self.paths.get(slashes(candidate).as_str()) {
                return Some(*place);
            }
        }
        match below.components().count() {
            1 => self.names.get(below.to_str()?).copied().flatten(),
            _ => None,
        }
    }

    /// The content of an entry, after its size was checked.
    pub(super) fn read(&self, place: &Place) -> Result<Vec<u8>> {
        let name = self.file.display().to_string();
        match (&self.content, *place) {
            (Content::Zip(zip), Place::Number(number)) => {
                let damaged = |what: String| {
                    Error::config(&self.file, format!("damaged entry: {what}"), "download the archive again")
                };
                let mut zip = zip.clone();
                let mut entry = zip.by_index(number).map_err(|error| damaged(error.to_string()))?;
                let inside = entry.name().map(|name| name.into_owned()).unwrap_or_default();
                let size = entry.size();
                check_size(&format!("{name}: {inside}"), size)?;
                let mut bytes = Vec::with_capacity(size as usize);
                // The directory may understate the size: one byte more is enough to tell.
                let read = entry.by_ref().take(size + 1).read_to_end(&mut bytes);
                read.map_err(|error| damaged(format!("`{inside}`: {error}")))?;
                match bytes.len() as u64 == size {
                    true => Ok(bytes),
                    false => Err(damaged(format!("`{inside}` is not {size} bytes long"))),
                }
            }
            (Content::Tar(shared), Place::Bytes(start, length)) => {
                check_size(&name, length)?;
                let mut reader = shared.clone();
                let mut bytes = vec![0; length as usize];
                let read = reader.seek(SeekFrom::Start(start)).and_then(|_| reader.read_exact(&mut bytes));
                read.map_err(|error| Error::io(&self.file, error))?;
                Ok(bytes)
            }
            _ => Err(Error::request(format!("{name}: an entry of another archive"), "this is a bug")),
        }
    }

    fn entries(&self) -> Result<Vec<(String, Place)>, String> {
        match &self.content {
            Content::Zip(zip) => {
                // A name that is no text cannot be asked for either.
                let entry =
                    |index| Some((zip.name_for_index(index)?.ok()?.into_owned(), Place::Number(index)));
                Ok((0..zip.len()).filter_map(entry).filter(|(name, _)| !name.ends_with('/')).collect())
            }
            Content::Tar(shared) => tar_entries(shared.clone()),
        }
    }

    fn add(&mut self, path: String, place: Place) {
        let path = path.trim_start_matches("./");
        let name = path.rsplit('/').next().unwrap_or(path).to_owned();
        self.names.entry(name).and_modify(|known| *known = None).or_insert(Some(place));
        self.paths.insert(path.to_owned(), place);
    }
}

/// Path and place of every regular file.
fn tar_entries(shared: Shared) -> Result<Vec<(String, Place)>, String> {
    let length = shared.length;
    let damaged = |error: io::Error| format!("damaged tar file: {error}");
    let mut archive = tar::Archive::new(shared);
    let mut found = Vec::new();
    for entry in archive.entries_with_seek().map_err(damaged)? {
        let entry = entry.map_err(damaged)?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let (start, size) = (entry.raw_file_position(), entry.size());
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        if start.checked_add(size).is_none_or(|end| end > length) {
            return Err(format!("damaged tar file: it ends inside `{path}`"));
        }
        found.push((path, Place::Bytes(start, size)));
    }
    match found.is_empty() {
        true => Err("no file inside: not a tar file, or an empty one".into()),
        false => Ok(found),
    }
}

fn slashes(path: &Path) -> String {
    let parts: Vec<_> = path.components().map(|part| part.as_os_str().to_string_lossy()).collect();
    parts.join("/")
}

/// A reader with a position of its own on a file that several threads read.
#[derive(Clone)]
struct Shared {
    file: Arc<File>,
    at: u64,
    length: u64,
}

impl Shared {
    fn open(file: &Path) -> io::Result<Self> {
        let file = File::open(file)?;
        let length = file.metadata()?.len();
        Ok(Self { file: Arc::new(file), at: 0, length })
    }
}

impl Read for Shared {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        #[cfg(unix)]
        let count = std::os::unix::fs::FileExt::read_at(&*self.file, buffer, self.at)?;
        #[cfg(windows)]
        let count = std::os::windows::fs::FileExt::seek_read(&*self.file, buffer, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

impl Seek for Shared {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let target = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.length.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = target.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}
