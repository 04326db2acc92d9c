//! The training mixture: narratives and referring expressions as texts with masks (`spec/training.md` §1–§3).
//!
//! Nothing here runs a model: a [`LabelledText`] is what the frozen models are then shown.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use flmm::lmm::{GROUNDING_INSTRUCTION, LmmSpec};
use flmm::text::tokenizer::Tokenizer;
use flmm::{Error, Result};
use flmm_data::narratives::Narratives;
use flmm_data::refcoco::{RefCoco, RefImage, TextMode};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::digest;
use crate::text::{LabelledText, expressions, narrative};

/// What LLaVA-1.6 is asked before the narratives it is trained on: the published training forgets to pass the
/// common instruction (`spec/models.md` §2).
const FORGOTTEN_INSTRUCTION: &str = "What is shown in this image?";

/// A part of the mixture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Dataset {
    /// Panoptic Narrative Grounding.
    #[serde(rename = "png")]
    Png,
    /// RefCOCO (unc).
    #[serde(rename = "refcoco")]
    RefCoco,
    /// RefCOCO+ (unc).
    #[serde(rename = "refcoco+")]
    RefCocoPlus,
    /// RefCOCOg (umd).
    #[serde(rename = "refcocog")]
    RefCocoG,
}

impl Dataset {
    /// All, in the published order.
    pub const ALL: [Self; 4] = [Self::Png, Self::RefCoco, Self::RefCocoPlus, Self::RefCocoG];

    /// Its name in configurations and keys, and for RefCOCO's kind the name of its folder.
    pub fn name(self) -> &'static str {
        match self {
            Self::Png => "png",
            Self::RefCoco => "refcoco",
            Self::RefCocoPlus => "refcoco+",
            Self::RefCocoG => "refcocog",
        }
    }
}

/// Which of an object's expressions is learnt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Expressions {
    /// As published: one is drawn when the run begins and stays for all epochs.
    #[default]
    Once,
    /// Another one is drawn for every epoch.
    PerEpoch,
    /// The first one, as in evaluation.
    First,
}

/// What becomes of a narrative without any grounded phrase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EmptyNarratives {
    /// As published: a random other narrative takes its place, another one in every epoch.
    #[default]
    Replace,
    /// It is left out, and an epoch is that much shorter.
    Drop,
    /// It is kept. Only for training the keyword selector alone: it has no mask.
    Keep,
}

/// What narratives are told to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Instruction {
    /// As published: for LLaVA-1.6 another one than in evaluation.
    #[default]
    Published,
    /// The one that is used everywhere else.
    Common,
}

/// Which data a run sees. The defaults are the paper's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// Parts of the mixture, shuffled together without weights.
    pub datasets: Vec<Dataset>,
    /// Which of an object's expressions is learnt.
    pub expressions: Expressions,
    /// What becomes of narratives without a grounded phrase.
    pub empty_narratives: EmptyNarratives,
    /// What narratives are told to answer.
    pub narrative_instruction: Instruction,
    /// A file with COCO image ids, one a line, whose samples are left out. The published mixture leaves none out,
    /// though narratives are about pictures of RefCOCO's val and test splits too.
    pub exclude: Option<PathBuf>,
    /// Only so many samples of each part, for trials.
    pub limit: Option<usize>,
    /// A run stops when a larger share of its samples cannot be used.
    pub max_broken: f64,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            datasets: Dataset::ALL.to_vec(),
            expressions: Expressions::default(),
            empty_narratives: EmptyNarratives::default(),
            narrative_instruction: Instruction::default(),
            exclude: None,
            limit: None,
            max_broken: 0.01,
        }
    }
}

/// Tells states of the annotations behind a [`Mixture`] apart. Pictures and the id PNGs of panoptic masks are not
/// looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DataRevision {
    /// Digest of the whole annotation files of every dataset, by the dataset's name.
    pub annotations: BTreeMap<String, String>,
    /// Digest of which samples of them are in use.
    pub members: String,
}

/// A mixture of opened datasets. Samples are numbered from 0, dataset by dataset.
pub struct Mixture {
    parts: Vec<Part>,
    split: &'static str,
    seed: u64,
    expressions: Expressions,
    empty_narratives: EmptyNarratives,
    instruction: Instruction,
}

struct Part {
    dataset: Dataset,
    source: Source,
    /// Numbers within the source of the samples in use.
    members: Vec<usize>,
}

enum Source {
    Narratives(Narratives),
    Expressions(RefCoco),
}

impl Mixture {
    /// Opens the `train` or `val` parts of `config` below a data root in the reference's layout.
    ///
    /// `seed` decides which expressions and replacements are drawn.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Config`] naming the file that is missing or malformed; [`Error::Request`] if no
    /// sample is left.
    pub fn open(root: &Path, split: &'static str, config: &DataConfig, seed: u64) -> Result<Self> {
        let excluded = match &config.exclude {
            Some(file) => read_ids(file)?,
            None => HashSet::new(),
        };
        let part = |&dataset: &Dataset| -> Result<Part> {
            let (source, mut members): (Source, Vec<usize>) = match dataset {
                Dataset::Png => {
                    let narratives = Narratives::open_split(root, &format!("{split}2017"))?;
                    let drop = config.empty_narratives == EmptyNarratives::Drop;
                    let kept = |&index: &usize| {
                        narratives.image_id(index).is_some_and(|id| !excluded.contains(&id))
                            && (!drop || narratives.is_grounded(index))
                    };
                    let members = (0..narratives.len()).filter(kept).collect();
                    (Source::Narratives(narratives), members)
                }
                _ => {
                    let data = RefCoco::open_split(root, dataset.name(), split)?;
                    let kept = |&index: &usize| !excluded.contains(&data.images[index].image_id);
                    let members = (0..data.images.len()).filter(kept).collect();
                    (Source::Expressions(data), members)
                }
            };
            members.truncate(config.limit.unwrap_or(usize::MAX));
            Ok(Part { dataset, source, members })
        };
        let parts = config.datasets.iter().map(part).collect::<Result<Vec<_>>>()?;
        let mixture = Self {
            parts,
            split,
            seed,
            expressions: config.expressions,
            empty_narratives: config.empty_narratives,
            instruction: config.narrative_instruction,
        };
        match mixture.is_empty() {
            true => Err(Error::request(
                format!("no {split} sample is left in {}", root.display()),
                "check `data.datasets`, `data.exclude` and `data.limit`",
            )),
            false => Ok(mixture),
        }
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.parts.iter().map(|part| part.members.len()).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Every part with its number of samples.
    pub fn parts(&self) -> Vec<(Dataset, usize)> {
        self.parts.iter().map(|part| (part.dataset, part.members.len())).collect()
    }

    /// What a run on these samples, or a cache of them, must agree with. All annotation files are read.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file that cannot be read any more.
    pub fn revision(&self) -> Result<DataRevision> {
        let (mut annotations, mut members) = (BTreeMap::new(), Sha256::new());
        for part in &self.parts {
            let files = match &part.source {
                Source::Narratives(narratives) => narratives.files(),
                Source::Expressions(data) => data.files(),
            };
            let mut hash = Sha256::new();
            for file in files {
                hash.update(digest::file(file)?);
            }
            annotations.insert(part.dataset.name().to_owned(), digest::short(hash));
            members.update(part.dataset.name());
            part.members.iter().for_each(|&member| members.update((member as u64).to_le_bytes()));
        }
        Ok(DataRevision { annotations, members: digest::short(members) })
    }

    /// The key of sample `index` in `epoch` ([`LabelledText::key`]): equal keys, equal samples.
    pub fn key(&self, index: usize, epoch: u64) -> String {
        let (part, member) = self.place(index);
        match &part.source {
            Source::Narratives(narratives) => {
                let member = self.grounded(part, narratives, (index, member), epoch).unwrap_or(member);
                self.narrative_key(part, member)
            }
            Source::Expressions(data) => self.image_key(part, &data.images[member], epoch),
        }
    }

    /// Sample `index` as seen in `epoch`: the same for the same arguments.
    ///
    /// # Errors
    /// If its annotations cannot be used: unknown segments, damaged masks, a phrase without a token.
    pub fn text(
        &self,
        index: usize,
        epoch: u64,
        tokenizer: &Tokenizer,
        lmm: &LmmSpec,
    ) -> Result<LabelledText> {
        let (part, member) = self.place(index);
        match &part.source {
            Source::Narratives(narratives) => {
                let member = self.grounded(part, narratives, (index, member), epoch).ok_or_else(|| {
                    Error::request("no narrative has a grounded phrase", "check the narrative file")
                })?;
                let key = self.narrative_key(part, member);
                let folder = format!("coco/{}2017", self.split);
                let instruction = self.narrative_instruction(lmm);
                narrative(tokenizer, narratives.sample(member)?, key, &folder, instruction)
            }
            Source::Expressions(data) => {
                let image = &data.images[member];
                let mode = match self.expressions {
                    Expressions::First => TextMode::SelectFirst,
                    Expressions::Once => TextMode::Random(self.seed),
                    Expressions::PerEpoch => TextMode::Random(self.seed.wrapping_add(epoch)),
                };
                expressions(tokenizer, data, image, mode, self.image_key(part, image, epoch))
            }
        }
    }

    /// What narratives of this mixture are told to answer.
    pub fn narrative_instruction(&self, lmm: &LmmSpec) -> &'static str {
        // LLaVA-1.6 of either language model, and no other family.
        let forgotten = lmm.model_type == "llava_next" && self.split == "train";
        match self.instruction {
            Instruction::Published if forgotten => FORGOTTEN_INSTRUCTION,
            _ => GROUNDING_INSTRUCTION,
        }
    }

    /// The part of sample `index` and its number there. `index` must be below [`Mixture::len`].
    fn place(&self, mut index: usize) -> (&Part, usize) {
        for part in &self.parts {
            match part.members.get(index) {
                Some(&member) => return (part, member),
                None => index -= part.members.len(),
            }
        }
        panic!("sample beyond the end of the mixture")
    }

    /// The narrative that stands for narrative `member` at `index` in `epoch`: itself, or a random other one if it has no
    /// phrase. `None` if the part has no grounded narrative at all.
    fn grounded(
        &self,
        part: &Part,
        narratives: &Narratives,
        (index, member): (usize, usize),
        epoch: u64,
    ) -> Option<usize> {
        if self.empty_narratives == EmptyNarratives::Keep || narratives.is_grounded(member) {
            return Some(member);
        }
        let mut rng = draws(self.seed, epoch, index as u64);
        // Nearly every narrative is grounded: a few draws do. The search ends even if none is.
        let drawn = (0..1000).map(|_| part.members[rng.random_range(0..part.members.len())]);
        let mut drawn = drawn.filter(|&other| narratives.is_grounded(other));
        drawn.next().or_else(|| part.members.iter().copied().find(|&other| narratives.is_grounded(other)))
    }

    fn narrative_key(&self, part: &Part, member: usize) -> String {
        format!("{}/{}/{member}", part.dataset.name(), self.split)
    }

    fn image_key(&self, part: &Part, image: &RefImage, epoch: u64) -> String {
        let key = format!("{}/{}/{}", part.dataset.name(), self.split, image.image_id);
        match self.expressions {
            Expressions::PerEpoch => format!("{key}#{epoch}"),
            Expressions::Once | Expressions::First => key,
        }
    }
}

/// A generator for what is drawn about one sample in one epoch.
pub(crate) fn draws(seed: u64, epoch: u64, index: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    for (place, value) in key.chunks_exact_mut(8).zip([seed, epoch, index]) {
        place.copy_from_slice(&value.to_le_bytes());
    }
    ChaCha8Rng::from_seed(key)
}

/// COCO image ids, one a line; blank lines and lines that begin with `#` are passed over.
fn read_ids(file: &Path) -> Result<HashSet<u64>> {
    let text = std::fs::read_to_string(file).map_err(|error| Error::io(file, error))?;
    let mut ids = HashSet::new();
    for (number, line) in text.lines().enumerate().map(|(number, line)| (number + 1, line.trim())) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        ids.insert(line.parse().map_err(|_| {
            let what = format!("line {number}: `{line}` is not a COCO image id");
            Error::config(file, what, "write one number a line")
        })?);
    }
    Ok(ids)
}
