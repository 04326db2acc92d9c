//! Datasets in their published file formats, and the synthetic world that writes them.
//!
//! - [`narratives`]: Panoptic Narrative Grounding with COCO panoptic masks,
//! - [`refcoco`]: RefCOCO, RefCOCO+, RefCOCOg,
//! - [`grefcoco`]: gRefCOCO, whose expressions mean several objects or none,
//! - [`qa`]: question answering: MME, MMBench, MM-Vet, LLaVA-Bench, POPE, GQA, VQAv2, AI2D,
//! - [`reasonseg`], [`gcg`], [`viscot`]: reasoning segmentation, grounded conversation, visual chain of thought,
//! - [`images`]: pictures from folders, zip and tar archives, WebDataset shards,
//! - [`check`]: whether a download is complete,
//! - [`world`]: made-up scenes with exact masks and true sentences, in memory or written in all of these formats.
//!
//! The same types read the files and write them. Readers know no tokenizer and decode no picture but panoptic masks and
//! those of [`images`]. [`Part`] shares samples out over processes.

pub mod check;
pub mod coco;
pub mod gcg;
pub mod grefcoco;
pub mod images;
mod mask;
pub mod narratives;
mod part;
pub mod polygons;
pub mod qa;
pub mod reasonseg;
pub mod refcoco;
pub mod viscot;
pub mod world;

pub use images::ImageStore;
pub use mask::Mask;
pub use part::Part;
