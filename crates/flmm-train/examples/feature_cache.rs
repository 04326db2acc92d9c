//! How long the first epoch takes with a feature cache, and how long the others: on scenes of the synthetic world with
//! the frozen models of a bundle.
//!
//! ```text
//! cargo run --release -p flmm-train --example feature_cache -- models/flmm-tiny [SCENES] [EPOCHS] [f32|bf16]
//!
//! cargo run --release -p xtask -- random-model deepseek-vl-1.3b --out target/deepseek
//! cargo run --release -p flmm-train --example feature_cache -- target/deepseek 8 3 bf16
//! ```

use std::error::Error;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use cpu_time::ProcessTime;
use flmm::Grounder;
use flmm::grounder::{Caption, HeadSizes, ModelPaths};
use flmm::weights::fingerprint;
use flmm_data::world::{Level, Scene, SegmentRef, Split, WorldConfig, generate};
use flmm_train::cache::{CacheKey, CacheOptions, CachedSamples, FeatureCache, MapValues, Rows, Values};
use flmm_train::head::{init, trainable};
use flmm_train::samples::from_fn;
use flmm_train::selection::{best_channels, channel_scores};
use flmm_train::{HeadConfig, HeadSample, HeadTask, RunOptions, Samples, TrainConfig, Trainer};
use serde_json::json;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let bundle = PathBuf::from(args.next().ok_or("give the folder of flmm-tiny")?);
    let scenes: usize = args.next().map_or(Ok(64), |text| text.parse())?;
    let epochs: u64 = args.next().map_or(Ok(4), |text| text.parse())?;
    let dtype = match args.next().as_deref() {
        None | Some("f32") => DType::F32,
        Some("bf16") => DType::BF16,
        Some(other) => return Err(format!("`{other}` instead of f32 or bf16").into()),
    };
    let grounder = Grounder::open(&ModelPaths::bundle(&bundle), &Device::Cpu, dtype)?;
    let sam = grounder.sam().ok_or("a bundle without SAM")?;
    let world = WorldConfig::new(Level::from_number(1).ok_or("no level 1")?);
    let plain = from_fn(scenes, |index, _| {
        let scene = generate(&world, Split::Train, 1, index as u64);
        observe(&grounder, &scene)
    });

    let folder = tempfile::tempdir()?;
    let key = CacheKey {
        lmm: bundle.display().to_string(),
        lmm_revision: fingerprint(&bundle.join("lmm"))?,
        lmm_dtype: dtype.as_str().into(),
        sam_revision: fingerprint(&bundle.join("sam"))?,
        preprocessing: flmm::vision::preprocess::VERSION,
        capture: flmm::capture::VERSION,
        prompt: flmm::lmm::GROUNDING_INSTRUCTION.into(),
        annotations: Default::default(),
        data: json!("scenes"),
        values: Values::F16,
        maps: MapValues::Same,
        rows: Rows::Phrases,
    };
    let cache = FeatureCache::open(folder.path().join("cache"), key, CacheOptions::default())?;
    let named = Named(&plain);
    let samples = CachedSamples::new(&cache, &named);

    let lmm = grounder.lmm();
    let sizes = HeadSizes::of(lmm, sam.config().clone());
    let base_channels = grounder.head().mask_head.config().base_channels;
    let tensors = init(&sizes, base_channels, None, None, 1)?;
    let (head, vars) = trainable(&sizes, &tensors)?;
    let task = HeadTask::new(head, HeadConfig::default())?;
    let config = TrainConfig { epochs, batch_size: 4, ..TrainConfig::default() };
    let options = RunOptions::new(folder.path().join("run"));
    let mut trainer = Trainer::new(&task, vars, config, json!({}), options)?;

    let per_epoch = scenes.div_ceil(4) as u64;
    let (mut clock, mut processor) = (Instant::now(), ProcessTime::now());
    println!("epoch   seconds   processor seconds   training on {scenes} scenes");
    trainer.run(&samples, |step| {
        if step.step.is_multiple_of(per_epoch) {
            let (wall, cpu) = (clock.elapsed().as_secs_f64(), processor.elapsed().as_secs_f64());
            println!("{:>5} {wall:>9.2} {cpu:>19.2}", step.step / per_epoch);
            (clock, processor) = (Instant::now(), ProcessTime::now());
        }
        ControlFlow::Continue(())
    })?;

    // The samples alone: what the frozen models take, and what reading takes.
    let timed = |samples: &dyn Samples<HeadSample>| -> Result<f64, Box<dyn Error>> {
        let processor = ProcessTime::now();
        (0..scenes).try_for_each(|index| samples.sample(index, 0).map(drop))?;
        Ok(processor.elapsed().as_secs_f64())
    };
    let (made, read) = (timed(&plain)?, timed(&samples)?);
    println!("samples alone, processor seconds: made {made:.2}, read {read:.3}");
    println!("{:?}", cache.contents());
    let scores = channel_scores(&samples, 0..scenes)?;
    let best = best_channels(&scores, 5);
    println!(
        "best attention maps: {best:?} of {}, correlations {:?}",
        scores.len(),
        best.iter().map(|&map| (scores[map as usize] * 100.0).round() / 100.0).collect::<Vec<_>>()
    );
    Ok(())
}

/// Samples whose names do not change from epoch to epoch.
struct Named<'a>(&'a dyn Samples<HeadSample>);

impl Samples<HeadSample> for Named<'_> {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn sample(&self, index: usize, epoch: u64) -> flmm::Result<HeadSample> {
        self.0.sample(index, epoch)
    }

    fn key(&self, index: usize, _: u64) -> String {
        format!("scene/{index}")
    }
}

/// The scene's first narration as the frozen models see it.
fn observe(grounder: &Grounder, scene: &Scene) -> flmm::Result<HeadSample> {
    let (mut segments, mut masks) = (Vec::new(), Vec::new());
    let pixels = (scene.image.width() * scene.image.height()) as usize;
    let mut phrases = 0;
    for segment in &scene.texts.narrations[0].segments {
        let phrase = (!segment.segments.is_empty()).then_some(phrases);
        segments.push((segment.utterance.as_str(), phrase));
        if phrase.is_none() {
            continue;
        }
        phrases += 1;
        let mut union = vec![0u8; pixels];
        for part in &segment.segments {
            let mask = match part {
                SegmentRef::Object(i) => &scene.objects[*i].mask,
                SegmentRef::Stuff(i) => &scene.stuff[*i].mask,
            };
            union.iter_mut().zip(&mask.data).for_each(|(value, inside)| *value |= u8::from(*inside));
        }
        masks.extend(union);
    }
    let caption = Caption::from_segments(grounder.lmm().tokenizer(), segments)?;
    let observation = grounder.observe(&scene.image, &caption)?;
    let shape = (phrases, scene.image.height() as usize, scene.image.width() as usize);
    Ok(HeadSample { observation, masks: Tensor::from_vec(masks, shape, &Device::Cpu)?, token_labels: None })
}
