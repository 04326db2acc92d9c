//! The synthetic world: scenes of named sprites on varied backgrounds, with exact masks and true sentences.
//!
//! [`generate`] makes one [`Scene`] in memory, a pure function of configuration, split, seed and index. Every
//! sentence is decided from the masks with a margin, so that a careful observer of the picture agrees with it.
//! [`write()`] puts scenes on disk in the published formats of the real datasets.

mod affordances;
mod catalog;
mod dice;
mod facts;
mod files;
mod groups;
mod narrate;
mod paint;
mod qa;
mod questions;
mod records;
mod refer;
mod sprites;
mod text;
mod texture;
mod vocabulary;
mod write;

pub use crate::mask::Mask;
pub use affordances::{Affordance, affordances};
pub use catalog::{Class, Colour, Level, Sprite, StuffClass, classes, stuff_classes};
pub use paint::{Object, StuffRegion};
pub use text::{
    Link, Narration, NarrationSegment, Question, QuestionKind, Referring, ReferringKind, SegmentRef, Texts,
};
pub use vocabulary::vocabulary_texts;
pub use write::{Settings, write};

use dice::Dice;
use facts::Facts;
use image::RgbImage;
use serde::{Deserialize, Serialize};

/// The credit that the licences of the drawings and names ask for.
pub const ATTRIBUTION: &str = "The pictures of objects are Twemoji graphics, copyright Twitter, Inc and other \
    contributors, licensed under CC-BY 4.0 (https://creativecommons.org/licenses/by/4.0/), scaled, mirrored, rotated \
    and composed by flmm's synthetic world. Source: https://github.com/jdecked/twemoji.";

/// Part of the key of every random stream: raise it when the same seed would give other scenes.
pub const WORLD_VERSION: u8 = 1;

/// Which part of the data a scene belongs to. Splits draw from unrelated random streams and share no scene.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Split {
    Train,
    Val,
    Test,
}

impl Split {
    /// `train`, `val` or `test`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Val => "val",
            Self::Test => "test",
        }
    }
}

/// What scenes look like and how many texts they carry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorldConfig {
    /// How rich the scenes are.
    pub level: Level,
    /// Picture sizes (width, height) in pixels, drawn with equal chance.
    pub sizes: Vec<(u32, u32)>,
    /// Narrations per scene.
    pub narrations: usize,
    /// At most this many questions of one kind per scene (existence: this many with "yes" and as many with "no").
    pub per_kind: usize,
    /// Fewest and most objects of a scene, drawn with equal chance; as the level has it unless given. A scene gets fewer
    /// where so many do not fit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub objects: Option<[usize; 2]>,
}

impl WorldConfig {
    /// The usual settings of a level.
    pub fn new(level: Level) -> Self {
        Self {
            level,
            sizes: vec![(240, 240), (240, 180), (180, 240)],
            narrations: 2,
            per_kind: 2,
            objects: None,
        }
    }
}

impl Default for WorldConfig {
    fn default() -> Self {
        Self::new(Level::One)
    }
}

/// A picture with everything that is known about it.
pub struct Scene {
    /// The picture.
    pub image: RgbImage,
    /// Its objects in painter's order: later ones lie in front of earlier ones.
    pub objects: Vec<Object>,
    /// Its background regions, from top to bottom. Objects and regions together cover every pixel once.
    pub stuff: Vec<StuffRegion>,
    /// What can be said and asked about it.
    pub texts: Texts,
}

/// Makes scene number `index` of a split.
///
/// The same arguments give the same bytes on every machine. The picture does not depend on the text settings.
/// An empty `config.sizes` means 240 x 240; sides below 32 pixels are raised to 32. `config.objects` are
/// brought into 1 to 6.
pub fn generate(config: &WorldConfig, split: Split, seed: u64, index: u64) -> Scene {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&index.to_le_bytes());
    key[16..19].copy_from_slice(&[split as u8, config.level.number(), WORLD_VERSION]);
    let mut dice = Dice::new(key, 0);
    let (width, height) = if config.sizes.is_empty() { (240, 240) } else { *dice.pick(&config.sizes) };
    let painted = paint::paint(&mut dice, config.level, config.objects, (width.max(32), height.max(32)));

    let facts = Facts::new(&painted, config.level);
    let mut dice = Dice::new(key, 1);
    let texts = Texts {
        questions: questions::questions(&facts, &mut dice, config.per_kind),
        narrations: narrate::narrations(&facts, &mut dice, config.narrations),
        referring: refer::referring(&facts, &mut dice),
        reasoning: questions::reasoning(&facts),
    };
    let paint::Painted { image, objects, stuff, .. } = painted;
    Scene { image, objects, stuff, texts }
}
