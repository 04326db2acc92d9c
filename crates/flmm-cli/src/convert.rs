//! `flmm convert`: released checkpoints in, files that are checked and safe to read out.

use std::path::Path;

use flmm::convert::{Converted, convert_head, convert_sam, head_target};

use crate::args::Convert;
use crate::failure::{Failure, Result};
use crate::talk::Talk;

pub(crate) fn run(what: &Convert, talk: &Talk) -> Result<()> {
    let done = {
        let _spinner = talk.during("converting");
        match what {
            Convert::Head { file, lmm, out, force } => {
                exists(file)?;
                let target = head_target(lmm).map_err(usage)?;
                convert_head(file, &target, out, *force).map_err(usage)?
            }
            Convert::Sam { file, out, force } => {
                exists(file)?;
                convert_sam(file, out, *force).map_err(usage)?
            }
        }
    };
    tell(&done, talk);
    Ok(())
}

fn exists(file: &Path) -> Result<()> {
    match file.exists() {
        true => Ok(()),
        false => {
            Err(Failure::usage(format!("`{}`: no such file or folder", file.display()), "check the path"))
        }
    }
}

/// A request that cannot be served was typed that way; everything else failed.
fn usage(error: flmm::Error) -> Failure {
    match error {
        flmm::Error::Request { what, hint } => Failure::usage(what, hint),
        other => other.into(),
    }
}

fn tell(done: &Converted, talk: &Talk) {
    let Converted { file, tensors, parameters, left_out, from_sam } = done;
    talk.note(format_args!("{}: {tensors} tensors, {parameters} parameters", file.display()));
    if *left_out > 0 {
        talk.note(format_args!("left out: {left_out} frozen tensors, which the LMM and the SAM file have"));
    }
    if !from_sam.is_empty() {
        talk.note(format_args!(
            "not in the file, taken from the SAM file when used: {} tensors",
            from_sam.len()
        ));
        from_sam.iter().for_each(|name| talk.detail(format_args!("  {name}")));
    }
}
