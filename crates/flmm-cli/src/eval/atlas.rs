//! `flmm eval atlas`: which attention heads look at what is spoken of.

use std::path::PathBuf;

use clap::Args;
use flmm::masks::Mask;
use flmm::overlay::save_png;
use flmm_data::images::ImageStore;
use flmm_data::narratives::Narratives;
use flmm_eval::atlas::{Atlas, AtlasTable};
use flmm_eval::png::{SPLIT, caption, picture};
use serde_json::json;

use crate::args::{ModelArgs, count};
use crate::failure::{Failure, Result};
use crate::model;
use crate::picture::check_place;
use crate::talk::Talk;

/// Heads that are printed.
const BEST: usize = 10;

#[derive(Debug, Args)]
pub(crate) struct AtlasArgs {
    /// Data root with coco/annotations and coco/val2017, as for the task `png`.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Picture of the table; the numbers go beside it, the name ending in .json.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Number of narratives.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = count)]
    limit: usize,
    /// Print the numbers as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
}

pub(crate) fn run(args: &AtlasArgs, talk: &Talk) -> Result<()> {
    check_place(&args.out)?;
    let data = Narratives::open_split(&args.data, SPLIT)?;
    let pictures = ImageStore::open(&args.data)?;
    let model = model::open(&args.model, talk)?;
    let grounder = &model.grounder;
    let (layers, heads) = (grounder.lmm().spec().layers, grounder.lmm().spec().heads);
    let bar = talk.bar(args.limit.min(data.len()) as u64);
    let mut atlas: Option<Atlas> = None;
    let mut seen = 0;
    for index in 0..data.len() {
        if seen == args.limit {
            break;
        }
        let sample = data.sample(index)?;
        if sample.phrases.is_empty() {
            continue;
        }
        seen += 1;
        bar.inc(1);
        let image = pictures.read(&picture(&sample))?;
        let seen_by = grounder.attention(&image, &caption(grounder, &sample)?)?;
        let atlas = atlas.get_or_insert_with(|| Atlas::new(layers, heads, &seen_by.layout));
        for (number, phrase) in sample.phrases.iter().enumerate() {
            atlas.add(&seen_by, number, &Mask::from(&phrase.mask))?;
        }
    }
    bar.finish_and_clear();
    let Some(table) = atlas.map(|atlas| atlas.table()).filter(|table| table.phrases > 0) else {
        return Err(Failure::other("no narrative has a grounded phrase"));
    };
    let numbers = serde_json::to_string(&json!({ "model": model.name, "table": table }))
        .map_err(|e| Failure::other(format!("cannot write JSON: {e}")))?;
    let beside = args.out.with_extension("json");
    flmm::atomic::write(&beside, |file| file.write_all(numbers.as_bytes()))?;
    save_png(&table.picture(&model.name), &args.out)?;
    talk.note(format_args!("atlas: {} and {}", args.out.display(), beside.display()));
    talk.print(&if args.json { numbers } else { text(&table) })
}

/// The best heads.
fn text(table: &AtlasTable) -> String {
    let mut text = format!(
        "{} phrases; a blind head has {:.3}\n\nlayer  head  peak inside  mass inside\n",
        table.phrases, table.chance
    );
    for head in table.best(BEST) {
        let plane = if table.planes > 1 { format!(" (grid {})", head.plane) } else { String::new() };
        text += &format!(
            "{:>5}  {:>4}  {:>11.3}  {:>11.3}{plane}\n",
            head.layer, head.head, head.peak, head.mass
        );
    }
    text
}
