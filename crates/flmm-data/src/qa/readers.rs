//! From the published files of each benchmark to questions.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flmm::{Error, Result};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::parquet::ParquetFile;
use super::rows::{ai2d, llava_bench, mm_vet, mmbench, mme, plain_name, pope, vqa};
use super::table::Row;
use super::tsv::TsvFile;
use super::{Benchmark, Picture, QaData, Question, Table};
use crate::coco::{id, malformed, parse_json, read_json};
use crate::images::ImageStore;

/// Pictures of COCO's validation set of 2014.
const COCO: &str = "coco/val2014";

/// Reads the questions of `benchmark` below the root of `pictures`.
pub(super) fn read(pictures: Arc<ImageStore>, benchmark: Benchmark) -> Result<QaData> {
    let root = pictures.root().to_owned();
    let folder = root.join(benchmark.folder());
    if !folder.is_dir() {
        let what = format!("there is no folder `{}`", folder.display());
        return Err(Error::request(what, format!("put there {}", benchmark.source())));
    }
    let mut files = Vec::new();
    list(&folder, 0, &mut files)?;
    let data = QaData { questions: Vec::new(), tables: Vec::new(), pictures };
    let mut reading = Reading { root: &root, folder: &folder, files, data };
    match benchmark {
        Benchmark::Mme => {
            reading.tables(&["test", ""], mme)?;
            reading.number_within_groups();
        }
        Benchmark::MmBench => reading.tables(&["mmbench_dev", "dev", ""], mmbench)?,
        Benchmark::Ai2d => reading.tables(&["test", ""], ai2d)?,
        Benchmark::MmVet => match reading.file("mm-vet.json") {
            Some(path) => reading.mm_vet(&path)?,
            None => reading.tables(&["test", ""], mm_vet)?,
        },
        Benchmark::LlavaBench => match reading.file("questions.jsonl") {
            Some(path) => reading.llava_bench(&path)?,
            None => reading.tables(&["train", "test", ""], llava_bench)?,
        },
        Benchmark::Pope => reading.pope()?,
        Benchmark::Gqa => match reading.file("testdev_balanced_questions.json") {
            Some(path) => reading.gqa(&path)?,
            None => reading.gqa_tables()?,
        },
        Benchmark::VqaV2 => match reading.file("v2_OpenEnded_mscoco_val2014_questions.json") {
            Some(path) => reading.vqa(&path)?,
            None => reading.tables(&["validation", ""], vqa)?,
        },
    }
    Ok(reading.data)
}

/// The files below `folder`, by name; not deeper than data sets of the hub go.
fn list(folder: &Path, depth: usize, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries = std::fs::read_dir(folder).map_err(|error| Error::io(folder, error))?;
    let mut inside = Vec::new();
    for entry in entries {
        inside.push(entry.map_err(|error| Error::io(folder, error))?.path());
    }
    inside.sort();
    for path in inside {
        // Pictures are looked up by name, not listed; hidden folders hold what download tools leave.
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        match path.is_dir() {
            true if depth < 3 && name != "images" && !name.starts_with('.') => list(&path, depth + 1, files)?,
            true => {}
            false => files.push(path),
        }
    }
    Ok(())
}

/// VQAv2's file of questions.
#[derive(Deserialize)]
struct VqaQuestions {
    questions: Vec<VqaQuestion>,
}

#[derive(Deserialize)]
struct VqaQuestion {
    #[serde(deserialize_with = "id")]
    question_id: u64,
    #[serde(deserialize_with = "id")]
    image_id: u64,
    question: String,
}

/// VQAv2's file of answers.
#[derive(Deserialize)]
struct VqaAnnotations {
    annotations: Vec<VqaAnnotation>,
}

#[derive(Deserialize)]
struct VqaAnnotation {
    #[serde(deserialize_with = "id")]
    question_id: u64,
    /// Those of ten annotators.
    answers: Vec<VqaAnswer>,
}

#[derive(Deserialize)]
struct VqaAnswer {
    answer: String,
}

struct Reading<'a> {
    root: &'a Path,
    folder: &'a Path,
    files: Vec<PathBuf>,
    data: QaData,
}

/// Makes a question of a table's row.
type Make = fn(&Row) -> Result<Question>;

impl Reading<'_> {
    fn file(&self, name: &str) -> Option<PathBuf> {
        self.files.iter().find(|path| path.file_name().is_some_and(|found| found == name)).cloned()
    }

    /// The folder with pictures beside an annotation file, relative to the data root.
    fn images(&self, file: &Path) -> String {
        let folder = file.strip_prefix(self.root).unwrap_or(file).with_file_name("images");
        folder.to_string_lossy().replace('\\', "/")
    }

    /// Reads the Parquet or TSV files whose name begins with the first of `prefixes` that any has.
    fn tables(&mut self, prefixes: &[&str], make: Make) -> Result<()> {
        // The data set of MMBench holds other languages beside English. Folders above it may have any name.
        let foreign = |path: &Path| {
            let below = path.strip_prefix(self.folder).unwrap_or(path);
            below.iter().any(|part| part == "cn" || part == "cc")
        };
        let table = |path: &&PathBuf| extension(path, "parquet") || extension(path, "tsv");
        let tables: Vec<PathBuf> =
            self.files.iter().filter(table).filter(|path| !foreign(path)).cloned().collect();
        let begins = |path: &Path, prefix: &str| {
            path.file_name().is_some_and(|name| name.to_string_lossy().to_lowercase().starts_with(prefix))
        };
        let chosen: Option<Vec<&PathBuf>> = prefixes.iter().find_map(|prefix| {
            let found: Vec<_> = tables.iter().filter(|path| begins(path, prefix)).collect();
            (!found.is_empty()).then_some(found)
        });
        for path in chosen.unwrap_or_default() {
            self.table(path, make)?;
        }
        Ok(())
    }

    fn table(&mut self, path: &Path, make: Make) -> Result<()> {
        let mut made = Vec::new();
        self.rows(path, &mut |row| {
            made.push(make(row)?);
            Ok(())
        })?;
        // Files without ids count on from one another.
        for question in &mut made {
            if question.id.is_empty() {
                question.id = (self.data.questions.len() + 1).to_string();
            }
            let question = std::mem::take(question);
            self.data.questions.push(question);
        }
        Ok(())
    }

    /// Gives questions that share a picture's name ids of their own: `name#1`, `name#2`.
    fn number_within_groups(&mut self) {
        let mut counts: HashMap<String, usize> = HashMap::new();
        for question in &mut self.data.questions {
            let count = counts.entry(question.group.clone()).or_default();
            *count += 1;
            question.id = format!("{}#{count}", question.group);
        }
    }

    fn rows(&mut self, path: &Path, visit: &mut dyn FnMut(&Row) -> Result<()>) -> Result<()> {
        let number = self.data.tables.len();
        let table = match extension(path, "tsv") {
            true => Table::Tsv(TsvFile::read(path, number, visit)?),
            false => Table::Parquet(ParquetFile::read(path, number, visit)?),
        };
        self.data.tables.push(table);
        Ok(())
    }

    fn pope(&mut self) -> Result<()> {
        let sets = ["random", "popular", "adversarial"];
        let files = sets.map(|set| (set, self.file(&format!("coco_pope_{set}.json"))));
        if files.iter().all(|(_, file)| file.is_none()) {
            return self.tables(&["test", ""], pope);
        }
        for (set, file) in files {
            // One set alone would give other numbers under the same name.
            let file = file.ok_or_else(|| {
                let hint = "all three sets are needed: random, popular, adversarial";
                malformed(self.folder, format!("there is no `coco_pope_{set}.json`"), hint)
            })?;
            lines(&file, |row| {
                self.data.questions.push(Question {
                    id: format!("{set}-{}", row.text("question_id")?),
                    question: row.text("text")?,
                    answers: vec![row.text("label")?],
                    category: set.to_owned(),
                    group: row.text("image")?,
                    picture: Picture::File(format!("{COCO}/{}", plain_name(row, "image")?)),
                    ..Question::default()
                });
                Ok(())
            })?;
        }
        Ok(())
    }

    fn gqa(&mut self, path: &Path) -> Result<()> {
        let entries: Map<String, Value> = read_json(path)?;
        let images = self.images(path);
        for (number, (id, value)) in entries.into_iter().enumerate() {
            let row = json_row(path, number, value)?;
            let image = plain_name(&row, "imageId")?;
            self.data.questions.push(Question {
                id,
                question: row.text("question")?,
                answers: vec![row.text("answer")?],
                picture: Picture::File(format!("{images}/{image}.jpg")),
                group: image,
                ..Question::default()
            });
        }
        Ok(())
    }

    /// Questions and pictures are two tables, joined by the picture's id.
    fn gqa_tables(&mut self) -> Result<()> {
        let in_folder = |part: &str| -> Vec<PathBuf> {
            let parquet = self.files.iter().filter(|path| extension(path, "parquet"));
            parquet.filter(|path| path.iter().any(|p| p == part)).cloned().collect()
        };
        let (texts, images) =
            (in_folder("testdev_balanced_instructions"), in_folder("testdev_balanced_images"));
        let mut pictures = HashMap::new();
        for path in images {
            self.rows(&path, &mut |row| {
                pictures.insert(row.text("id")?, row.picture()?);
                Ok(())
            })?;
        }
        for path in texts {
            let mut made = Vec::new();
            self.rows(&path, &mut |row| {
                let image = row.text("imageId")?;
                let picture = pictures.get(&image).cloned().ok_or_else(|| {
                    row.error(
                        format!("no picture `{image}`"),
                        "put testdev_balanced_images/ beside the questions",
                    )
                })?;
                made.push(Question {
                    id: row.text("id")?,
                    question: row.text("question")?,
                    answers: vec![row.text("answer")?],
                    group: image,
                    picture,
                    ..Question::default()
                });
                Ok(())
            })?;
            self.data.questions.append(&mut made);
        }
        Ok(())
    }

    fn vqa(&mut self, path: &Path) -> Result<()> {
        let answers_path = path.with_file_name("v2_mscoco_val2014_annotations.json");
        let mut answers = HashMap::new();
        for annotation in read_json::<VqaAnnotations>(&answers_path)?.annotations {
            let given: Vec<String> = annotation.answers.into_iter().map(|answer| answer.answer).collect();
            if answers.insert(annotation.question_id, given).is_some() {
                let what = format!("question {} is annotated twice", annotation.question_id);
                return Err(malformed(&answers_path, what, "download the file again"));
            }
        }
        for VqaQuestion { question_id, image_id, question } in read_json::<VqaQuestions>(path)?.questions {
            let answers = answers.remove(&question_id).ok_or_else(|| {
                let what = format!("question {question_id} has no answers in {}", answers_path.display());
                malformed(path, what, "both files must be of the same split")
            })?;
            self.data.questions.push(Question {
                id: question_id.to_string(),
                question,
                answers,
                group: image_id.to_string(),
                picture: Picture::File(format!("{COCO}/COCO_val2014_{image_id:012}.jpg")),
                ..Question::default()
            });
        }
        Ok(())
    }

    fn mm_vet(&mut self, path: &Path) -> Result<()> {
        let images = self.images(path);
        for (number, (id, value)) in read_json::<Map<String, Value>>(path)?.into_iter().enumerate() {
            let row = json_row(path, number, value)?;
            self.data.questions.push(Question {
                id,
                question: row.text("question")?,
                answers: vec![row.text("answer")?],
                capabilities: row.texts("capability", "")?,
                picture: Picture::File(format!("{images}/{}", plain_name(&row, "imagename")?)),
                ..Question::default()
            });
        }
        Ok(())
    }

    fn llava_bench(&mut self, path: &Path) -> Result<()> {
        let (images, answers_path) = (self.images(path), path.with_file_name("answers_gpt4.jsonl"));
        let (mut answers, mut contexts) = (HashMap::new(), HashMap::new());
        lines(&answers_path, |row| {
            answers.insert(row.text("question_id")?, row.text("text")?);
            Ok(())
        })?;
        lines(&path.with_file_name("context.jsonl"), |row| {
            contexts.insert(row.text("image")?, row.text("caption")?);
            Ok(())
        })?;
        lines(path, |row| {
            let (id, image) = (row.text("question_id")?, plain_name(row, "image")?);
            let hint = "all three files must be of the same release";
            let answer = answers.remove(&id);
            let answer =
                answer.ok_or_else(|| row.error(format!("question {id} has no reference answer"), hint))?;
            let context = contexts.get(&image).cloned();
            self.data.questions.push(Question {
                id,
                question: row.text("text")?,
                answers: vec![answer],
                category: row.text("category")?,
                context: context.ok_or_else(|| row.error(format!("no context for `{image}`"), hint))?,
                picture: Picture::File(format!("{images}/{image}")),
                group: image,
                ..Question::default()
            });
            Ok(())
        })
    }
}

fn extension(path: &Path, wanted: &str) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case(wanted))
}

fn json_row(file: &Path, number: usize, value: Value) -> Result<Row<'_>> {
    let mut row = Row { file, number: number as u64 + 1, cells: Map::new(), picture: Picture::Missing };
    match value {
        Value::Object(cells) => row.cells = cells,
        other => {
            return Err(row.error(format!("{other} is not an object"), "compare with the published file"));
        }
    }
    Ok(row)
}

/// Hands every line of a JSON-lines file to `visit`; blank lines are skipped.
fn lines(file: &Path, mut visit: impl FnMut(&Row) -> Result<()>) -> Result<()> {
    let text = std::fs::read(file).map_err(|error| Error::io(file, error))?;
    for (number, line) in text.split(|&byte| byte == b'\n').enumerate() {
        if line.trim_ascii().is_empty() {
            continue;
        }
        let value = parse_json(file, line).map_err(|error| {
            malformed(file, format!("line {}: {error}", number + 1), "expected one JSON object per line")
        })?;
        visit(&json_row(file, number, value)?)?;
    }
    Ok(())
}
