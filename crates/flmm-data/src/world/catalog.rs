//! What the world is made of: sprite classes with their words, colours and affordances, and "stuff" backgrounds.
//!
//! The words are chosen to be single, common and unambiguous: every class is one token of a word-level vocabulary.

use serde::{Deserialize, Serialize};
use twemoji_assets::svg::SvgTwemojiAsset;
use twemoji_assets::svg_twemoji_asset as svg;

/// How rich the scenes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// One to three well separated objects of sixteen classes.
    One,
    /// Two to six objects of more than sixty classes, with occlusion and copies.
    Two,
}

impl Level {
    /// 1 or 2, as on the command line.
    pub fn number(self) -> u8 {
        match self {
            Self::One => 1,
            Self::Two => 2,
        }
    }

    /// The level with this number, if there is one.
    pub fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::One),
            2 => Some(Self::Two),
            _ => None,
        }
    }
}

/// A named colour of a sprite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Colour {
    Red,
    Orange,
    Yellow,
    Green,
    Blue,
    Purple,
}

impl Colour {
    /// Every colour.
    pub const ALL: [Self; 6] = [Self::Red, Self::Orange, Self::Yellow, Self::Green, Self::Blue, Self::Purple];

    /// The English word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Red => "red",
            Self::Orange => "orange",
            Self::Yellow => "yellow",
            Self::Green => "green",
            Self::Blue => "blue",
            Self::Purple => "purple",
        }
    }
}

/// One picture of a class.
pub struct Sprite {
    /// The colour that texts name, for classes that come in several.
    pub colour: Option<Colour>,
    /// The Twemoji drawing.
    pub(super) svg: &'static SvgTwemojiAsset,
}

/// A class of countable things.
pub struct Class {
    /// Singular noun, one word.
    pub name: &'static str,
    /// Plural noun, one word.
    pub plural: &'static str,
    /// The lowest level whose scenes contain the class.
    pub level: Level,
    /// Its pictures. Either all of them have a colour or none has.
    pub sprites: &'static [Sprite],
}

impl Class {
    /// Whether texts name the colour of this class.
    pub fn coloured(&self) -> bool {
        self.sprites.iter().any(|sprite| sprite.colour.is_some())
    }

    /// The colours this class comes in; empty when its colour is not named.
    pub fn colours(&self) -> impl Iterator<Item = Colour> + '_ {
        self.sprites.iter().filter_map(|sprite| sprite.colour)
    }
}

macro_rules! sprites {
    ($($emoji:tt),+) => { &[$(Sprite { colour: None, svg: svg!($emoji) }),+] };
}
macro_rules! coloured {
    ($($colour:ident $emoji:tt),+) => { &[$(Sprite { colour: Some(Colour::$colour), svg: svg!($emoji) }),+] };
}
const fn class(name: &'static str, plural: &'static str, level: Level, sprites: &'static [Sprite]) -> Class {
    Class { name, plural, level, sprites }
}

/// Every class; those of level 1 come first, so that an index means the same on both levels.
static CLASSES: &[Class] = &[
    class("dog", "dogs", Level::One, sprites!["🐕"]),
    class("cat", "cats", Level::One, sprites!["🐈"]),
    class("fish", "fish", Level::One, sprites!["🐟"]),
    class("bird", "birds", Level::One, sprites!["🐦"]),
    class("tree", "trees", Level::One, sprites!["🌳"]),
    class("house", "houses", Level::One, sprites!["🏠"]),
    class("ball", "balls", Level::One, sprites!["⚽"]),
    class("star", "stars", Level::One, sprites!["⭐"]),
    class("flower", "flowers", Level::One, sprites!["🌻"]),
    class("boat", "boats", Level::One, sprites!["⛵"]),
    class("hat", "hats", Level::One, sprites!["🎩"]),
    class("cup", "cups", Level::One, sprites!["☕"]),
    class("apple", "apples", Level::One, coloured![Red "🍎", Green "🍏"]),
    class("book", "books", Level::One, coloured![Red "📕", Green "📗", Blue "📘", Orange "📙"]),
    class(
        "heart",
        "hearts",
        Level::One,
        coloured![Red "❤", Orange "🧡", Yellow "💛", Green "💚", Blue "💙", Purple "💜"],
    ),
    class("car", "cars", Level::One, coloured![Red "🚗", Blue "🚙", Yellow "🚕"]),
    class("horse", "horses", Level::Two, sprites!["🐎"]),
    class("cow", "cows", Level::Two, sprites!["🐄"]),
    class("pig", "pigs", Level::Two, sprites!["🐖"]),
    class("goat", "goats", Level::Two, sprites!["🐐"]),
    class("elephant", "elephants", Level::Two, sprites!["🐘"]),
    class("turtle", "turtles", Level::Two, sprites!["🐢"]),
    class("rabbit", "rabbits", Level::Two, sprites!["🐇"]),
    class("snail", "snails", Level::Two, sprites!["🐌"]),
    class("butterfly", "butterflies", Level::Two, sprites!["🦋"]),
    class("bee", "bees", Level::Two, sprites!["🐝"]),
    class("owl", "owls", Level::Two, sprites!["🦉"]),
    class("duck", "ducks", Level::Two, sprites!["🦆"]),
    class("penguin", "penguins", Level::Two, sprites!["🐧"]),
    class("crab", "crabs", Level::Two, sprites!["🦀"]),
    class("whale", "whales", Level::Two, sprites!["🐳"]),
    class("snake", "snakes", Level::Two, sprites!["🐍"]),
    class("bus", "buses", Level::Two, sprites!["🚌"]),
    class("truck", "trucks", Level::Two, sprites!["🚚"]),
    class("tractor", "tractors", Level::Two, sprites!["🚜"]),
    class("plane", "planes", Level::Two, sprites!["✈"]),
    class("rocket", "rockets", Level::Two, sprites!["🚀"]),
    class("bicycle", "bicycles", Level::Two, sprites!["🚲"]),
    class("train", "trains", Level::Two, sprites!["🚂"]),
    class("banana", "bananas", Level::Two, sprites!["🍌"]),
    class("cake", "cakes", Level::Two, sprites!["🎂"]),
    class("pizza", "pizzas", Level::Two, sprites!["🍕"]),
    class("carrot", "carrots", Level::Two, sprites!["🥕"]),
    class("lemon", "lemons", Level::Two, sprites!["🍋"]),
    class("strawberry", "strawberries", Level::Two, sprites!["🍓"]),
    class("mushroom", "mushrooms", Level::Two, sprites!["🍄"]),
    class("cactus", "cacti", Level::Two, sprites!["🌵"]),
    class("rose", "roses", Level::Two, sprites!["🌹"]),
    class("key", "keys", Level::Two, sprites!["🔑"]),
    class("clock", "clocks", Level::Two, sprites!["⏰"]),
    class("chair", "chairs", Level::Two, sprites!["🪑"]),
    class("umbrella", "umbrellas", Level::Two, sprites!["☂"]),
    class("guitar", "guitars", Level::Two, sprites!["🎸"]),
    class("violin", "violins", Level::Two, sprites!["🎻"]),
    class("drum", "drums", Level::Two, sprites!["🥁"]),
    class("racket", "rackets", Level::Two, sprites!["🏸"]),
    class("hammer", "hammers", Level::Two, sprites!["🔨"]),
    class("axe", "axes", Level::Two, sprites!["🪓"]),
    class("camera", "cameras", Level::Two, sprites!["📷"]),
    class("phone", "phones", Level::Two, sprites!["☎"]),
    class("balloon", "balloons", Level::Two, sprites!["🎈"]),
    class("crown", "crowns", Level::Two, sprites!["👑"]),
    class("shirt", "shirts", Level::Two, sprites!["👕"]),
    class("shoe", "shoes", Level::Two, sprites!["👟"]),
    class("bell", "bells", Level::Two, sprites!["🔔"]),
    class("candle", "candles", Level::Two, sprites!["🕯"]),
    class("snowman", "snowmen", Level::Two, sprites!["⛄"]),
    class("robot", "robots", Level::Two, sprites!["🤖"]),
    class("ladder", "ladders", Level::Two, sprites!["🪜"]),
    class("basket", "baskets", Level::Two, sprites!["🧺"]),
    class("tent", "tents", Level::Two, sprites!["⛺"]),
    class("trumpet", "trumpets", Level::Two, sprites!["🎺"]),
    class("pen", "pens", Level::Two, sprites!["🖊"]),
    class("bag", "bags", Level::Two, sprites!["👜"]),
    class("circle", "circles", Level::Two, coloured![Red "🔴", Green "🟢", Blue "🔵", Yellow "🟡"]),
    class("square", "squares", Level::Two, coloured![Red "🟥", Green "🟩", Blue "🟦", Yellow "🟨"]),
];

/// How many of [`CLASSES`] belong to level 1; a test checks that they come first.
const LEVEL_ONE: usize = 16;

/// The classes whose sprites appear on a level. An index means the same class on every level.
pub fn classes(level: Level) -> &'static [Class] {
    match level {
        Level::One => &CLASSES[..LEVEL_ONE],
        Level::Two => CLASSES,
    }
}

/// A background material: uncountable "stuff" with a mask of its own.
pub struct StuffClass {
    /// The noun.
    pub name: &'static str,
    /// What stands before the noun where it is first named: nothing or `"a "`.
    pub article: &'static str,
    /// Says where objects are when this is the whole background, e.g. `"on "` or `"in front of a "`.
    pub place: &'static str,
}

const fn stuff(name: &'static str, article: &'static str, place: &'static str) -> StuffClass {
    StuffClass { name, article, place }
}

/// Indices into [`stuff_classes`], for the code that paints them.
#[allow(missing_docs)]
pub(super) mod stuff_index {
    pub(in crate::world) const GRASS: usize = 0;
    pub(in crate::world) const SAND: usize = 1;
    pub(in crate::world) const SKY: usize = 2;
    pub(in crate::world) const WATER: usize = 3;
    pub(in crate::world) const SNOW: usize = 4;
    pub(in crate::world) const ROAD: usize = 5;
    pub(in crate::world) const WALL: usize = 6;
}

/// The background materials, the same on both levels.
pub fn stuff_classes() -> &'static [StuffClass] {
    static STUFF: [StuffClass; 7] = [
        stuff("grass", "", "on "),
        stuff("sand", "", "on "),
        stuff("sky", "", "in front of "),
        stuff("water", "", "on "),
        stuff("snow", "", "on "),
        stuff("road", "a ", "on a "),
        stuff("wall", "a ", "in front of a "),
    ];
    &STUFF
}
