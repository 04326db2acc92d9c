//! The stages, and what they share: the world, the tokenizer, the code book, initial tensors, folders.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use candle_core::{Device, Tensor};
use clap::Subcommand;
use flmm::vision::preprocess::{LlavaProcessor, Normalisation, SizeRule};
use flmm_data::world::{self, Level, WorldConfig};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;
use tokenizers::Tokenizer;

use crate::config::{self, LmmSizes};
use crate::grow::Trained;
use crate::lmm::Setting;
use crate::pack::Packer;
use crate::store::Store;
use crate::symbolic::Codes;
use crate::{
    MODEL_SEED, bundle, decoder, evaluate, stage_head, stage_lmm, stage_sam, stage_tower, text, tower,
};

/// Text tokens packed behind one picture.
const TEXT_BUDGET: usize = 144;
/// What a stage leaves in its folder.
const RESULT: &str = "model.safetensors";

/// A step on the way to a model.
#[derive(Debug, Subcommand)]
pub(crate) enum Stage {
    /// Train the vision tower and the projector.
    Tower(stage_tower::TowerArgs),
    /// Train the decoder on codes in place of pictures; does not wait for the tower.
    Codes(stage_lmm::LmmArgs),
    /// Train the decoder on pictures, behind the tower.
    Lmm(stage_lmm::LmmArgs),
    /// Train the small SAM on the world's masks.
    Sam(stage_sam::SamArgs),
    /// Write the LMM and SAM as folders that `flmm` opens.
    Freeze(FreezeArgs),
    /// Train the grounding head on the frozen models.
    Head(stage_head::HeadArgs),
    /// Measure the bundle on unseen scenes.
    Evaluate(evaluate::EvaluateArgs),
}

impl Stage {
    /// The name on the command line and in recipes.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Tower(_) => "tower",
            Self::Codes(_) => "codes",
            Self::Lmm(_) => "lmm",
            Self::Sam(_) => "sam",
            Self::Freeze(_) => "freeze",
            Self::Head(_) => "head",
            Self::Evaluate(_) => "evaluate",
        }
    }

    /// Folders it reads: below the run's folder, or anywhere.
    pub(crate) fn inputs(&self) -> Vec<&Path> {
        match self {
            Self::Tower(args) => args.from.as_deref().into_iter().collect(),
            Self::Codes(args) => args.from.as_deref().into_iter().collect(),
            Self::Lmm(args) => match &args.from {
                Some(from) => vec![from],
                None => vec![&args.tower, &args.codes],
            },
            Self::Freeze(args) => vec![&args.lmm, &args.sam],
            Self::Head(args) => args.from.as_deref().into_iter().collect(),
            Self::Sam(_) | Self::Evaluate(_) => Vec::new(),
        }
    }
}

/// Which models are frozen.
#[derive(Debug, Clone, clap::Args, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct FreezeArgs {
    /// The folder of the stage `lmm`.
    #[arg(long, default_value = "lmm")]
    pub(crate) lmm: PathBuf,
    /// The folder of the stage `sam`.
    #[arg(long, default_value = "sam")]
    pub(crate) sam: PathBuf,
}

impl Default for FreezeArgs {
    fn default() -> Self {
        config::defaults()
    }
}

type Tensors = BTreeMap<String, Tensor>;

/// Where stages are carried out.
pub(crate) struct Workshop {
    out: PathBuf,
    bundle: PathBuf,
    tokenizer_file: PathBuf,
    world: WorldConfig,
    setting: Setting,
    embeddings: Tensor,
    /// Initial tensors are drawn from here, by every stage from the same place on.
    rng: ChaCha8Rng,
}

impl Workshop {
    /// The workshop of a run's folder. The tokenizer is trained on the world's text if it is not there.
    pub(crate) fn open(out: &Path, bundle: Option<PathBuf>, level: Level, sizes: LmmSizes) -> Result<Self> {
        let file = out.join("tokenizer.json");
        if !file.exists() {
            let json = text::to_json(&text::train(world::vocabulary_texts(level))?)?;
            flmm::atomic::write(&file, |to| to.write_all(json.as_bytes()))?;
        }
        let bundle = bundle.unwrap_or_else(|| out.join("bundle"));
        Self::with_tokenizer(out, bundle, &file, level, sizes)
    }

    /// For measuring a finished bundle, with its own tokenizer.
    pub(crate) fn of_bundle(out: &Path, bundle: &Path, level: Level, sizes: LmmSizes) -> Result<Self> {
        Self::with_tokenizer(out, bundle.into(), &bundle.join("lmm/tokenizer.json"), level, sizes)
    }

    fn with_tokenizer(
        out: &Path,
        bundle: PathBuf,
        file: &Path,
        level: Level,
        sizes: LmmSizes,
    ) -> Result<Self> {
        let tokenizer = Tokenizer::from_file(file).map_err(|e| anyhow!("{}: {e}", file.display()))?;
        let sizes = LmmSizes { vocab: tokenizer.get_vocab_size(true), ..sizes };
        let codes = Codes::new(level, sizes.width, MODEL_SEED);
        let mut rng = ChaCha8Rng::seed_from_u64(MODEL_SEED);
        let embeddings = codes.embeddings(level, &tokenizer, &mut rng);
        let embeddings = embeddings.with_context(|| {
            format!("{} is not of level {}; take another --out folder", file.display(), level.number())
        })?;
        let setting = Setting {
            packer: Packer::new(tokenizer, sizes.image_tokens(), TEXT_BUDGET)?,
            processor: LlavaProcessor::new(sizes.image_size, SizeRule::MultiplyFirst, Normalisation::CLIP),
            codes,
            sizes,
        };
        let (out, tokenizer_file, world) = (out.into(), file.into(), WorldConfig::new(level));
        Ok(Self { out, bundle, tokenizer_file, world, setting, embeddings, rng })
    }

    /// Carries out or resumes a stage; what it learns is kept in `folder`.
    pub(crate) fn run(&self, stage: &Stage, folder: &Path) -> Result<()> {
        let (setting, world) = (&self.setting, &self.world);
        let tokenizer = setting.packer.tokenizer();
        match stage {
            Stage::Tower(args) => {
                let mut tensors = tower::init(&setting.sizes, &mut self.rng.clone())?;
                if let Some(from) = &args.from {
                    self.trained(from)?.carry_into(&mut tensors, tokenizer)?;
                    if self.input(from).join("tokenizer.json").is_file() {
                        self.mark_image(&mut tensors, -1.0)?;
                    }
                }
                let mut store = Store::new(tensors)?;
                let gate = stage_tower::run(args, setting, world, &mut store, folder);
                save(&folder.join(RESULT), store.tensors())?;
                gate
            }
            Stage::Codes(args) => {
                let mut rng = self.rng.clone();
                let mut tensors =
                    decoder::init(&setting.sizes, &self.embeddings, setting.codes.marks(), &mut rng)?;
                decoder::carry_places(&setting.sizes, setting.codes.place_directions(), &mut tensors)?;
                if let Some(from) = &args.from {
                    self.trained(from)?.carry_into(&mut tensors, tokenizer)?;
                }
                let mut store = Store::new(tensors)?;
                let unused = tower::init(&setting.sizes, &mut rng)?.into_iter().collect();
                stage_lmm::run(args, false, setting, world, &mut store, &unused, folder)?;
                save(&folder.join(RESULT), store.tensors())
            }
            Stage::Lmm(args) => self.lmm(args, folder),
            Stage::Sam(args) => {
                let mut store = Store::new(flmm::sam::Sam::init(&stage_sam::config(), MODEL_SEED)?)?;
                stage_sam::run(args, setting, world, &mut store, folder)?;
                save(&folder.join(RESULT), store.tensors())
            }
            Stage::Freeze(args) => {
                let json = std::fs::read_to_string(&self.tokenizer_file)?;
                let tensors = load(&self.input(&args.lmm).join(RESULT))?;
                bundle::lmm(&self.bundle.join("lmm"), &setting.sizes, &tensors, &json)?;
                bundle::sam(&self.bundle.join("sam"), &load(&self.input(&args.sam).join(RESULT))?)
            }
            Stage::Head(args) => {
                let from = args.from.as_ref().map(|from| self.input(from));
                let args = stage_head::HeadArgs { from, ..args.clone() };
                let tensors = stage_head::run(&args, &self.bundle, tokenizer, world, folder)?;
                bundle::head(&self.bundle.join("head"), &setting.sizes, &tensors)
            }
            Stage::Evaluate(args) => {
                let report = evaluate::run(args, &self.bundle, tokenizer, world)?;
                println!("{}", serde_json::to_string_pretty(&report)?);
                Ok(())
            }
        }
    }

    fn lmm(&self, args: &stage_lmm::LmmArgs, folder: &Path) -> Result<()> {
        let (setting, words) = (&self.setting, self.setting.packer.tokenizer());
        let mut rng = self.rng.clone();
        let mut tensors = decoder::init(&setting.sizes, &self.embeddings, setting.codes.marks(), &mut rng)?;
        tensors.extend(tower::init(&setting.sizes, &mut rng)?);
        match &args.from {
            Some(from) => self.trained(from)?.carry_into(&mut tensors, words)?,
            None => {
                self.trained(&args.codes)?.carry_into(&mut tensors, words)?;
                self.trained(&args.tower)?.carry_into(&mut tensors, words)?;
                // From here on image tokens carry their mark.
                self.mark_image(&mut tensors, 1.0)?;
            }
        }
        let (mut tensors, mut frozen): (Tensors, Tensors) =
            tensors.into_iter().partition(|(name, _)| !name.starts_with("vision_tower."));
        if args.tower_rate > 0.0 {
            tensors.append(&mut frozen);
        }
        if args.carry_places {
            decoder::carry_places(&setting.sizes, setting.codes.place_directions(), &mut tensors)?;
        }
        let mut store = Store::new(tensors)?;
        let frozen: HashMap<String, Tensor> = frozen.into_iter().collect();
        stage_lmm::run(args, true, setting, &self.world, &mut store, &frozen, folder)?;
        let mut all = store.tensors();
        all.extend(frozen);
        save(&folder.join(RESULT), all)
    }

    /// Adds the mark of image tokens, `times` over, to what the projector puts out.
    fn mark_image(&self, tensors: &mut Tensors, times: f64) -> Result<()> {
        let [_, mark] = self.setting.codes.marks();
        let mark = (Tensor::new(mark, &Device::Cpu)? * times)?;
        for (name, tensor) in tensors.iter_mut().filter(|(name, _)| name.ends_with("linear_2.bias")) {
            *tensor = (&*tensor + &mark).with_context(|| format!("tensor {name}"))?;
        }
        Ok(())
    }

    /// A folder below the run's own, or any other.
    fn input(&self, path: &Path) -> PathBuf {
        let own = self.out.join(path);
        if own.exists() { own } else { path.into() }
    }

    fn trained(&self, path: &Path) -> Result<Trained> {
        let path = self.input(path);
        Trained::open(&path, self.setting.packer.tokenizer())
            .with_context(|| format!("cannot begin from {}", path.display()))
    }
}

fn save(file: &Path, tensors: Tensors) -> Result<()> {
    Ok(flmm::weights::save_safetensors(file, &tensors, &BTreeMap::new())?)
}

fn load(file: &Path) -> Result<Tensors> {
    let tensors = candle_core::safetensors::load(file, &Device::Cpu);
    Ok(tensors.with_context(|| format!("cannot read {}", file.display()))?.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Too small to learn anything, large enough to run.
    fn small() -> LmmSizes {
        LmmSizes {
            image_size: 48,
            tower_width: 8,
            tower_layers: 1,
            tower_heads: 2,
            tower_ffn: 8,
            width: 20,
            layers: 1,
            heads: 2,
            ffn: 8,
            ..LmmSizes::default()
        }
    }

    fn workshop(out: &Path) -> Workshop {
        Workshop::open(out, None, Level::One, small()).unwrap()
    }

    fn lines(folder: &Path) -> usize {
        std::fs::read_to_string(folder.join("curves.jsonl")).unwrap().lines().count()
    }

    #[test]
    fn a_finished_tower_is_judged_again_by_what_it_reached() {
        let out = tempfile::tempdir().unwrap();
        let (workshop, folder) = (workshop(out.path()), out.path().join("tower"));
        let run = |steps, gate| {
            let args = stage_tower::TowerArgs { steps, batch: 1, workers: 1, gate, ..Default::default() };
            workshop.run(&Stage::Tower(args), &folder)
        };
        run(2, 0.0).unwrap();
        run(2, 0.0).unwrap();
        let missed = run(2, 1.1).unwrap_err().to_string();
        assert!(missed.starts_with("gate missed at step 2: object accuracy 0."), "{missed}");
        // All three have been evaluated, and the same way.
        let curves = std::fs::read_to_string(folder.join("curves.jsonl")).unwrap();
        let points: std::collections::BTreeSet<&str> = curves.lines().collect();
        assert_eq!((curves.lines().count(), points.len()), (3, 1));
    }

    #[test]
    fn gates_end_the_decoders_training_early_or_with_an_error() {
        let out = tempfile::tempdir().unwrap();
        let workshop = workshop(out.path());
        let run = |name: &str, from: Option<&str>, gate: &[&str], until_gates| {
            let args = stage_lmm::LmmArgs {
                steps: 3,
                batch: 1,
                workers: 1,
                evaluate_every: 1,
                evaluation_scenes: 2,
                grid: Some(6),
                objects: Some("1-2".parse().unwrap()),
                gate: gate.iter().map(|gate| gate.parse().unwrap()).collect(),
                until_gates,
                from: from.map(PathBuf::from),
                ..Default::default()
            };
            let result = workshop.run(&Stage::Codes(args), &out.path().join(name));
            (result.map_err(|error| error.to_string()), lines(&out.path().join(name)))
        };
        assert_eq!(run("all", None, &[], true), (Ok(()), 3));
        assert_eq!(run("early", Some("all"), &["Closed=0"], true), (Ok(()), 1));
        for evaluations in [2, 3] {
            let (result, lines) = run("missed", None, &["Closed=0@1", "Closed=101@2"], true);
            assert!(result.unwrap_err().starts_with("gate missed at step 2: Closed "));
            // The first time steps 1 and 2; then what the checkpoint has not seen.
            assert!(lines >= evaluations, "{lines}");
        }
    }

    #[test]
    fn a_code_stage_begins_where_another_ended() {
        let out = tempfile::tempdir().unwrap();
        let workshop = workshop(out.path());
        let args = stage_lmm::LmmArgs { steps: 0, from: Some("first".into()), ..Default::default() };
        let folder = out.path().join("first");
        std::fs::create_dir_all(&folder).unwrap();
        let norm = "language_model.model.norm.weight".to_owned();
        let known = Tensor::new(vec![0.5f32; 20], &Device::Cpu).unwrap();
        save(&folder.join(RESULT), Tensors::from([(norm.clone(), known)])).unwrap();
        workshop.run(&Stage::Codes(args), &out.path().join("second")).unwrap();
        let second = load(&out.path().join("second").join(RESULT)).unwrap();
        assert_eq!(second[&norm].to_vec1::<f32>().unwrap(), [0.5; 20]);
    }
}
