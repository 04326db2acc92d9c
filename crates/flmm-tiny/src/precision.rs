//! What fewer bits cost: the same questions and expressions with every format of weights.

use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{DType, Device};
use flmm::Grounder;
use flmm::grounder::ModelPaths;
use flmm::lmm::OpenOptions;
use flmm::weights::WeightFormat;
use flmm_data::world::{self, Split, WorldConfig};
use serde_json::{Value, json};

use crate::evaluate::Report;
use crate::measure::percent;

/// What to measure on.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct PrecisionArgs {
    /// Scenes of the test split.
    #[arg(long, default_value_t = 100)]
    pub(crate) scenes: u64,
    /// Seed of the scenes.
    #[arg(long, default_value_t = 2026)]
    pub(crate) seed: u64,
}

/// Formats, the first of which the others are compared with.
const FORMATS: [(DType, WeightFormat); 4] = [
    (DType::F32, WeightFormat::AsLoaded),
    (DType::BF16, WeightFormat::AsLoaded),
    (DType::BF16, WeightFormat::Int8),
    (DType::BF16, WeightFormat::Int4),
];

/// For every format, which SAM in f32 goes with: questions answered right, answers that are the same text as in f32, and
/// referring masks.
pub(crate) fn run(args: &PrecisionArgs, bundle: &Path, world: &WorldConfig) -> Result<Value> {
    let (mut first, mut rows) = (Vec::new(), Vec::new());
    for (dtype, weights) in FORMATS {
        let options = OpenOptions { weights, ..OpenOptions::new(dtype, &Device::Cpu) };
        let grounder = Grounder::open_with(&ModelPaths::bundle(bundle), &options)?;
        let bar = indicatif::ProgressBar::new(args.scenes);
        let (mut report, mut answers) = (Report::default(), Vec::new());
        for index in 0..args.scenes {
            let scene = world::generate(world, Split::Test, args.seed, index);
            let told = report.answers(&grounder, &scene).with_context(|| format!("scene {index}"))?;
            answers.extend(told);
            report.expressions(&grounder, &scene, index, None)?;
            bar.inc(1);
        }
        bar.finish_and_clear();
        if first.is_empty() {
            first.clone_from(&answers);
        }
        let same = first.iter().zip(&answers).filter(|(a, b)| a == b).count();
        rows.push(json!({
            "dtype": options.numbers(),
            "closed_questions": percent(report.closed.0, report.closed.1),
            "answers_as_in_f32": percent(same, answers.len()),
            "answers": answers.len(),
            "referring": { "refined": report.refined.json(), "coarse": report.coarse.json() },
        }));
    }
    Ok(json!({ "scenes": args.scenes, "seed": args.seed, "formats": rows }))
}
