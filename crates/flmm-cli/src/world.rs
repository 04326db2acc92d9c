//! `flmm world`: the synthetic world in the published dataset formats.

use crate::args::WorldArgs;
use crate::failure::{Failure, Result};
use crate::talk::Talk;

pub(crate) fn run(args: &WorldArgs, _talk: &Talk) -> Result<()> {
    Err(Failure::other(format!("writing {} is not connected yet", args.out.display())))
}
