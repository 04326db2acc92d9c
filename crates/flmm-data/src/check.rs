//! Is a download complete? Files, counts, pictures and masks of the training and validation data, and where to get
//! what is missing (`training.md` §1).

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use flmm::{Error, Result};
use rayon::prelude::*;
use serde::Serialize;

use crate::images::ImageStore;
use crate::narratives::Narratives;
use crate::refcoco::RefCoco;

/// Problems of one part that are told one by one; the rest is counted.
const TOLD: usize = 10;

/// Which data is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckOptions {
    /// The parts that training needs.
    pub train: bool,
    /// The parts that validation needs.
    pub val: bool,
    /// Decodes every picture and mask instead of looking at headers.
    pub decode: bool,
}

/// How a part was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Complete.
    Complete,
    /// As far as it goes it is right, but the published data has another number of entries.
    Different,
    /// Something is missing or damaged.
    Incomplete,
    /// Nothing of it is there.
    Missing,
}

/// One part of the data.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Part {
    /// What it is: `narratives train2017`, `pictures coco/train2014`.
    pub name: String,
    /// How it was found.
    pub status: Status,
    /// What is counted.
    pub unit: &'static str,
    /// How many there are.
    pub found: u64,
    /// How many the published data has.
    pub published: Option<u64>,
    /// The first problems.
    pub problems: Vec<String>,
    /// Number of all problems.
    pub problem_count: u64,
    /// What to fetch for what is missing or damaged.
    pub fetch: Vec<Fetch>,
}

/// Where a part comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Fetch {
    /// Where it is published.
    pub url: &'static str,
    /// What to do with it.
    pub into: &'static str,
}

/// What [`check`] found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Every part that was looked for.
    pub parts: Vec<Part>,
}

impl Report {
    /// Whether nothing is missing or damaged.
    pub fn is_usable(&self) -> bool {
        self.parts.iter().all(|part| matches!(part.status, Status::Complete | Status::Different))
    }
}

const NARRATIVES: Fetch = Fetch {
    url: "https://bcv-uniandes.github.io/panoptic-narrative-grounding/",
    into: "put png_coco_train2017.json and png_coco_val2017.json into coco/annotations/",
};
const PANOPTIC: Fetch = Fetch {
    url: "http://images.cocodataset.org/annotations/panoptic_annotations_trainval2017.zip",
    into: "unpack below coco/, then annotations/panoptic_train2017.zip and panoptic_val2017.zip beside themselves",
};

fn pictures(folder: &str) -> Vec<Fetch> {
    let into = "put it below coco/ as it is, or unpacked";
    let url = match folder {
        "coco/train2017" => "http://images.cocodataset.org/zips/train2017.zip",
        "coco/val2017" => "http://images.cocodataset.org/zips/val2017.zip",
        "coco/train2014" => "http://images.cocodataset.org/zips/train2014.zip",
        _ => return Vec::new(),
    };
    vec![Fetch { url, into }]
}

fn referring(dataset: &str) -> Vec<Fetch> {
    let into = "unpack it below coco/";
    let url = match dataset {
        "refcoco" => "https://bvisionweb1.cs.unc.edu/licheng/referit/data/refcoco.zip",
        "refcoco+" => "https://bvisionweb1.cs.unc.edu/licheng/referit/data/refcoco+.zip",
        "refcocog" => "https://bvisionweb1.cs.unc.edu/licheng/referit/data/refcocog.zip",
        _ => return Vec::new(),
    };
    vec![Fetch { url, into }]
}

/// Pictures with referred objects in the published splits.
fn published_images(dataset: &str, split: &str) -> Option<u64> {
    Some(match (dataset, split) {
        ("refcoco", "train") => 16_994,
        ("refcoco+", "train") => 16_992,
        ("refcocog", "train") => 21_899,
        ("refcoco" | "refcoco+", "val") => 1_500,
        ("refcocog", "val") => 1_300,
        _ => return None,
    })
}

/// Told what is looked at: part, how many are done, how many there are.
pub type Progress<'a> = &'a (dyn Fn(&str, u64, u64) + Sync);

/// Looks for everything below `root` that training (and validation) needs.
///
/// Missing and damaged data is reported, not an error; an error only if `root` is no folder.
pub fn check(root: &Path, options: CheckOptions, progress: Progress<'_>) -> Result<Report> {
    let images = ImageStore::open(root)?;
    let mut checker = Checker { root, images, options, progress, parts: Vec::new(), wanted: BTreeMap::new() };
    for (wanted, split) in [(options.train, "train"), (options.val, "val")] {
        if wanted {
            checker.narratives(split);
            for dataset in ["refcoco", "refcoco+", "refcocog"] {
                checker.referring(dataset, split);
            }
        }
    }
    checker.pictures();
    Ok(Report { parts: checker.parts })
}

struct Checker<'a> {
    root: &'a Path,
    images: ImageStore,
    options: CheckOptions,
    progress: Progress<'a>,
    parts: Vec<Part>,
    /// Pictures that annotations name, by folder, with height and width.
    wanted: BTreeMap<String, BTreeMap<String, [u32; 2]>>,
}

impl Checker<'_> {
    fn narratives(&mut self, split: &str) {
        let name = format!("narratives {split}2017");
        let published = if split == "train" { Some(134_272) } else { None };
        let narratives = match Narratives::open_split(self.root, &format!("{split}2017")) {
            Ok(narratives) => narratives,
            Err(error) => {
                let there = |file: String| self.root.join("coco/annotations").join(file).is_file();
                let mut fetch = Vec::new();
                if !there(format!("png_coco_{split}2017.json")) {
                    fetch.push(NARRATIVES);
                }
                if !there(format!("panoptic_{split}2017.json")) || fetch.is_empty() {
                    fetch.push(PANOPTIC);
                }
                self.wanted.entry(format!("coco/{split}2017")).or_default();
                return self.absent(name, "narratives", published, &error, fetch);
            }
        };
        let total = narratives.len() as u64;
        let folder = format!("coco/{split}2017");
        // A narrative without a picture is a problem of its mask, too, and counts there.
        let places = (0..narratives.len()).filter_map(|index| narratives.picture(index).ok());
        let places = places.map(|(file, size)| (file.to_owned(), size));
        self.wanted.entry(folder).or_default().extend(places);
        let problems = self.all(&name, narratives.len(), |index| match self.options.decode {
            true => narratives.sample(index).map(drop),
            false => narratives.check_mask_file(index),
        });
        self.finish(name, "narratives", total, published, problems, vec![PANOPTIC]);
    }

    fn referring(&mut self, dataset: &str, split: &str) {
        let name = format!("{dataset} {split}");
        let published = published_images(dataset, split);
        let data = match RefCoco::open_split(self.root, dataset, split) {
            Ok(data) => data,
            Err(error) => {
                self.wanted.entry("coco/train2014".into()).or_default();
                return self.absent(name, "pictures", published, &error, referring(dataset));
            }
        };
        let sizes = data.images.iter().map(|image| (image.file_name.clone(), image.size));
        self.wanted.entry("coco/train2014".into()).or_default().extend(sizes);
        let problems = match self.options.decode {
            false => Problems::default(),
            true => self.all(&name, data.images.len(), |index| {
                let image = &data.images[index];
                (0..image.objects.len()).try_for_each(|object| data.mask(image, object).map(drop))
            }),
        };
        self.finish(name, "pictures", data.images.len() as u64, published, problems, referring(dataset));
    }

    /// Every picture that an annotation names.
    fn pictures(&mut self) {
        for (folder, files) in std::mem::take(&mut self.wanted) {
            let files: Vec<(String, [u32; 2])> = files.into_iter().collect();
            let name = format!("pictures {folder}");
            if files.is_empty() {
                self.unnamed(name, &folder);
                continue;
            }
            let problems = self.all(&name, files.len(), |index| {
                let (file, [height, width]) = &files[index];
                let path = format!("{folder}/{file}");
                let size = match self.options.decode {
                    true => self.images.read(&path)?.dimensions(),
                    false => self.images.dimensions(&path)?,
                };
                match size == (*width, *height) {
                    true => Ok(()),
                    false => Err(Error::image(
                        format!(
                            "`{path}` is {} × {}, its annotations say {width} × {height}",
                            size.0, size.1
                        ),
                        "download it again",
                    )),
                }
            });
            let found = files.len() as u64 - problems.count;
            let status = match (found, problems.count) {
                (_, 0) => Status::Complete,
                (0, _) => Status::Missing,
                _ => Status::Incomplete,
            };
            let fetch = if status == Status::Complete { Vec::new() } else { pictures(&folder) };
            let problem_count = problems.count;
            let problems = problems.told();
            let published = Some(files.len() as u64);
            self.parts.push(Part {
                name,
                status,
                unit: "pictures",
                found,
                published,
                problems,
                problem_count,
                fetch,
            });
        }
    }

    /// Pictures that no annotation names, because there is none: whether there are any at all.
    fn unnamed(&mut self, name: String, folder: &str) {
        // Shards in the folder count by what they hold.
        let is_picture =
            |entry: &std::fs::DirEntry| entry.path().extension().is_none_or(|kind| kind != "tar");
        let files = std::fs::read_dir(self.root.join(folder))
            .map_or(0, |entries| entries.flatten().filter(is_picture).count());
        let packed = self.images.archives(folder).into_iter().flatten().map(|(_, entries)| entries);
        let found = (files + packed.sum::<usize>()) as u64;
        let (status, problems) = match found {
            0 => (Status::Missing, vec![format!("neither {folder}/ nor an archive of it is there")]),
            _ => (Status::Incomplete, vec!["not looked at: there are no annotations".to_owned()]),
        };
        let fetch = if found == 0 { pictures(folder) } else { Vec::new() };
        let (unit, problem_count) = ("pictures", 1);
        self.parts.push(Part { name, status, unit, found, published: None, problems, problem_count, fetch });
    }

    /// Looks at entries `0..count` on all threads.
    fn all(&self, name: &str, count: usize, look: impl Fn(usize) -> Result<()> + Sync) -> Problems {
        let (problems, done) = (Mutex::new(Problems::default()), AtomicU64::new(0));
        (0..count).into_par_iter().for_each(|index| {
            if let Err(error) = look(index)
                && let Ok(mut problems) = problems.lock()
            {
                problems.add(index, &error);
            }
            (self.progress)(name, done.fetch_add(1, Ordering::Relaxed) + 1, count as u64);
        });
        problems.into_inner().unwrap_or_default()
    }

    fn absent(
        &mut self,
        name: String,
        unit: &'static str,
        published: Option<u64>,
        error: &Error,
        fetch: Vec<Fetch>,
    ) {
        let missing =
            matches!(error, Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound);
        let status = if missing { Status::Missing } else { Status::Incomplete };
        let problems = vec![one_line(error)];
        self.parts.push(Part { name, status, unit, found: 0, published, problems, problem_count: 1, fetch });
    }

    fn finish(
        &mut self,
        name: String,
        unit: &'static str,
        found: u64,
        published: Option<u64>,
        problems: Problems,
        fetch: Vec<Fetch>,
    ) {
        let status = match (problems.count, published) {
            (1.., _) => Status::Incomplete,
            (0, Some(published)) if published != found => Status::Different,
            (0, _) => Status::Complete,
        };
        let fetch = if status == Status::Incomplete { fetch } else { Vec::new() };
        let (problem_count, problems) = (problems.count, problems.told());
        self.parts.push(Part { name, status, unit, found, published, problems, problem_count, fetch });
    }
}

/// The decoders' messages may have several lines.
fn one_line(error: &Error) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The number of all problems, and those of the first entries that have one: threads come to them in any order, a report
/// is the same every time.
#[derive(Default)]
struct Problems {
    first: BTreeMap<usize, String>,
    count: u64,
}

impl Problems {
    /// Adds the problem of entry number `index`.
    fn add(&mut self, index: usize, error: &Error) {
        self.count += 1;
        let is_early =
            self.first.len() < TOLD || self.first.last_key_value().is_some_and(|(last, _)| index < *last);
        if is_early {
            self.first.insert(index, one_line(error));
        }
        if self.first.len() > TOLD {
            self.first.pop_last();
        }
    }

    fn told(self) -> Vec<String> {
        self.first.into_values().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::{self, Level, Split};

    /// Narratives of unknown pictures count once each, and shards by what they hold; the report is the same every time.
    #[test]
    fn nothing_counts_twice() -> Result<()> {
        let folder = tempfile::tempdir().map_err(|error| Error::io("temporary folder", error))?;
        let root = folder.path().join("world");
        world::write(&root, Split::Val, 12, 5, Level::One, &|_| {})?;
        let file = root.join("coco/annotations/png_coco_val2017.json");
        let mut narratives: Vec<serde_json::Value> = crate::coco::read_json(&file)?;
        let broken = narratives.len() - 1;
        narratives[1..].iter_mut().for_each(|narrative| narrative["image_id"] = 7.into());
        let text = serde_json::json!(narratives).to_string();
        std::fs::write(&file, text).map_err(|error| Error::io(&file, error))?;
        let options = |decode| CheckOptions { train: false, val: true, decode };
        for decode in [false, true] {
            let report = check(&root, options(decode), &|_, _, _| {})?;
            let part = &report.parts[0];
            assert_eq!((part.problem_count, part.problems.len()), (broken as u64, TOLD), "{part:?}");
            assert!(part.problems[0].contains("narrative 1:"), "{part:?}");
            assert_eq!(report, check(&root, options(decode), &|_, _, _| {})?);
        }

        // Without annotations, pictures are counted: one file, and a shard of two.
        let shards = folder.path().join("shards");
        let pictures = shards.join("coco/val2017");
        let made = || -> std::io::Result<()> {
            std::fs::create_dir_all(&pictures)?;
            std::fs::write(pictures.join("1.jpg"), b"")?;
            let mut tar = tar::Builder::new(std::fs::File::create(pictures.join("0.tar"))?);
            for name in ["2.jpg", "3.jpg"] {
                let mut header = tar::Header::new_gnu();
                header.set_size(0);
                header.set_mode(0o644);
                tar.append_data(&mut header, name, &b""[..])?;
            }
            tar.finish()
        };
        made().map_err(|error| Error::io(&pictures, error))?;
        let report = check(&shards, options(false), &|_, _, _| {})?;
        let part = report.parts.iter().find(|part| part.name == "pictures coco/val2017");
        assert_eq!(part.map(|part| part.found), Some(3), "{report:?}");
        Ok(())
    }

    #[test]
    fn the_first_problems_are_told_whoever_comes_first() {
        let problem = |index: usize| Error::request(format!("entry {index}"), "");
        let mut reports = Vec::new();
        for stride in [1, 7, 23] {
            let mut problems = Problems::default();
            (0..30).map(|step| step * stride % 30).for_each(|index| problems.add(index, &problem(index)));
            assert_eq!(problems.count, 30);
            reports.push(problems.told());
        }
        assert_eq!(reports[0], (0..TOLD).map(|index| format!("entry {index}")).collect::<Vec<_>>());
        assert!(reports.iter().all(|report| *report == reports[0]));
    }
}
