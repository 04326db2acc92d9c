//! `flmm convert`: released checkpoints in, files that are checked and safe to read out.

use std::path::Path;

use candle_core::{DType, Device};
use flmm::convert::{Converted, ConvertedLmm, convert_head, convert_lmm, convert_sam, head_target};
use flmm::lmm::OpenOptions;

use crate::args::{Convert, ConvertLmm};
use crate::failure::{Failure, Result};
use crate::talk::Talk;

pub(crate) fn run(what: &Convert, talk: &Talk) -> Result<()> {
    let done = {
        let _spinner = talk.during("converting");
        match what {
            Convert::Lmm(args) => return convert_an_lmm(args, talk),
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

fn convert_an_lmm(args: &ConvertLmm, talk: &Talk) -> Result<()> {
    let ConvertLmm { dir, dtype, out, force, vision_tower, vision_tower_aux } = args;
    exists(dir)?;
    let options = OpenOptions {
        weights: dtype.weights(),
        vision_tower: vision_tower.clone(),
        vision_tower_aux: vision_tower_aux.clone(),
        ..OpenOptions::new(DType::BF16, &Device::Cpu)
    };
    let ConvertedLmm { name, matrices, bytes } = convert_lmm(dir, &options, out, *force).map_err(usage)?;
    let [before, after] = bytes.map(|bytes| bytes as f64 / 1e6);
    let numbers = options.numbers();
    talk.note(format_args!("{}: {name} in {numbers}, {matrices} matrices packed", out.display()));
    talk.note(format_args!("{after:.1} MB of weights instead of {before:.1} MB"));
    Ok(())
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
