//! What things are for: the small table behind the reasoning questions.

use super::catalog::{Level, classes};

/// One use of things. The question is asked only where exactly one object of `yes` and none of `maybe` is present.
pub struct Affordance {
    /// The lowest level that asks it.
    pub level: Level,
    /// The question.
    pub question: &'static str,
    /// The answer before and after the noun phrase.
    pub answer: (&'static str, &'static str),
    /// Classes that qualify, by name.
    pub yes: &'static [&'static str],
    /// Classes about which one could argue.
    pub maybe: &'static [&'static str],
}

impl Affordance {
    /// Whether a class qualifies: `Some(true)` yes, `Some(false)` no, `None` arguable.
    pub fn applies(&self, class: usize) -> Option<bool> {
        let name = classes(Level::Two)[class].name;
        if self.yes.contains(&name) {
            Some(true)
        } else if self.maybe.contains(&name) {
            None
        } else {
            Some(false)
        }
    }
}

type Names = &'static [&'static str];

const fn one(
    question: &'static str,
    answer: (&'static str, &'static str),
    yes: Names,
    maybe: Names,
) -> Affordance {
    Affordance { level: Level::One, question, answer, yes, maybe }
}

const fn two(
    question: &'static str,
    answer: (&'static str, &'static str),
    yes: Names,
    maybe: Names,
) -> Affordance {
    Affordance { level: Level::Two, question, answer, yes, maybe }
}

/// Every affordance of a level.
pub fn affordances(level: Level) -> impl Iterator<Item = &'static Affordance> {
    AFFORDANCES.iter().filter(move |affordance| level == Level::Two || affordance.level == Level::One)
}

#[rustfmt::skip]
static AFFORDANCES: &[Affordance] = &[
    one("Which of these can bark?", ("The ", " can bark."), &["dog"], &[]),
    one("Which of these can purr?", ("The ", " can purr."), &["cat"], &[]),
    one("Which of these lives in water?", ("The ", " lives in water."), &["fish", "whale"], &["crab", "duck", "turtle", "penguin"]),
    one("Which of these can fly?", ("The ", " can fly."), &["bird", "butterfly", "bee", "owl", "duck", "plane", "rocket"], &["balloon", "robot"]),
    one("Which of these can you eat?", ("You can eat the ", "."), &["apple", "banana", "cake", "pizza", "carrot", "lemon", "strawberry"], &["fish", "mushroom", "crab", "cactus"]),
    one("Which of these can you read?", ("You can read the ", "."), &["book"], &["clock", "phone"]),
    one("Which of these can you drive?", ("You can drive the ", "."), &["car", "bus", "truck", "tractor"], &["train", "boat", "plane", "rocket"]),
    one("Which of these can you live in?", ("You can live in the ", "."), &["house"], &["tent", "boat"]),
    one("Which of these can you wear?", ("You can wear the ", "."), &["hat", "shirt", "shoe", "crown"], &["bag"]),
    one("Which of these can you drink from?", ("You can drink from the ", "."), &["cup"], &[]),
    one("Which of these can you kick?", ("You can kick the ", "."), &["ball"], &["balloon"]),
    one("Which of these can sail?", ("The ", " can sail."), &["boat"], &[]),
    one("Which of these gives shade in summer?", ("The ", " gives shade in summer."), &["tree"], &["umbrella", "tent", "house", "cactus"]),
    one("Which of these do bees like?", ("Bees like the ", "."), &["flower", "rose"], &["tree", "apple", "strawberry", "cactus", "bee"]),
    one("Which of these shines at night?", ("The ", " shines at night."), &["star"], &["candle", "house", "car"]),
    one("Which of these stands for love?", ("The ", " stands for love."), &["heart"], &["rose"]),
    two("Which of these could be used to hit a tennis ball?", ("The ", " could be used to hit a tennis ball."), &["racket"], &[]),
    two("Which of these could be used to hit a nail?", ("The ", " could be used to hit a nail."), &["hammer"], &["axe"]),
    two("Which of these could be used to open a door?", ("The ", " could be used to open a door."), &["key"], &["axe"]),
    two("Which of these could be used to cut wood?", ("The ", " could be used to cut wood."), &["axe"], &[]),
    two("Which of these could be used to take a photo?", ("The ", " could be used to take a photo."), &["camera"], &["robot"]),
    two("Which of these could be used to call a friend?", ("The ", " could be used to call a friend."), &["phone"], &["bell"]),
    two("Which of these could be used to reach the roof?", ("The ", " could be used to reach the roof."), &["ladder"], &["rocket", "plane", "chair"]),
    two("Which of these could be used to write a letter?", ("The ", " could be used to write a letter."), &["pen"], &[]),
    two("Which of these could keep you dry in the rain?", ("The ", " could keep you dry in the rain."), &["umbrella"], &["tent", "house", "hat", "car", "bus"]),
    two("Which of these tells the time?", ("The ", " tells the time."), &["clock"], &["phone", "bell"]),
    two("Which of these can you sit on?", ("You can sit on the ", "."), &["chair"], &["horse", "bicycle", "elephant"]),
    two("Which of these can make music?", ("The ", " can make music."), &["guitar", "violin", "drum", "trumpet"], &["bell", "bird", "phone"]),
    two("Which of these gives milk?", ("The ", " gives milk."), &["cow", "goat"], &[]),
    two("Which of these makes honey?", ("The ", " makes honey."), &["bee"], &[]),
    two("Which of these melts in the sun?", ("The ", " melts in the sun."), &["snowman"], &["candle", "cake"]),
    two("Which of these runs on rails?", ("The ", " runs on rails."), &["train"], &[]),
    two("Which of these can fly to the moon?", ("The ", " can fly to the moon."), &["rocket"], &[]),
    two("Which of these has a trunk?", ("The ", " has a trunk."), &["elephant"], &["tree", "car"]),
    two("Which of these can hop?", ("The ", " can hop."), &["rabbit"], &["bird"]),
    two("Which of these grows in the desert?", ("The ", " grows in the desert."), &["cactus"], &[]),
    two("Which of these can you sleep in?", ("You can sleep in the ", "."), &["tent"], &["house", "boat", "train", "bus", "car", "truck"]),
    two("Which of these can you blow out?", ("You can blow out the ", "."), &["candle"], &["cake"]),
    two("Which of these does a king wear?", ("A king wears the ", "."), &["crown"], &["shoe", "shirt", "hat"]),
    two("Which of these has two wheels?", ("The ", " has two wheels."), &["bicycle"], &[]),
];
