//! Referring expressions: words that mean exactly one object of the scene.

use super::dice::Dice;
use super::facts::{Facts, PLACES, Relation, Truth};
use super::text::{Referring, ReferringKind as Kind};

/// Most alternatives that are kept beside the chosen expression.
const MOST_ALTERNATIVES: usize = 5;

/// One expression for every object that can be singled out.
pub(super) fn referring(facts: &Facts, dice: &mut Dice) -> Vec<Referring> {
    facts.all().filter_map(|target| refer(facts, dice, target)).collect()
}

fn refer(facts: &Facts, dice: &mut Dice, target: usize) -> Option<Referring> {
    let mut found = expressions(facts, target);
    // The shortest expressions are the usual ones; the others keep a fair share.
    let weight = |kind: &Kind| match kind {
        Kind::Class | Kind::Colour => 3.0,
        Kind::Position | Kind::Region => 1.5,
        Kind::Size | Kind::Relation => 1.0,
    };
    if found.is_empty() {
        return None;
    }
    let weights: Vec<f64> = found.iter().map(|(kind, _)| weight(kind)).collect();
    let (kind, text) = found.swap_remove(dice.weighted(&weights));
    dice.shuffle(&mut found);
    found.truncate(MOST_ALTERNATIVES);
    let alternatives = found.into_iter().map(|(_, text)| text).collect();
    Some(Referring { text, target, kind, alternatives })
}

/// Every expression that means `target` and nothing else.
fn expressions(facts: &Facts, target: usize) -> Vec<(Kind, String)> {
    let mut found = Vec::new();
    let (noun, name) = (facts.noun(target), facts.name(target));
    if facts.unique_class(target) {
        found.push((Kind::Class, format!("the {noun}")));
    }
    if facts.objects[target].colour.is_some() && facts.unique_name(target) {
        found.push((Kind::Colour, format!("the {name}")));
    }
    // What else is needed is needed among those that share the noun (or colour and noun).
    let rivals: Vec<usize> = facts.same_class(target).into_iter().filter(|&i| i != target).collect();
    let with_colour = !rivals.is_empty() && rivals.iter().any(|&i| facts.name(i) == name);
    let (words, rivals) = match facts.objects[target].colour {
        Some(_) if with_colour => {
            (name.as_str(), rivals.into_iter().filter(|&i| facts.name(i) == name).collect::<Vec<_>>())
        }
        _ => (noun, rivals),
    };
    if !rivals.is_empty() {
        position(facts, target, words, &rivals, &mut found);
        size(facts, target, words, &rivals, &mut found);
    }
    if let Some((column, row)) = facts.cell(target) {
        let elsewhere = |&i: &usize| facts.at_place(i, (column, row)) == Truth::No;
        if rivals.iter().all(elsewhere) {
            let text = format!("the {words} {}", PLACES[row][column]);
            // The edges read the same as positions among rivals: keep one of the two.
            if !found.iter().any(|(_, other)| *other == text) {
                found.push((Kind::Region, text));
            }
        }
    }
    for landmark in facts.others(target).filter(|&i| facts.unique_name(i)) {
        if let Some(relation) = facts.relation(target, landmark)
            && rivals.iter().all(|&i| i != landmark && facts.related(i, relation, landmark) == Truth::No)
        {
            let text = format!("the {words} {} the {}", relation.words(), facts.name(landmark));
            found.push((Kind::Relation, text));
        }
    }
    let all: Vec<usize> = facts.all().collect();
    if all.len() >= 2 {
        if facts.extreme(&all, |a, b| facts.larger(a, b)) == Some(target) {
            found.push((Kind::Size, "the largest object".to_owned()));
        }
        if facts.extreme(&all, |a, b| facts.larger(b, a)) == Some(target) {
            found.push((Kind::Size, "the smallest object".to_owned()));
        }
    }
    found
}

/// "the dog on the left", "the top dog": clear against every rival.
fn position(facts: &Facts, target: usize, words: &str, rivals: &[usize], found: &mut Vec<(Kind, String)>) {
    for (relation, text) in [
        (Relation::Left, format!("the {words} on the left")),
        (Relation::Right, format!("the {words} on the right")),
        (Relation::Above, format!("the top {words}")),
        (Relation::Below, format!("the bottom {words}")),
    ] {
        if rivals.iter().all(|&rival| facts.related(target, relation, rival) == Truth::Yes) {
            found.push((Kind::Position, text));
        }
    }
}

/// "the larger cat" of two, "the largest cat" of more.
fn size(facts: &Facts, target: usize, words: &str, rivals: &[usize], found: &mut Vec<(Kind, String)>) {
    let (larger, smaller) = if rivals.len() == 1 { ("larger", "smaller") } else { ("largest", "smallest") };
    if rivals.iter().all(|&rival| facts.larger(target, rival)) {
        found.push((Kind::Size, format!("the {larger} {words}")));
    }
    if rivals.iter().all(|&rival| facts.larger(rival, target)) {
        found.push((Kind::Size, format!("the {smaller} {words}")));
    }
}
