//! The harness: recorded numbers, files with faults, order and shards, and whole runs.

#[path = "../../../flmm-data/tests/common/mod.rs"]
mod common;
mod end_to_end;
mod goldens_metrics;
mod goldens_rle;
mod order;
mod scoring;
mod support;
