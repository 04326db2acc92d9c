//! `flmm eval panels`: attention clusters, coarse masks, refined masks and ground truth side by side.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Args;
use flmm::overlay::save_png;
use flmm::weights::save_safetensors;
use flmm::{Error, Grounder};
use flmm_data::images::ImageStore;
use flmm_data::narratives::{NarrativeSample, Narratives};
use flmm_eval::panels::{PhraseStages, four_panels, stages};
use flmm_eval::png::{SPLIT, caption, picture};
use image::RgbImage;

use crate::args::{ModelArgs, count};
use crate::failure::Result;
use crate::model;
use crate::talk::Talk;

#[derive(Debug, Args)]
pub(crate) struct PanelsArgs {
    /// Data root with coco/annotations and coco/val2017, as for the task `png`.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Folder for the pictures. Those that are there are not made again.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Number of narratives.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = count)]
    limit: usize,
    /// Also make one strip per phrase: picture, attention, clusters, masks, ground truth.
    #[arg(long)]
    strips: bool,
    /// Also keep the attention stacks, one `[channels, rows, columns]` tensor per phrase, as safetensors.
    #[arg(long)]
    raw: bool,
    /// Seed of the clustering.
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    model: ModelArgs,
}

pub(crate) fn run(args: &PanelsArgs, talk: &Talk) -> Result<()> {
    let data = Narratives::open_split(&args.data, SPLIT)?;
    let pictures = ImageStore::open(&args.data)?;
    let model = model::open(&args.model, talk)?;
    std::fs::create_dir_all(&args.out).map_err(|e| Error::io(&args.out, e))?;
    let bar = talk.bar(args.limit.min(data.len()) as u64);
    let (mut sums, mut phrases, mut made, mut found) = ([0f64; 4], 0usize, 0usize, 0usize);
    for index in 0..data.len() {
        if made + found == args.limit {
            break;
        }
        let sample = data.sample(index)?;
        if sample.phrases.is_empty() {
            continue;
        }
        bar.inc(1);
        let name = args.out.join(format!("{index:05}_{}", sample.image_id));
        if name.with_extension("png").is_file() {
            found += 1;
            continue;
        }
        let done = draw(&model.grounder, &pictures.read(&picture(&sample))?, args, &sample, &name)?;
        for stage in &done {
            let [clusters, coarse, refined] = stage.ious()?;
            sums = [sums[0] + stage.soft_iou, sums[1] + clusters, sums[2] + coarse, sums[3] + refined];
        }
        phrases += done.len();
        made += 1;
    }
    bar.finish_and_clear();
    talk.note(format_args!("{made} pictures made in {}, {found} were there", args.out.display()));
    if phrases > 0 {
        let mean = sums.map(|sum| 100.0 * sum / phrases as f64);
        talk.print(&format!(
            "{phrases} phrases, mean IoU with the ground truth: clusters {:.1} (soft {:.1}), coarse {:.1}, refined {:.1}",
            mean[1], mean[0], mean[2], mean[3]
        ))?;
    }
    Ok(())
}

/// Makes the files of one narrative; the picture comes last, because it tells that the rest is there.
fn draw(
    grounder: &Grounder,
    image: &RgbImage,
    args: &PanelsArgs,
    sample: &NarrativeSample,
    name: &Path,
) -> Result<Vec<PhraseStages>> {
    let observation = grounder.observe(image, &caption(grounder, sample)?)?;
    let done = stages(grounder, &observation, sample, args.seed)?;
    let beside = |ending: &str| PathBuf::from(format!("{}{ending}", name.display()));
    if args.strips {
        for (index, stage) in done.iter().enumerate() {
            save_png(&stage.strip(image, index)?, &beside(&format!("_{}.png", index + 1)))?;
        }
    }
    if args.raw {
        let mut stacks = BTreeMap::new();
        for (index, stage) in done.iter().enumerate() {
            stacks.insert(format!("phrase.{index}"), stage.stack.contiguous().map_err(Error::from)?);
        }
        let texts = done.iter().enumerate().map(|(i, stage)| (format!("phrase.{i}"), stage.text.clone()));
        save_safetensors(beside(".safetensors"), &stacks, &texts.collect())?;
    }
    save_png(&four_panels(image, sample, &done)?, &beside(".png"))?;
    Ok(done)
}
