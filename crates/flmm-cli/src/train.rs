//! `flmm train`: a grounding head for a frozen LMM.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use candle_core::{DType, Device};
use clap::{Args, ValueEnum};
use flmm::Error;
use flmm::grounder::ModelPaths;
use flmm::hub::Hub;
use flmm::lmm::OpenOptions;
use flmm_train::config::{Config, LmmType, Mode};
use flmm_train::distributed::from_env;
use flmm_train::{After, Extras, Models, Step, Watch};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::embedded;
use crate::failure::{Failure, Result};
use crate::features::StoredArgs;
use crate::fetch::{self, Named, named};
use crate::talk::{Spinner, Talk};

#[derive(Debug, Args)]
pub(crate) struct TrainArgs {
    #[command(flatten)]
    work: WorkArgs,
    /// Folder of the run, new, or of a run that was stopped and goes on.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Train the keyword selector alone, for the head given by --head.
    #[arg(long, requires = "head")]
    selector_only: bool,
    /// Keep what the frozen models see in this folder, and read it from there in later epochs and runs.
    #[arg(long, value_name = "DIR", conflicts_with = "selector_only")]
    feature_cache: Option<PathBuf>,
    #[command(flatten)]
    stored: StoredArgs,
    #[command(flatten)]
    models: ModelsArgs,
}

/// What is trained, and on which data.
#[derive(Debug, Args)]
pub(crate) struct WorkArgs {
    /// What to train and how: a TOML file, or the name of a built-in configuration such as llava-1.5-7b.
    #[arg(long, value_name = "FILE|NAME")]
    config: PathBuf,
    /// Folder with the datasets, `coco/` in it; see `flmm data check`.
    #[arg(long, value_name = "DIR")]
    pub(crate) data: PathBuf,
    /// Change one key of the configuration, may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl WorkArgs {
    /// The configuration, with what was typed and what other options stand for.
    pub(crate) fn config(&self, options: impl IntoIterator<Item = String>) -> Result<Config> {
        let settings: Vec<String> = self.set.iter().cloned().chain(options).collect();
        Config::load(&self.config, &settings).map_err(usage)
    }
}

/// Which models a head is trained with.
#[derive(Debug, Args)]
#[command(next_help_heading = "Models")]
pub(crate) struct ModelsArgs {
    /// LMM in the Hugging Face layout, or a bundle: a folder, or a repository of the Hugging Face hub
    /// [default: the configuration's, else the embedded flmm-tiny].
    #[arg(long, value_name = "DIR|REPO")]
    model: Option<PathBuf>,
    /// SAM checkpoint (.pth or .safetensors) [default: the configuration's, or the bundle's].
    #[arg(long, value_name = "FILE")]
    sam: Option<PathBuf>,
    /// Grounding head to begin from [default: a fresh one].
    #[arg(long, value_name = "DIR")]
    head: Option<PathBuf>,
    /// Vision tower of a Mini-Gemini [default: looked for inside and beside the model's folder].
    #[arg(long, value_name = "DIR")]
    vision_tower: Option<PathBuf>,
    /// Second vision tower of a Mini-Gemini [default: as --vision-tower].
    #[arg(long, value_name = "DIR")]
    vision_tower_aux: Option<PathBuf>,
    /// Side of the picture an HPT sees, in pixels [default: the published one].
    #[arg(long, value_name = "PIXELS")]
    image_size: Option<usize>,
    /// Numbers the LMM computes with [default: the configuration's].
    #[arg(long, value_name = "TYPE", value_enum)]
    pub(crate) dtype: Option<Numbers>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Numbers {
    F32,
    Bf16,
}

pub(crate) fn run(args: &TrainArgs, talk: &Talk) -> Result<()> {
    let mode = args.selector_only.then(|| "mode=selector".to_owned());
    let config = args.work.config(mode.into_iter().chain(precision(&args.models)))?;
    let models = models(&args.models, &config, talk)?;
    let stop = stop_on_signal()?;
    let mut view = View::new(&config, stop, talk);
    let communicator = from_env()?;
    let features = args.feature_cache.clone().map(|dir| args.stored.options(dir));
    let extras = Extras { features, communicator: communicator.as_ref() };
    let outcome = flmm_train::run_with(&config, &models, &args.work.data, &args.out, &extras, &mut view);
    view.clear();
    let outcome = outcome?;
    if outcome.skipped > 0 {
        let list = args.out.join(flmm_train::SKIPPED);
        talk.note(format_args!("{} samples could not be used: {}", outcome.skipped, list.display()));
    }
    match outcome.head {
        Some(head) => {
            talk.note(format_args!("{} steps done; the head, for `flmm chat --head`:", outcome.steps));
            talk.print(&head.display().to_string())
        }
        None => Err(Failure::Library(Error::request(
            format!("stopped after step {} of {}; a checkpoint is written", outcome.steps, outcome.total),
            "give the same command again to go on",
        ))),
    }
}

/// The setting of the configuration that `--dtype` stands for.
pub(crate) fn precision(args: &ModelsArgs) -> Option<String> {
    let name = match args.dtype? {
        Numbers::F32 => "f32",
        Numbers::Bf16 => "bf16",
    };
    Some(format!("model.dtype={name}"))
}

/// What was typed wrong, in a file or on the command line.
fn usage(error: Error) -> Failure {
    match error {
        Error::Request { what, hint } => Failure::usage(what, hint),
        other => other.into(),
    }
}

/// A flag that is raised by an interrupt or a request to terminate; a second one ends the program at once.
pub(crate) fn stop_on_signal() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // In this order: the first signal finds the flag down and raises it, the second finds it up.
        flag::register_conditional_shutdown(signal, 1, stop.clone())
            .and_then(|_| flag::register(signal, stop.clone()))
            .map_err(|e| Failure::other(format!("cannot listen to signals: {e}")))?;
    }
    Ok(stop)
}

/// Where the models lie; repositories of the hub are downloaded.
pub(crate) fn models(args: &ModelsArgs, config: &Config, talk: &Talk) -> Result<Models> {
    let given = args.model.as_ref().or(config.model.path.as_ref());
    let (name, lmm, own_sam) = match given {
        None => {
            let folder = embedded::bundle().ok_or_else(|| {
                Failure::usage("this build has no embedded model", "give --model and --sam")
            })?;
            let bundle = ModelPaths::bundle(&folder);
            (embedded::NAME.to_owned(), bundle.model, Some(bundle.sam))
        }
        Some(model) => match named(model)? {
            Named::Local(folder) => {
                let (lmm, sam) = parts(&folder, !folder.join("config.json").is_file());
                (model.display().to_string(), lmm, sam)
            }
            Named::Repo(repo) => {
                let hub = Hub::from_env()?;
                let plan = hub.plan(&repo)?;
                let (lmm, sam) = parts(plan.folder(), plan.is_bundle());
                // Nothing is downloaded in vain.
                chosen_sam(args, config, sam.as_deref(), !plan.is_bundle())?;
                fetch::download(&hub, &repo, &plan, talk)?;
                (repo.to_string(), lmm, sam)
            }
        },
    };
    let sam = chosen_sam(args, config, own_sam.as_deref(), given.is_some())?;
    if let Some(head) = &args.head
        && !head.exists()
    {
        return Err(Failure::usage(
            format!("`{}`: no such file or folder", head.display()),
            "check the path",
        ));
    }
    let dtype = match config.model.dtype {
        LmmType::Bf16 => DType::BF16,
        LmmType::F32 => DType::F32,
    };
    let options = OpenOptions {
        vision_tower: args.vision_tower.clone(),
        vision_tower_aux: args.vision_tower_aux.clone(),
        image_size: args.image_size,
        ..OpenOptions::new(dtype, &Device::Cpu)
    };
    Ok(Models { name, lmm, sam, head: args.head.clone(), options })
}

/// The LMM in a folder, and the SAM beside it if it is a bundle.
fn parts(folder: &Path, may_be_bundle: bool) -> (PathBuf, Option<PathBuf>) {
    let bundle = ModelPaths::bundle(folder);
    match may_be_bundle && (bundle.model.is_dir() || !folder.is_dir()) {
        true => (bundle.model, Some(bundle.sam)),
        false => (folder.to_owned(), None),
    }
}

/// The SAM that was typed, or the bundle's, or the configuration's; `check` looks whether it is there.
fn chosen_sam(args: &ModelsArgs, config: &Config, own: Option<&Path>, check: bool) -> Result<PathBuf> {
    let sam = args.sam.as_deref().or(own).or(config.model.sam.as_deref()).ok_or_else(|| {
        Failure::usage(
            "no SAM checkpoint is given",
            format!("add --sam FILE; public ones: {}", crate::model::SAM_SOURCE),
        )
    })?;
    match check && !sam.exists() {
        true => Err(Failure::usage(
            format!("`{}`: no such file or folder", sam.display()),
            format!("give the SAM checkpoint with --sam; public ones: {}", crate::model::SAM_SOURCE),
        )),
        false => Ok(sam.to_owned()),
    }
}

/// Time between lines where there is no terminal.
const BETWEEN_LINES: Duration = Duration::from_secs(20);

/// What is shown while a run goes on: a bar with the newest averages below it, or a line now and then.
struct View<'a> {
    talk: &'a Talk,
    bar: ProgressBar,
    /// What is shown before there is a bar.
    spinner: Option<Spinner>,
    stop: Arc<AtomicBool>,
    epochs: u64,
    batch_size: usize,
    per_epoch: u64,
    total: u64,
    /// Step and time of the last line of the log, for the rate.
    last: (u64, Instant),
    /// When the run began in this process, and after which step.
    first: (u64, Instant),
    told: Option<Instant>,
    selector_only: bool,
}

impl<'a> View<'a> {
    fn new(config: &Config, stop: Arc<AtomicBool>, talk: &'a Talk) -> Self {
        let now = Instant::now();
        Self {
            talk,
            bar: ProgressBar::hidden(),
            spinner: None,
            stop,
            epochs: config.train.epochs,
            batch_size: config.train.batch_size,
            per_epoch: 1,
            total: 0,
            last: (0, now),
            first: (0, now),
            told: None,
            selector_only: config.mode == Mode::Selector,
        }
    }

    /// Removes what is shown.
    fn clear(&mut self) {
        self.spinner = None;
        self.bar.finish_and_clear();
    }

    /// `loss 0.812 · coarse 0.210 + 0.351 · refined 0.104 + 0.147 · selector 0.081 · aIoU 41.2 → 63.0 %`
    fn averages(&self, line: &Map<String, Value>) -> String {
        let value = |name: &str| line.get(name).and_then(Value::as_f64);
        let mut text = format!("loss {:.4}", value("loss").unwrap_or(f64::NAN));
        let pair = |bce: &str, dice: &str| Some(format!("{:.3} + {:.3}", value(bce)?, value(dice)?));
        if let Some(coarse) = pair("loss_mask", "loss_dice") {
            text += &format!(" · coarse {coarse}");
        }
        if let Some(refined) = pair("sam_loss_mask", "sam_loss_dice") {
            text += &format!(" · refined {refined}");
        }
        if let (Some(loss), false) = (value("selector_loss"), self.selector_only) {
            text += &format!(" · selector {loss:.3}");
        }
        match (value("aiou"), value("sam_aiou")) {
            (Some(coarse), Some(refined)) => {
                text += &format!(" · aIoU {:.1} → {:.1} %", 100.0 * coarse, 100.0 * refined);
            }
            (Some(coarse), None) => text += &format!(" · aIoU {:.1} %", 100.0 * coarse),
            _ => {}
        }
        text
    }

    /// `2.31 samples/s · 4.2 GB · ETA 3h 12m`
    fn pace(&self, step: u64) -> String {
        let (from, since) = self.last;
        let rate = (step - from) as f64 * self.batch_size as f64 / since.elapsed().as_secs_f64().max(1e-9);
        let mut text = format!("{rate:.2} samples/s");
        if let Some(bytes) = resident_memory() {
            text += &format!(" · {:.1} GB", bytes as f64 / 1e9);
        }
        let (from, since) = self.first;
        if step > from {
            let each = since.elapsed().as_secs_f64() / (step - from) as f64;
            let left = Duration::from_secs_f64(each * (self.total.saturating_sub(step)) as f64);
            text += &format!(" · ETA {}", indicatif::HumanDuration(left));
        }
        text
    }
}

impl Watch for View<'_> {
    fn stage(&mut self, what: &'static str) {
        match self.total {
            0 => self.spinner = Some(self.talk.during(what)),
            _ => self.bar.set_message(what),
        }
    }

    fn begin(&mut self, step: u64, total: u64, per_epoch: u64) {
        self.spinner = None;
        (self.total, self.per_epoch) = (total, per_epoch.max(1));
        (self.last, self.first) = ((step, Instant::now()), (step, Instant::now()));
        match step {
            0 => self.talk.note(format_args!("{total} steps, {per_epoch} an epoch")),
            _ => self.talk.note(format_args!("going on after step {step} of {total}")),
        }
        let bar = self.talk.bar(total);
        if let Ok(style) = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {eta}\n{msg}") {
            bar.set_style(style);
        }
        bar.set_position(step);
        bar.reset_eta();
        self.bar = bar;
    }

    fn after_step(&mut self, step: &Step) -> flmm::Result<After> {
        self.bar.set_position(step.step);
        self.bar.set_prefix(format!("epoch {}/{}", step.epoch + 1, self.epochs));
        Ok(After { stop: self.stop.load(Ordering::SeqCst), values: Vec::new() })
    }

    fn line(&mut self, line: &Map<String, Value>) -> flmm::Result<()> {
        let step = line.get("step").and_then(Value::as_u64).unwrap_or_default();
        let (averages, pace) = (self.averages(line), self.pace(step));
        self.last = (step, Instant::now());
        self.bar.set_message(format!("{averages}\n{pace}"));
        let validated: Vec<String> = line
            .iter()
            .filter_map(|(name, value)| {
                Some(format!("{} {:.4}", name.strip_prefix("val_")?, value.as_f64()?))
            })
            .collect();
        if !validated.is_empty() {
            self.note(&format!("step {step}, unseen samples: {}", validated.join(" · ")));
        }
        let due = self.told.is_none_or(|told| told.elapsed() >= BETWEEN_LINES) || step == self.total;
        if self.bar.is_hidden() && due {
            self.told = Some(Instant::now());
            let epoch = (step.max(1) - 1) / self.per_epoch + 1;
            self.talk.note(format_args!(
                "step {step}/{} · epoch {epoch}/{} · {averages} · {pace}",
                self.total, self.epochs
            ));
        }
        Ok(())
    }

    fn saved(&mut self, step: u64) {
        self.bar.suspend(|| self.talk.detail(format_args!("checkpoint after step {step}")));
    }

    fn note(&mut self, text: &str) {
        let bar = self.spinner.as_ref().and_then(Spinner::bar).unwrap_or(self.bar.clone());
        bar.suspend(|| self.talk.note(text));
    }
}

/// Bytes of memory in use, where the system tells.
fn resident_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}
