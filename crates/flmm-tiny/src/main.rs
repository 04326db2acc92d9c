//! Makes flmm-tiny, the model embedded in `flmm`: one command per stage, each resumable by running it again.

mod alignment;
mod bundle;
mod config;
mod decoder;
mod evaluate;
mod lmm;
mod pack;
mod parallel;
#[cfg(test)]
mod parity;
mod precision;
mod progress;
mod stage_head;
mod stage_lmm;
mod stage_sam;
mod stage_tower;
mod store;
mod symbolic;
mod text;
mod tower;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use candle_core::{DType, Device, Tensor};
use clap::{Parser, Subcommand};
use flmm::vision::preprocess::{LlavaProcessor, Normalisation, SizeRule};
use flmm_data::world::{self, Level, WorldConfig};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use config::LmmSizes;
use lmm::Setting;
use store::Store;

// Training allocates and frees the same large buffers at every step; the system allocator gives each back to the
// kernel and takes it again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Makes flmm-tiny. Run the stages in order with `RAYON_NUM_THREADS=1`; each one resumes where it stopped.
#[derive(Parser)]
struct Cli {
    /// Folder of the run: one sub-folder per stage.
    #[arg(long, default_value = "runs/flmm-tiny", global = true)]
    out: PathBuf,
    /// Folder of the bundle that is written and read; `bundle` in the run's folder unless given.
    #[arg(long, global = true)]
    bundle: Option<PathBuf>,
    /// Level of the world.
    #[arg(long, default_value_t = 1, global = true, value_parser = clap::value_parser!(u8).range(1..=2))]
    level: u8,
    #[command(subcommand)]
    stage: Stage,
}

#[derive(Subcommand)]
enum Stage {
    /// Train the tokenizer on the world's text.
    Tokenizer,
    /// Train the vision tower and the projector.
    Tower(stage_tower::TowerArgs),
    /// Train the decoder on codes in place of pictures; does not wait for the tower.
    Codes(stage_lmm::LmmArgs),
    /// Train the decoder on pictures, behind the tower.
    Lmm(stage_lmm::LmmArgs),
    /// Train the small SAM on the world's masks.
    Sam(stage_sam::SamArgs),
    /// Write the LMM and SAM as folders that `flmm` opens.
    Freeze,
    /// Train the grounding head on the frozen models.
    Head(stage_head::HeadArgs),
    /// Measure the bundle on unseen scenes.
    Evaluate(evaluate::EvaluateArgs),
    /// Measure what fewer bits cost the bundle, on unseen scenes.
    Precision(precision::PrecisionArgs),
}

/// Seed of everything that is fixed before training: code book and initial tensors.
const MODEL_SEED: u64 = 20;
/// Text tokens packed behind one picture.
const TEXT_BUDGET: usize = 144;

fn main() -> Result<()> {
    let cli = Cli::parse();
    std::fs::create_dir_all(&cli.out).with_context(|| format!("cannot create {}", cli.out.display()))?;
    let level = if cli.level == 1 { Level::One } else { Level::Two };
    let world = WorldConfig::new(level);
    let bundle_folder = cli.bundle.clone().unwrap_or_else(|| cli.out.join("bundle"));
    // A finished bundle is measured with its own tokenizer.
    let tokenizer_file = match (&cli.stage, &cli.bundle) {
        (Stage::Evaluate(_), Some(bundle)) => bundle.join("lmm/tokenizer.json"),
        _ => cli.out.join("tokenizer.json"),
    };
    if let Stage::Precision(args) = &cli.stage {
        println!("{}", serde_json::to_string_pretty(&precision::run(args, &bundle_folder, &world)?)?);
        return Ok(());
    }
    if let Stage::Tokenizer = cli.stage {
        let tokenizer = text::train(world::vocabulary_texts(level))?;
        let temporary = tokenizer_file.with_extension("partial");
        std::fs::write(&temporary, text::to_json(&tokenizer)?)?;
        std::fs::rename(&temporary, &tokenizer_file)?;
        return Ok(());
    }
    let tokenizer = tokenizers::Tokenizer::from_file(&tokenizer_file)
        .map_err(|e| anyhow!("{}: {e}; run the stage `tokenizer` first", tokenizer_file.display()))?;
    let sizes = LmmSizes::shipped(tokenizer.get_vocab_size(true));
    let codes = symbolic::Codes::new(level, sizes.width, MODEL_SEED);
    let mut rng = ChaCha8Rng::seed_from_u64(MODEL_SEED);
    let embeddings = codes.embeddings(level, &tokenizer, &mut rng)?;
    let setting = Setting {
        packer: pack::Packer::new(tokenizer, sizes.image_tokens(), TEXT_BUDGET)?,
        processor: LlavaProcessor::new(sizes.image_size, SizeRule::MultiplyFirst, Normalisation::CLIP),
        codes,
        sizes,
    };
    match &cli.stage {
        Stage::Tokenizer | Stage::Precision(_) => Ok(()),
        Stage::Tower(args) => {
            let mut store = Store::new(tower::init(&setting.sizes, &mut rng)?)?;
            let folder = cli.out.join("tower");
            let gate = stage_tower::run(args, &setting, &world, &mut store, &folder);
            save(&folder.join("model.safetensors"), store.tensors())?;
            gate.map(drop)
        }
        Stage::Codes(args) => {
            let mut initial = decoder::init(&setting.sizes, &embeddings, setting.codes.marks(), &mut rng)?;
            decoder::carry_places(&setting.sizes, setting.codes.place_directions(), &mut initial)?;
            let mut store = Store::new(initial)?;
            let frozen = tower::init(&setting.sizes, &mut rng)?.into_iter().collect();
            let folder = cli.out.join("codes");
            stage_lmm::run(args, false, &setting, &world, &mut store, &frozen, &folder)?;
            save(&folder.join("model.safetensors"), store.tensors())
        }
        Stage::Freeze => {
            let json = std::fs::read_to_string(&tokenizer_file)?;
            let tensors = load(&cli.out.join("lmm/model.safetensors"))?;
            bundle::lmm(&bundle_folder.join("lmm"), &setting.sizes, &tensors, &json)?;
            bundle::sam(&bundle_folder.join("sam"), &load(&cli.out.join("sam/model.safetensors"))?)
        }
        Stage::Evaluate(args) => {
            let report = evaluate::run(args, &bundle_folder, setting.packer.tokenizer(), &world)?;
            println!("{}", serde_json::to_string_pretty(&report)?);
            Ok(())
        }
        Stage::Head(args) => {
            let tokenizer = setting.packer.tokenizer();
            let tensors = stage_head::run(args, &bundle_folder, tokenizer, &world, &cli.out.join("head"))?;
            bundle::head(&bundle_folder.join("head"), &setting.sizes, &tensors)
        }
        Stage::Sam(args) => {
            let mut store = Store::new(flmm::sam::Sam::init(&stage_sam::config(), MODEL_SEED)?)?;
            let folder = cli.out.join("sam");
            stage_sam::run(args, &setting, &world, &mut store, &folder)?;
            save(&folder.join("model.safetensors"), store.tensors())
        }
        Stage::Lmm(args) => {
            let (mut tensors, mut frozen) = match &args.from {
                Some(lmm) => parts(flmm::weights::load_checkpoint(lmm, Some(DType::F32), &Device::Cpu)?),
                None => pretrained(&cli.out, setting.codes.marks()[1])?,
            };
            if args.tower_rate > 0.0 {
                tensors.append(&mut frozen);
            }
            if args.carry_places {
                decoder::carry_places(&setting.sizes, setting.codes.place_directions(), &mut tensors)?;
            }
            let mut store = Store::new(tensors)?;
            let frozen = frozen.into_iter().collect();
            let folder = cli.out.join("lmm");
            stage_lmm::run(args, true, &setting, &world, &mut store, &frozen, &folder)?;
            let mut all = store.tensors();
            all.extend(frozen);
            save(&folder.join("model.safetensors"), all)
        }
    }
}

type Tensors = BTreeMap<String, Tensor>;

/// What the stage `lmm` always trains, and the vision tower.
fn parts(tensors: impl IntoIterator<Item = (String, Tensor)>) -> (Tensors, Tensors) {
    tensors.into_iter().partition(|(name, _)| !name.starts_with("vision_tower."))
}

/// The results of the stages `codes` and `tower`; from here on image tokens carry their mark.
fn pretrained(out: &Path, image_mark: &[f32]) -> Result<(Tensors, Tensors)> {
    let (projector, tower) = parts(load(&out.join("tower/model.safetensors"))?);
    let mut trained = load(&out.join("codes/model.safetensors"))?;
    for (name, tensor) in projector {
        let marked = name.ends_with("linear_2.bias");
        let mark = Tensor::new(image_mark, &Device::Cpu)?;
        trained.insert(name, if marked { (tensor + mark)? } else { tensor });
    }
    Ok((trained, tower))
}

fn save(file: &Path, tensors: Tensors) -> Result<()> {
    let temporary = file.with_extension("partial");
    candle_core::safetensors::save(&tensors.into_iter().collect::<HashMap<_, _>>(), &temporary)?;
    std::fs::rename(&temporary, file).with_context(|| format!("cannot write {}", file.display()))
}

fn load(file: &Path) -> Result<Tensors> {
    let tensors = candle_core::safetensors::load(file, &Device::Cpu);
    Ok(tensors.with_context(|| format!("cannot read {}", file.display()))?.into_iter().collect())
}
