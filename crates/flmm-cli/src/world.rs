//! `flmm world`: the synthetic world in the published dataset formats.

use flmm_data::world::{self, Level};

use crate::args::{Split, WorldArgs};
use crate::failure::{Failure, Result};
use crate::talk::Talk;

pub(crate) fn run(args: &WorldArgs, talk: &Talk) -> Result<()> {
    let split = match args.split {
        Split::Train => world::Split::Train,
        Split::Val => world::Split::Val,
        Split::Test => world::Split::Test,
    };
    let level = Level::from_number(args.level)
        .ok_or_else(|| Failure::usage(format!("there is no level {}", args.level), "choose level 1 or 2"))?;
    let count = args.count as u64;
    let bar = talk.bar(count);
    let written = world::write(&args.out, split, count, args.seed, level, &|done| bar.set_position(done));
    bar.finish_and_clear();
    written?;
    talk.note(format_args!("{count} scenes: {}", args.out.display()));
    talk.note("pictures contain Twemoji graphics (CC-BY 4.0): see world.json, or `flmm credits`");
    Ok(())
}
