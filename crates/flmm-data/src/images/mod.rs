//! Pictures of a dataset by name, whether they lie in folders, in zip or tar archives, or in WebDataset shards.
//!
//! A picture is named by its path below the data root, `coco/train2017/000000000009.jpg`. It is looked for
//!
//! 1. as that file,
//! 2. in `coco/train2017.zip` and `coco/train2017.tar`,
//! 3. in the shards `coco/train2017-*.tar` and `coco/train2017/*.tar`,
//!
//! and then the same for `coco`. Inside an archive, the path may begin at the archive's folder (`train2017/0….jpg`),
//! below it (`0….jpg`), or, for a plain file name, lie in any folder.
//!
//! Archives are indexed once, when a picture is first looked for there, and read from any number of threads. Nothing
//! is unpacked to disk; an entry is read into memory only after its size was checked.

mod archive;

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use flmm::image_input::{Limits, decode_image, read_image};
use flmm::{Error, Result};
use image::{ImageError, ImageReader, RgbImage};

use archive::{Archive, Place};

/// Pictures below a data root. Cheap to share; all methods may be called from several threads.
pub struct ImageStore {
    root: PathBuf,
    /// Archives of every folder that was asked for, by its path below the root.
    folders: Mutex<HashMap<PathBuf, Arc<OnceLock<Archives>>>>,
}

/// The archives that stand for one folder, in the order they are searched; a damaged one keeps its error.
type Archives = Vec<Result<Archive, Damaged>>;

/// Why an archive cannot be used.
#[derive(Debug, Clone)]
struct Damaged {
    file: PathBuf,
    what: String,
}

impl Damaged {
    fn error(&self) -> Error {
        Error::config(&self.file, self.what.clone(), "download the archive again")
    }
}

/// Where a picture was found.
enum Found {
    File(PathBuf),
    Entry { folder: Arc<OnceLock<Archives>>, archive: usize, place: Place },
}

impl ImageStore {
    /// A store of the pictures below `root`, which must be a folder. Nothing is read yet.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self> {
        let root = root.into();
        let metadata = std::fs::metadata(&root).map_err(|error| Error::io(&root, error))?;
        if !metadata.is_dir() {
            let what = format!("`{}` is not a folder", root.display());
            return Err(Error::request(what, "name the folder that the datasets lie in"));
        }
        Ok(Self { root, folders: Mutex::default() })
    }

    /// The data root.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Decodes the picture `name`, a path below the root with `/` between its parts.
    ///
    /// # Errors
    /// [`Error::Io`] if there is no such picture, [`Error::Image`] if it is damaged or too large, [`Error::Config`]
    /// if the archive that should hold it is.
    pub fn read(&self, name: &str) -> Result<RgbImage> {
        match self.find(name)? {
            Found::File(path) => read_image(path),
            found => decode_image(&self.load(found)?, &self.root.join(name).display().to_string()),
        }
    }

    /// Width and height of the picture `name`, from its header. Errors as [`ImageStore::read`].
    pub fn dimensions(&self, name: &str) -> Result<(u32, u32)> {
        match self.find(name)? {
            Found::File(path) => header(&path),
            found => {
                let bytes = self.load(found)?;
                let reader = ImageReader::new(std::io::Cursor::new(bytes)).with_guessed_format();
                let size = reader.map_err(ImageError::from).and_then(ImageReader::into_dimensions);
                size.map_err(|error| damaged_picture(&self.root.join(name), &error))
            }
        }
    }

    /// Whether the file or folder `path` is there, or, for a folder, an archive that stands for it and can be read.
    pub fn has(&self, path: &str) -> bool {
        let is_file = Path::new(path).extension().is_some();
        self.root.join(path).exists() || (!is_file && self.archives(path).iter().any(Result::is_ok))
    }

    /// Files of the archives that stand for `folder` (`coco/train2017`) and how many entries each has, for
    /// messages; damaged ones as errors.
    pub fn archives(&self, folder: &str) -> Vec<Result<(PathBuf, usize)>> {
        let folder = self.folder(Path::new(folder));
        let archives = folder.get().into_iter().flatten();
        archives
            .map(|archive| match archive {
                Ok(archive) => Ok((archive.file().to_owned(), archive.len())),
                Err(damaged) => Err(damaged.error()),
            })
            .collect()
    }

    fn load(&self, found: Found) -> Result<Vec<u8>> {
        match found {
            Found::File(path) => {
                let metadata = std::fs::metadata(&path).map_err(|error| Error::io(&path, error))?;
                check_size(&path.display().to_string(), metadata.len())?;
                std::fs::read(&path).map_err(|error| Error::io(&path, error))
            }
            Found::Entry { folder, archive, place } => match folder.get().and_then(|all| all.get(archive)) {
                Some(Ok(archive)) => archive.read(&place),
                // `find` only gives entries of archives that were opened.
                _ => Err(Error::request("an archive is gone", "this is a bug")),
            },
        }
    }

    fn find(&self, name: &str) -> Result<Found> {
        let path = Path::new(name);
        // A name comes from an annotation file: it must not lead out of the data root.
        if name.is_empty() || !path.components().all(|part| matches!(part, Component::Normal(_))) {
            let what = format!("`{name}` is not a path below the data folder");
            return Err(Error::request(what, "check the file names in the annotations"));
        }
        let file = self.root.join(path);
        if file.is_file() {
            return Ok(Found::File(file));
        }
        let mut damaged = None;
        for folder in path.ancestors().skip(1).filter(|folder| !folder.as_os_str().is_empty()) {
            let archives = self.folder(folder);
            for (number, archive) in archives.get().into_iter().flatten().enumerate() {
                match archive {
                    Ok(opened) => {
                        if let Some(place) = opened.find(folder, path) {
                            return Ok(Found::Entry { folder: archives.clone(), archive: number, place });
                        }
                    }
                    Err(found) => damaged = damaged.or(Some(found.clone())),
                }
            }
        }
        match damaged {
            Some(damaged) => Err(damaged.error()),
            None => {
                let reason = "no such picture, neither as a file nor in an archive";
                Err(Error::io(file, std::io::Error::new(std::io::ErrorKind::NotFound, reason)))
            }
        }
    }

    /// The archives of `folder`, indexed.
    fn folder(&self, folder: &Path) -> Arc<OnceLock<Archives>> {
        let cell = {
            let mut folders = self.folders.lock().unwrap_or_else(PoisonError::into_inner);
            folders.entry(folder.to_owned()).or_default().clone()
        };
        // Outside the lock: indexing a large archive takes seconds, and other folders need not wait.
        cell.get_or_init(|| {
            candidates(&self.root.join(folder))
                .into_iter()
                .map(|file| Archive::open(&file).map_err(|what| Damaged { file, what }))
                .collect()
        });
        cell
    }
}

/// Width and height of the picture in a file, from its header.
pub(crate) fn header(path: &Path) -> Result<(u32, u32)> {
    let reader = ImageReader::open(path).and_then(ImageReader::with_guessed_format);
    let reader = reader.map_err(|error| Error::io(path, error))?;
    reader.into_dimensions().map_err(|error| damaged_picture(path, &error))
}

fn damaged_picture(path: &Path, error: &ImageError) -> Error {
    Error::image(format!("`{}` is damaged: {error}", path.display()), "download the picture again")
}

/// Refuses what is larger than any picture, before memory is taken for it.
fn check_size(name: &str, bytes: u64) -> Result<()> {
    let limit = Limits::default().bytes;
    match bytes <= limit {
        true => Ok(()),
        false => {
            let what = format!("`{name}` is {bytes} bytes long (limit {limit})");
            Err(Error::image(what, "this is not a picture of the dataset: download it again"))
        }
    }
}

/// Archive files that may hold the files of `folder`, in the order they are searched.
fn candidates(folder: &Path) -> Vec<PathBuf> {
    let (Some(parent), Some(name)) = (folder.parent(), folder.file_name()) else { return Vec::new() };
    let name = name.to_string_lossy();
    let whole = ["zip", "tar"].map(|kind| parent.join(format!("{name}.{kind}")));
    let prefix = format!("{name}-");
    let is_tar = |path: &Path| path.extension().is_some_and(|kind| kind == "tar");
    let is_shard = |path: &Path| {
        let file = path.file_name().map(|file| file.to_string_lossy().into_owned()).unwrap_or_default();
        is_tar(path) && file.starts_with(&prefix)
    };
    let whole = whole.into_iter().filter(|path| path.is_file());
    whole.chain(listed(parent, is_shard)).chain(listed(folder, is_tar)).collect()
}

/// Files of `folder` that `wanted` chooses, in order of their names.
fn listed(folder: &Path, wanted: impl Fn(&Path) -> bool) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut found: Vec<PathBuf> = paths.filter(|path| wanted(path) && path.is_file()).collect();
    found.sort();
    found
}
