//! How much arithmetic and how many bytes of weights the stages of a pass are, and what the machine can do at most.

use cpu_time::ProcessTime;
use flmm_kernels::peak;
use half::bf16;
use serde::Serialize;

use super::pass::Pass;
use crate::args::{ModelArgs, Precision, SamPrecision};
use crate::failure::Result;
use crate::model::Model;

/// Values of the matrix that is read to measure bandwidth: 90 MB, as a layer of a 7B model.
const READ: usize = 4096 * 11008;
/// Bytes of an eight-bit weight: 128 share a scale of two bytes.
const INT8: f64 = 1.0 + 2.0 / 128.0;
/// Turns of the loops that only compute, each some ten milliseconds.
const TURNS: usize = 1 << 21;

/// What a stage computes with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Unit {
    F32,
    Bf16,
    Int8,
}

/// What a stage has to do.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Work {
    pub(super) flops: f64,
    /// Bytes of weights, each read once.
    pub(super) bytes: f64,
    pub(super) unit: Unit,
}

/// Operations and bytes per processor second, in billions: the median of the rounds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct Machine {
    pub(super) f32: f64,
    /// `None` where the processor cannot multiply bf16.
    pub(super) bf16: Option<f64>,
    pub(super) int8: Option<f64>,
    pub(super) read: f64,
}

impl Machine {
    /// Measures once.
    pub(super) fn measure(data: &[bf16]) -> Self {
        let rate = |work: &dyn Fn() -> Option<f64>| {
            let clock = ProcessTime::now();
            work().map(|work| work / 1e9 / clock.elapsed().as_secs_f64())
        };
        Self {
            f32: rate(&|| Some(peak::multiply_add_f32(TURNS))).unwrap_or_default(),
            bf16: rate(&|| peak::multiply_add_bf16(TURNS)),
            int8: rate(&|| peak::multiply_add_int8(TURNS)),
            read: rate(&|| Some(peak::read(data))).unwrap_or_default(),
        }
    }

    /// What is read to measure bandwidth.
    pub(super) fn data() -> Vec<bf16> {
        vec![bf16::ONE; READ]
    }

    pub(super) fn median(rounds: &[Self]) -> Self {
        let some = |part: fn(&Self) -> Option<f64>| rounds.iter().filter_map(part).collect::<Vec<f64>>();
        let maybe = |values: Vec<f64>| (!values.is_empty()).then(|| super::median(&values));
        Self {
            f32: super::median(&some(|round| Some(round.f32))),
            bf16: maybe(some(|round| round.bf16)),
            int8: maybe(some(|round| round.int8)),
            read: super::median(&some(|round| Some(round.read))),
        }
    }

    /// The least processor seconds that `work` can take: products at the highest rate that its numbers allow, or reading
    /// its weights once, whichever is longer.
    pub(super) fn floor(&self, work: &Work) -> f64 {
        let bf16 = self.bf16.unwrap_or(self.f32);
        let rate = match work.unit {
            Unit::F32 => self.f32,
            Unit::Bf16 => bf16,
            // Weights of few bits may be widened and multiplied as bf16.
            Unit::Int8 => self.int8.unwrap_or(bf16).max(bf16),
        };
        (work.flops / rate).max(work.bytes / self.read) / 1e9
    }
}

/// The work of a pass in the order of [`super::pass::STAGES`]; `None` where it is not counted. Then that of one more token.
pub(super) fn of(model: &Model, args: &ModelArgs, pass: &Pass) -> Result<([Option<Work>; 7], Work)> {
    let (lmm, decoder) = (model.grounder.lmm(), model.grounder.lmm().decoder().config());
    let (unit, size) = match model.precision {
        Precision::F32 => (Unit::F32, 4.0),
        Precision::Bf16 => (Unit::Bf16, 2.0),
        Precision::Int8 => (Unit::Int8, INT8),
        // 32 do.
        Precision::Int4 => (Unit::Int8, 0.5 + 2.0 / 32.0),
    };
    let layers = decoder.layer_weights();
    // What is not the decoder's is the tower's and the projector's: nearly all of it matrices that multiply every row.
    let tower = model.lmm_elements()?.saturating_sub(layers + decoder.table_weights());
    let tower = Work { flops: 2.0 * (tower * pass.tower_rows) as f64, bytes: size * tower as f64, unit };
    let prefill = Work { flops: decoder.flops(pass.read.ids.len()), bytes: size * layers as f64, unit };
    let token = layers + decoder.vocab_size * decoder.hidden_size;
    let token = Work { flops: 2.0 * token as f64, bytes: size * token as f64, unit };

    let rows: usize = pass.observation.phrases.iter().map(Vec::len).sum();
    let channels = lmm.spec().layers * lmm.spec().heads;
    let maps = Work {
        flops: 2.0 * (channels * decoder.head_dim * rows * pass.read.image.tokens) as f64,
        bytes: 0.0,
        unit: Unit::F32,
    };
    let phrases = pass.observation.phrases.len() as f64;
    let encoder = model.grounder.sam().map(|sam| {
        let (unit, size) = match args.sam_dtype {
            SamPrecision::F32 => (Unit::F32, 4.0),
            SamPrecision::Bf16 => (Unit::Bf16, 2.0),
            SamPrecision::Int8 => (Unit::Int8, INT8),
        };
        let sam = sam.config();
        Work { flops: sam.encoder_flops(), bytes: size * sam.encoder_weights() as f64, unit }
    });
    let refiner = model.grounder.sam().map(|sam| Work {
        flops: phrases * sam.config().decoder_flops(),
        bytes: 0.0,
        unit: Unit::F32,
    });
    let unet = model.grounder.head().mask_head.config();
    let (height, width) = pass.read.image.size();
    let flops: f64 = unet.flops(height.max(width)).iter().map(|(_, flops)| flops).sum();
    let unet = Work { flops: phrases * flops, bytes: 4.0 * unet.parameter_count() as f64, unit: Unit::F32 };
    Ok(([None, Some(tower), Some(prefill), Some(maps), encoder, Some(unet), refiner], token))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_is_the_longer_of_computing_and_reading() {
        let machine = Machine { f32: 100.0, bf16: Some(200.0), int8: Some(150.0), read: 10.0 };
        let floor = |flops, bytes, unit| machine.floor(&Work { flops, bytes, unit });
        assert_eq!(floor(400e9, 10e9, Unit::F32), 4.0);
        assert_eq!(floor(400e9, 10e9, Unit::Bf16), 2.0);
        assert_eq!(floor(400e9, 10e9, Unit::Int8), 2.0);
        assert_eq!(floor(1e9, 10e9, Unit::F32), 1.0);
        let old = Machine { bf16: None, int8: None, ..machine };
        assert_eq!(old.floor(&Work { flops: 400e9, bytes: 0.0, unit: Unit::Int8 }), 4.0);
    }

    #[test]
    fn the_median_leaves_out_what_cannot_be_measured() {
        let round = |f32| Machine { f32, bf16: None, int8: Some(f32), read: 1.0 };
        let median = Machine::median(&[round(3.0), round(1.0), round(2.0)]);
        assert_eq!(median, Machine { f32: 2.0, bf16: None, int8: Some(2.0), read: 1.0 });
    }
}
