//! Whole transformer layers as single operations with a gradient, for training on the CPU.
//!
//! A layer of candle operations spends more time on what lies between its products than on them: every node has a
//! gradient that is made of zeros and then added to. Here a layer is one node. Every operation computes on the thread
//! that calls it, in an order that depends on the sizes alone.

mod attention;
mod decoder_block;
mod linear;
mod product;
mod rotary;
mod rows;
#[cfg(test)]
mod tests;

pub(crate) use attention::{Maps, PackedMask};
pub(crate) use decoder_block::{DecoderSizes, Pass, decoder_block};
pub(crate) use rotary::Rotary;
