//! Question answering.

pub mod choice;
pub mod mmbench;
pub mod normalise;
pub mod vqa;
pub mod yes_no;
