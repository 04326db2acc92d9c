//! What can be typed.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use clap::{Args, Parser, Subcommand, ValueEnum};
use flmm::device::DeviceChoice;
use flmm::lmm::converted_to;
use flmm::sam::Numbers;
use flmm::weights::WeightFormat;

use crate::eval;
use crate::failure::{self, Failure};

/// Ask about a picture and get an answer whose words carry masks.
#[derive(Debug, Parser)]
#[command(name = "flmm", version, propagate_version = true, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Everywhere")]
pub(crate) struct Global {
    /// Print results and errors only.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub(crate) quiet: bool,
    /// Also tell what was loaded and how long each stage took.
    #[arg(short, long, global = true)]
    pub(crate) verbose: bool,
    /// Number of processor threads [default: RAYON_NUM_THREADS, else all].
    #[arg(long, global = true, value_name = "N", value_parser = count)]
    pub(crate) threads: Option<usize>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Answer questions about a picture and mark what the answer speaks of.
    Chat(ChatArgs),
    /// Mark in a picture what a given text speaks of.
    Ground(GroundArgs),
    /// Serve grounded chat over HTTP, as OpenAI's clients speak it, and a page to try it.
    Serve(Box<crate::serve::ServeArgs>),
    /// Train a grounding head for a frozen LMM on the published datasets; a run that was stopped goes on.
    Train(crate::train::TrainArgs),
    /// Keep what the frozen models see of training samples, so that epochs need not show it to them again.
    Features(crate::features::FeaturesArgs),
    /// Look after the datasets on this disk.
    Data(crate::data::DataArgs),
    /// Run benchmarks: the tables of the paper, for a model or for predictions of any system.
    Eval(Box<eval::EvalArgs>),
    /// Make pictures with exact masks and true sentences, in the published dataset formats.
    World(WorldArgs),
    /// Look inside: the models known, one model, the attention behind a mask.
    Inspect(InspectArgs),
    /// Turn released checkpoints into the files this program keeps: checked, safe to read, only what is needed.
    Convert(ConvertArgs),
    /// Measure how fast parts of this program are on this machine.
    Bench(crate::bench::BenchArgs),
    /// Say whose work is included and under which licences.
    Credits,
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// Which model to use.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct ModelArgs {
    /// LMM in the Hugging Face layout, or a bundle with `lmm/`, `sam/` and `head/`: a folder, or a repository of the
    /// Hugging Face hub as org/name or org/name@revision [default: the embedded flmm-tiny].
    #[arg(long, value_name = "DIR|REPO")]
    pub(crate) model: Option<PathBuf>,
    /// SAM checkpoint (.pth or .safetensors), for a model that is not a bundle: a file, or one of the Hugging Face hub as
    /// org/name:file.
    #[arg(long, value_name = "FILE|REPO", requires = "model")]
    pub(crate) sam: Option<PathBuf>,
    /// Grounding head: a folder, or a .pth or .safetensors file, for a model that is not a bundle; of the hub: org/name or
    /// org/name:path; `none` makes rough masks from attention and SAM alone.
    #[arg(long, value_name = "DIR|REPO")]
    pub(crate) head: Option<PathBuf>,
    /// Vision tower of a Mini-Gemini [default: looked for inside and beside the model's folder].
    #[arg(long, value_name = "DIR", requires = "model")]
    pub(crate) vision_tower: Option<PathBuf>,
    /// Second vision tower of a Mini-Gemini [default: as --vision-tower].
    #[arg(long, value_name = "DIR", requires = "model")]
    pub(crate) vision_tower_aux: Option<PathBuf>,
    /// Side of the picture an HPT sees, in pixels [default: the published one].
    #[arg(long, value_name = "PIXELS", requires = "model")]
    pub(crate) image_size: Option<usize>,
    /// Numbers the LMM computes with: bf16 needs half the memory of f32; int8 and int4 keep the matrices of a bf16 LMM in a
    /// quarter and in a seventh [default: f32, or what `flmm convert lmm` made of the folder].
    #[arg(long, value_name = "TYPE", value_enum)]
    pub(crate) dtype: Option<Precision>,
    /// Numbers of SAM's image encoder; bf16 is faster, int8 smaller still.
    #[arg(long, value_name = "TYPE", value_enum, default_value_t)]
    pub(crate) sam_dtype: SamPrecision,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
}

/// Where to compute.
#[derive(Debug, Clone, Copy, Default, Args)]
pub(crate) struct DeviceArgs {
    /// Where to compute: cpu, cuda or cuda:N [default: a CUDA device if this build and machine have one, else the
    /// processor].
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceChoice>,
}

impl DeviceArgs {
    /// The device that was chosen.
    pub(crate) fn open(self) -> failure::Result<Device> {
        Ok(self.device.unwrap_or_default().open()?)
    }
}

/// Numbers of an LMM.
#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(crate) enum Precision {
    #[default]
    F32,
    Bf16,
    Int8,
    Int4,
}

impl Precision {
    /// What the LMM computes with, and how its matrices are kept.
    pub(crate) fn parts(self) -> (DType, WeightFormat) {
        match self {
            Self::F32 => (DType::F32, WeightFormat::AsLoaded),
            Self::Bf16 => (DType::BF16, WeightFormat::AsLoaded),
            Self::Int8 => (DType::BF16, WeightFormat::Int8),
            Self::Int4 => (DType::BF16, WeightFormat::Int4),
        }
    }

    /// What was typed, or what the model in `dir` was converted to.
    pub(crate) fn of(typed: Option<Self>, dir: &Path) -> failure::Result<Self> {
        if let Some(typed) = typed {
            return Ok(typed);
        }
        Ok(match converted_to(dir)? {
            Some(WeightFormat::Int8) => Self::Int8,
            Some(WeightFormat::Int4) => Self::Int4,
            Some(WeightFormat::AsLoaded) | None => Self::default(),
        })
    }
}

/// Numbers that an LMM is converted to.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum ConvertedTo {
    Bf16,
    Int8,
    Int4,
}

impl ConvertedTo {
    /// How matrices are kept.
    pub(crate) fn weights(self) -> WeightFormat {
        match self {
            Self::Bf16 => WeightFormat::AsLoaded,
            Self::Int8 => WeightFormat::Int8,
            Self::Int4 => WeightFormat::Int4,
        }
    }
}

/// Numbers of SAM's image encoder.
#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(crate) enum SamPrecision {
    #[default]
    F32,
    Bf16,
    Int8,
}

impl From<SamPrecision> for Numbers {
    fn from(precision: SamPrecision) -> Self {
        match precision {
            SamPrecision::F32 => Self::F32,
            SamPrecision::Bf16 => Self::Bf16,
            SamPrecision::Int8 => Self::Int8,
        }
    }
}

/// What is written besides the answer.
#[derive(Debug, Args)]
#[command(next_help_heading = "Output")]
pub(crate) struct OutputArgs {
    /// Picture with the masks [default: next to IMAGE, its name ending in .overlay.png].
    #[arg(long, value_name = "FILE", conflicts_with = "no_overlay")]
    pub(crate) overlay: Option<PathBuf>,
    /// Write no picture.
    #[arg(long)]
    pub(crate) no_overlay: bool,
    /// Print one JSON object with the masks instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}

/// How an answer is generated.
#[derive(Debug, Args)]
#[command(next_help_heading = "Answer")]
pub(crate) struct GenerateArgs {
    /// Most tokens to generate.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = count)]
    pub(crate) max_new_tokens: usize,
    /// 0 takes the likeliest token; higher values choose more freely.
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = temperature)]
    pub(crate) temperature: f64,
    /// With a temperature: share of the probability that tokens are chosen from.
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = share)]
    pub(crate) top_p: f64,
    /// With a temperature: the same seed gives the same answer.
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub(crate) seed: u64,
}

#[derive(Debug, Args)]
pub(crate) struct ChatArgs {
    /// The picture.
    pub(crate) image: PathBuf,
    /// The question; without it, questions are read line by line until an empty one or the end of input. With
    /// several pictures, the first question may say where each is shown: `<image>`, once for each.
    pub(crate) prompt: Option<String>,
    /// Another picture of the conversation, may be repeated, for models that take several (see `flmm inspect lmms`).
    #[arg(long = "image", value_name = "FILE")]
    pub(crate) more: Vec<PathBuf>,
    /// Number of the picture to mark: 1 is IMAGE, 2 the first --image.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count, conflicts_with = "no_ground")]
    pub(crate) ground_image: usize,
    /// Answer only; the text is the same with and without masks.
    #[arg(long, conflicts_with = "overlay")]
    pub(crate) no_ground: bool,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) generate: GenerateArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, Args)]
pub(crate) struct GroundArgs {
    /// The picture.
    pub(crate) image: PathBuf,
    /// The text, read as if the model had said it.
    #[arg(long)]
    pub(crate) text: String,
    /// Part of the text to ground, may be repeated; without it, the model chooses.
    #[arg(long, value_name = "SUBSTRING")]
    pub(crate) phrase: Vec<String>,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, Args)]
pub(crate) struct WorldArgs {
    /// Folder to write to, new or empty.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Which part of the data to make; the parts share no scene.
    #[arg(long, value_enum)]
    pub(crate) split: Split,
    /// Number of scenes.
    #[arg(long, value_name = "N", value_parser = count)]
    pub(crate) count: usize,
    /// The same seed gives the same bytes.
    #[arg(long, value_name = "S")]
    pub(crate) seed: u64,
    /// 1: one to three objects of few classes; 2: two to six of many, covering each other, with copies.
    #[arg(long, value_name = "LEVEL", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
    pub(crate) level: u8,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Split {
    Train,
    Val,
    Test,
}

#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    #[command(subcommand)]
    pub(crate) what: Convert,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Convert {
    /// Turn a released grounding head into a folder with head.safetensors and head.json.
    Head {
        /// The released file (.pth, .pt, .bin or .safetensors).
        file: PathBuf,
        /// The LMM it was trained for: a name or repository of `flmm inspect lmms`, or a model folder.
        #[arg(long, value_name = "NAME|DIR")]
        lmm: String,
        /// Folder to write to, new or empty.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Replace the converted files in a folder that is not empty.
        #[arg(long)]
        force: bool,
    },
    /// Keep the weights of an LMM in fewer bits: a folder that is smaller, opens faster and answers as the model does that is
    /// opened with the same --dtype.
    Lmm(ConvertLmm),
    /// Turn a SAM checkpoint into safetensors.
    Sam {
        /// The checkpoint, for example sam_vit_l_0b3195.pth.
        file: PathBuf,
        /// A new or empty folder, or a file whose name ends in .safetensors.
        #[arg(long, value_name = "DIR|FILE")]
        out: PathBuf,
        /// Replace the converted files where there are some.
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ConvertLmm {
    /// The LMM's folder, in the Hugging Face layout.
    pub(crate) dir: PathBuf,
    /// Numbers to keep: bf16, or matrices of linear layers as int8, or those of the decoder's layers as int4.
    #[arg(long, value_name = "TYPE", value_enum)]
    pub(crate) dtype: ConvertedTo,
    /// Folder to write to, new or empty.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Replace the converted files in a folder that is not empty.
    #[arg(long)]
    pub(crate) force: bool,
    /// Vision tower of a Mini-Gemini [default: looked for inside and beside the model's folder].
    #[arg(long, value_name = "DIR")]
    pub(crate) vision_tower: Option<PathBuf>,
    /// Second vision tower of a Mini-Gemini [default: as --vision-tower].
    #[arg(long, value_name = "DIR")]
    pub(crate) vision_tower_aux: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    #[command(subcommand)]
    pub(crate) what: Inspect,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Inspect {
    /// List the models this program can open.
    Lmms {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show what a model or a part of one is: sizes, tensors, what is missing. Nothing is computed and no weight is read.
    ///
    /// With -v, every tensor is listed. Without PATH, the model that the other options choose is opened.
    Model {
        /// LMM, SAM, grounding head or bundle: a folder, a file, or a repository that was downloaded before.
        #[arg(value_name = "PATH|REPO", conflicts_with = "model")]
        path: Option<PathBuf>,
        #[command(flatten)]
        model: ModelArgs,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Draw the attention behind the masks: mean map, K-means clusters, coarse and refined mask.
    Attention(AttentionArgs),
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("words").required(true).args(["prompt", "text"]))]
pub(crate) struct AttentionArgs {
    /// The picture.
    pub(crate) image: PathBuf,
    /// A question; the attention of its answer is drawn.
    pub(crate) prompt: Option<String>,
    /// A text, read as if the model had said it.
    #[arg(long)]
    pub(crate) text: Option<String>,
    /// Part of the text to draw, may be repeated; without it, the model chooses.
    #[arg(long, value_name = "SUBSTRING")]
    pub(crate) phrase: Vec<String>,
    /// Picture to write [default: next to IMAGE, its name ending in .attention.png].
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Also write the maps, one `[channels, rows, columns]` tensor per phrase, as safetensors.
    #[arg(long, value_name = "FILE")]
    pub(crate) raw: Option<PathBuf>,
    /// Seed of the clustering.
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub(crate) seed: u64,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
}

/// Refuses text that is blank; `name` is what the user calls it.
pub(crate) fn check_text(name: &str, text: &str) -> failure::Result<()> {
    match text.trim().is_empty() {
        true => {
            Err(Failure::usage(format!("{name} is blank"), "write something between the quotation marks"))
        }
        false => Ok(()),
    }
}

pub(crate) fn count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".into()),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("{error}")),
    }
}

pub(crate) fn temperature(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(t) if t.is_finite() && t >= 0.0 => Ok(t),
        _ => Err("must be a number of at least 0".into()),
    }
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(p) if p > 0.0 && p <= 1.0 => Ok(p),
        _ => Err("must be above 0 and at most 1".into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        super::Cli::command().debug_assert();
    }
}
