//! Narrations: descriptions in several styles whose phrases are linked to objects and background.

use super::dice::Dice;
use super::facts::{Facts, PLACES, objects};
use super::questions::{enumerate, group_phrase};
use super::text::{Narration, SegmentRef, Text};

/// This many descriptions, each in another style while there are styles left.
pub(super) fn narrations(facts: &Facts, dice: &mut Dice, count: usize) -> Vec<Narration> {
    let mut styles: [fn(&Facts, &mut Dice) -> Text; 5] =
        [listed, placed, related, background_first, sentences];
    dice.shuffle(&mut styles);
    styles.iter().cycle().take(count).map(|style| style(facts, dice).sentence().narration()).collect()
}

/// "There is a dog, a cat and two books on grass."
fn listed(facts: &Facts, _: &mut Dice) -> Text {
    let text = enumerate(facts, &facts.groups().0);
    if facts.stuff.len() == 1 {
        on_background(facts, text.say(" ")).say(".")
    } else {
        background(facts, text.say("."))
    }
}

/// "In this picture there is a dog in the top left and a cat in the middle. The background is grass."
fn placed(facts: &Facts, dice: &mut Dice) -> Text {
    let mut text = Text::new();
    let mut order: Vec<usize> = facts.all().collect();
    order.sort_by(|&a, &b| facts.centre(a).0.total_cmp(&facts.centre(b).0));
    if dice.chance(0.5) {
        text = text.say("In this picture there is ");
    }
    for (k, &index) in order.iter().enumerate() {
        text = match k {
            0 => text,
            _ if k + 1 == order.len() => text.say(" and "),
            _ => text.say(", "),
        };
        text = at_place(facts, one(facts, text, index), index, " ");
    }
    if facts.stuff.len() == 1 && dice.chance(0.5) {
        on_background(facts, text.say(", ")).say(".")
    } else {
        background(facts, text.say("."))
    }
}

/// "The picture shows a dog to the left of a cat. There is a book below the cat. The background is grass."
fn related(facts: &Facts, dice: &mut Dice) -> Text {
    let mut order: Vec<usize> = facts.all().collect();
    dice.shuffle(&mut order);
    let mut text = Text::new().say("The picture shows ");
    let mut said: Vec<usize> = Vec::new();
    for &index in &order {
        if said.contains(&index) {
            continue;
        }
        if !said.is_empty() {
            text = text.say(" There is ");
        }
        // Relate to something that has been named and cannot be confused, else to something new.
        let known =
            said.iter().copied().find(|&b| facts.unique_name(b) && facts.relation(index, b).is_some());
        let fresh = order.iter().copied().find(|&b| {
            b != index && !said.contains(&b) && facts.relation(index, b).is_some() && known.is_none()
        });
        text = one(facts, text, index);
        said.push(index);
        if let Some((other, relation)) = known.or(fresh).and_then(|b| Some((b, facts.relation(index, b)?))) {
            text = text.say(&format!(" {} ", relation.words()));
            text = if known.is_some() {
                text.say("the ").link(&facts.name(other), objects(&[other]), true)
            } else {
                said.push(other);
                one(facts, text, other)
            };
        }
        text = text.say(".");
    }
    background(facts, text)
}

/// "Sky is above grass. There is a dog and a cat."
fn background_first(facts: &Facts, _: &mut Dice) -> Text {
    let name = |text: Text, region: usize| {
        let class = facts.stuff_class(region);
        text.say(class.article).link(class.name, vec![SegmentRef::Stuff(region)], true)
    };
    let text = name(Text::new(), 0);
    let text = if facts.stuff.len() == 2 {
        name(text.say(" is above "), 1)
    } else {
        text.say(" is in the background")
    };
    let list = enumerate(facts, &facts.groups().0);
    append(text.say(". "), list).say(".")
}

/// "A dog is in the top left. A cat is in the middle. The background is sky and grass."
fn sentences(facts: &Facts, dice: &mut Dice) -> Text {
    let mut text = Text::new();
    let mut groups = facts.groups().0;
    if dice.chance(0.5) {
        groups.reverse();
    }
    for group in &groups {
        if !text.text.is_empty() {
            text = text.say(" ");
        }
        let sentence = group_phrase(facts, Text::new(), group, true);
        let sentence = if let [index] = group[..] {
            let sentence = sentence.say(" is ");
            match facts.cell(index) {
                Some((column, row)) => sentence.say(PLACES[row][column]),
                None => sentence.say("in the picture"),
            }
        } else {
            sentence.say(" are in the picture")
        };
        text = append(text, sentence.sentence()).say(".");
    }
    background(facts, text)
}

/// "a dog"
fn one(facts: &Facts, text: Text, index: usize) -> Text {
    group_phrase(facts, text, &[index], true)
}

/// Says where an object is, if that is clear.
fn at_place(facts: &Facts, text: Text, index: usize, lead: &str) -> Text {
    match facts.cell(index) {
        Some((column, row)) => text.say(lead).say(PLACES[row][column]),
        None => text,
    }
}

/// " The background is sky and a road."
fn background(facts: &Facts, text: Text) -> Text {
    let mut text = text.say(" The background is ");
    for region in 0..facts.stuff.len() {
        let class = facts.stuff_class(region);
        text = if region > 0 { text.say(" and ") } else { text };
        text = text.say(class.article).link(class.name, vec![SegmentRef::Stuff(region)], true);
    }
    text.say(".")
}

/// "on grass", "in front of a wall": for scenes with one background region.
fn on_background(facts: &Facts, text: Text) -> Text {
    let class = facts.stuff_class(0);
    text.say(class.place).link(class.name, vec![SegmentRef::Stuff(0)], true)
}

/// Joins two texts, shifting the links of the second.
fn append(mut text: Text, other: Text) -> Text {
    let offset = text.text.len();
    text.text.push_str(&other.text);
    text.links.extend(other.links.into_iter().map(|mut link| {
        link.range = link.range.start + offset..link.range.end + offset;
        link
    }));
    text
}
