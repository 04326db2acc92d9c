//! Question-answering benchmarks in the files they are published in (`evaluation.md` §6): TSV with pictures in base64,
//! JSON, JSON lines, and Parquet with pictures inside rows.
//!
//! [`QaData::open`] reads questions only. Pictures are read one at a time ([`QaData::picture`]), so that memory does not
//! grow with the size of a file; reading them in the order of the questions is fast.

mod parquet;
mod readers;
mod rows;
mod table;
mod tsv;
pub mod write;

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use flmm::Result;
use flmm::image_input::decode_image;
use image::RgbImage;

use crate::coco::malformed;
use crate::images::ImageStore;
use parquet::ParquetFile;
use tsv::TsvFile;

/// A benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Benchmark {
    Mme,
    MmBench,
    MmVet,
    LlavaBench,
    Pope,
    Gqa,
    VqaV2,
    Ai2d,
}

impl Benchmark {
    /// All of them, in the order of the paper's table.
    pub const ALL: [Self; 8] = [
        Self::Mme,
        Self::MmBench,
        Self::MmVet,
        Self::LlavaBench,
        Self::Pope,
        Self::Gqa,
        Self::VqaV2,
        Self::Ai2d,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mme => "mme",
            Self::MmBench => "mmbench",
            Self::MmVet => "mmvet",
            Self::LlavaBench => "llavabench",
            Self::Pope => "pope",
            Self::Gqa => "gqa",
            Self::VqaV2 => "vqav2",
            Self::Ai2d => "ai2d",
        }
    }

    /// Where its files lie below the data root.
    pub fn folder(self) -> String {
        format!("qa/{}", self.name())
    }

    /// Which files can lie there and where they come from.
    pub fn source(self) -> &'static str {
        match self {
            Self::Mme => "the data set lmms-lab/MME of the hub (data/test-*.parquet)",
            Self::MmBench => {
                "mmbench_dev_20230712.tsv of MMBench, or the data set lmms-lab/MMBench (en/dev-*.parquet)"
            }
            Self::MmVet => {
                "mm-vet.json and images/ of MM-Vet, or the data set lmms-lab/MMVet (data/test-*.parquet)"
            }
            Self::LlavaBench => {
                "questions.jsonl, answers_gpt4.jsonl, context.jsonl and images/ of the data set \
                 liuhaotian/llava-bench-in-the-wild, or lmms-lab/llava-bench-in-the-wild (data/train-*.parquet)"
            }
            Self::Pope => {
                "coco_pope_{random,popular,adversarial}.json of POPE with coco/val2014, or the data set \
                 lmms-lab/POPE (data/test-*.parquet)"
            }
            Self::Gqa => {
                "testdev_balanced_questions.json and images/ of GQA, or the data set lmms-lab/GQA \
                 (testdev_balanced_instructions/ and testdev_balanced_images/)"
            }
            Self::VqaV2 => {
                "v2_OpenEnded_mscoco_val2014_questions.json and v2_mscoco_val2014_annotations.json of VQAv2 with \
                 coco/val2014, or the data set lmms-lab/VQAv2 (data/validation-*.parquet)"
            }
            Self::Ai2d => "the data set lmms-lab/ai2d (data/test-*.parquet), or AI2D_TEST.tsv",
        }
    }
}

/// One question. What a benchmark does not have is empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Question {
    /// Its id, unique within the benchmark.
    pub id: String,
    /// What it asks, as written.
    pub question: String,
    /// A remark that precedes the question (MMBench).
    pub hint: String,
    /// The options with their letters.
    pub options: Vec<(char, String)>,
    /// Gold answers: one, or ten annotators' (VQAv2). Of options the letter. Of LLaVA-Bench the reference's text.
    pub answers: Vec<String>,
    /// The picture's or group's id where questions belong together: the two of MME, the copies of MMBench.
    pub group: String,
    /// Sub-task, set or ability.
    pub category: String,
    /// The coarser ability (MMBench).
    pub l2_category: String,
    /// Abilities (MM-Vet).
    pub capabilities: Vec<String>,
    /// A description of the picture for a judge that cannot see it (LLaVA-Bench).
    pub context: String,
    /// The picture.
    pub picture: Picture,
}

/// Where a picture is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Picture {
    /// Nowhere.
    #[default]
    Missing,
    /// A picture below the data root, which may lie in an archive ([`crate::images`]).
    File(String),
    /// A row of a table: number of the table and of the row, both from 0.
    Row(usize, u64),
}

/// The questions of a benchmark and the way to their pictures.
pub struct QaData {
    /// The questions, in the order of the files.
    pub questions: Vec<Question>,
    tables: Vec<Table>,
    pictures: Arc<ImageStore>,
}

impl std::fmt::Debug for QaData {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QaData")
            .field("questions", &self.questions.len())
            .field("tables", &self.tables)
            .finish()
    }
}

/// A file with pictures inside.
#[derive(Debug)]
enum Table {
    Parquet(ParquetFile),
    Tsv(TsvFile),
}

impl Table {
    fn path(&self) -> &Path {
        match self {
            Self::Parquet(file) => file.path(),
            Self::Tsv(file) => file.path(),
        }
    }

    fn picture(&self, row: u64) -> Result<Vec<u8>> {
        match self {
            Self::Parquet(file) => file.picture(row),
            Self::Tsv(file) => file.picture(row),
        }
    }
}

impl QaData {
    /// Reads the questions of `benchmark` below the data root `root`, from whichever of its published files are there.
    ///
    /// # Errors
    /// What is missing, or the file, row and column of what is malformed; two questions of one id.
    pub fn open(root: &Path, benchmark: Benchmark) -> Result<Self> {
        Self::open_in(Arc::new(ImageStore::open(root)?), benchmark)
    }

    /// As [`QaData::open`], below the root of `pictures`.
    pub fn open_in(pictures: Arc<ImageStore>, benchmark: Benchmark) -> Result<Self> {
        let root = pictures.root().to_owned();
        let data = readers::read(pictures, benchmark)?;
        let mut seen = HashSet::new();
        if let Some(twice) = data.questions.iter().find(|question| !seen.insert(question.id.as_str())) {
            let what = format!("question `{}` occurs twice", twice.id);
            return Err(malformed(&root.join(benchmark.folder()), what, "keep one copy of each file"));
        }
        match data.questions.is_empty() {
            false => Ok(data),
            true => Err(malformed(&root.join(benchmark.folder()), "holds no questions", benchmark.source())),
        }
    }

    /// The picture of question `index` by name: its path below the data root, or its table and row, counted from 1.
    pub fn picture_name(&self, index: usize) -> String {
        match self.questions.get(index).map(|question| &question.picture) {
            Some(Picture::File(path)) => path.clone(),
            Some(&Picture::Row(table, row)) => {
                let path = self.tables.get(table).map_or(Path::new(""), Table::path);
                let path = path.strip_prefix(self.pictures.root()).unwrap_or(path);
                format!("{}#{}", path.display(), row + 1)
            }
            Some(Picture::Missing) | None => String::new(),
        }
    }

    /// Decodes the picture of question `index`. An error names the file, and the row of a picture inside one.
    pub fn picture(&self, index: usize) -> Result<RgbImage> {
        match self.questions.get(index).map(|question| &question.picture) {
            Some(Picture::File(path)) => self.pictures.read(path),
            Some(&Picture::Row(table, row)) if table < self.tables.len() => {
                let table = &self.tables[table];
                decode_image(&table.picture(row)?, &format!("{}, row {}", table.path().display(), row + 1))
            }
            _ => Err(flmm::Error::request(format!("question {index} has no picture"), "check the files")),
        }
    }
}
