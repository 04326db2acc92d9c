//! Every word of the world's language in typical surroundings, for training a tokenizer.

use super::affordances::affordances;
use super::catalog::{Colour, Level, classes, stuff_classes};
use super::facts::{NUMBERS, PLACES, Relation};
use super::text::article;

/// Texts that contain every word and form that scenes of a level can say, including questions, answers, narrations
/// and referring expressions. A test checks this against generated scenes.
pub fn vocabulary_texts(level: Level) -> impl Iterator<Item = String> {
    let mut texts: Vec<String> = Vec::new();
    for class in classes(level) {
        let (name, plural) = (class.name, class.plural);
        let mut names = vec![(name.to_owned(), plural.to_owned())];
        for colour in class.colours() {
            names.push((format!("{} {name}", colour.name()), format!("{} {plural}", colour.name())));
            texts.push(format!("The {name} is {}.", colour.name()));
        }
        for (one, many) in names {
            let a = article(&one);
            texts.push(format!("Is there {a}{one}?"));
            texts.push(format!("Yes, there is {a}{one}."));
            texts.push(format!("No, there is no {one}."));
            texts.push(format!("How many {many} are there?"));
            texts.push(format!("There is one {one}."));
            texts.push(format!("There is {a}{one} and {a}{one}, {a}{one}."));
            texts.push(format!("What colour is the {one}? Where is the {one}?"));
            texts.push(format!("Which {one} is larger? Which is larger, the {one} or the {one}?"));
            texts.push(capital(&format!("{a}{one} is in the middle.")));
            texts.push(format!("The {one} is the largest. The {one} is the smallest."));
            texts.push(format!(
                "the {one}, the top {one}, the bottom {one}, the larger {one}, the smaller {one}"
            ));
            texts.push(format!("the largest {one}, the smallest {one}"));
            let most = if level == Level::One { 3 } else { 6 };
            for (n, number) in NUMBERS.iter().enumerate().take(most + 1) {
                if n != 1 {
                    texts.push(format!("There are {number} {many}."));
                    texts.push(capital(&format!("{number} {many} are in the picture.")));
                }
            }
            for relation in Relation::ALL {
                let relation = relation.words();
                texts.push(format!("What is {relation} the {one}? Is the {one} {relation} the {one}?"));
                texts.push(format!("Yes, the {one} is {relation} the {one}."));
                texts.push(format!("Nothing is {relation} the {one}. {}", capital(&format!("{a}{one}."))));
            }
            if level == Level::Two {
                texts.push(format!("What is behind the {one}? What is in front of the {one}?"));
            }
        }
    }
    for place in PLACES.iter().flatten() {
        texts.push(format!("What is {place}? Which is {place}? There is a dog {place}, a cat {place}."));
    }
    for stuff in stuff_classes() {
        let named = format!("{}{}", stuff.article, stuff.name);
        texts.push(format!("Is there {named}? Yes, there is {named}. No, there is no {}.", stuff.name));
        texts.push(format!("There is {named} and {named}. The background is {named}."));
        texts.push(format!(
            "There is a dog {}{}. {} is above {named}.",
            stuff.place,
            stuff.name,
            capital(&named)
        ));
        texts.push(format!("{} is in the background.", capital(&named)));
    }
    for affordance in affordances(level) {
        let (before, after) = affordance.answer;
        texts.push(format!("{} {before}dog{after}", affordance.question));
    }
    for colour in Colour::ALL {
        texts.push(format!("The book is {}.", colour.name()));
    }
    for fixed in [
        "What is in the background?",
        "What is in the picture? What do you see?",
        "Which object is the largest? Which object is the smallest?",
        "the largest object, the smallest object",
        "In this picture there is a dog and a cat. The picture shows a dog. There is a cat.",
    ] {
        texts.push(fixed.to_owned());
    }
    texts.into_iter()
}

fn capital(text: &str) -> String {
    let mut text = text.to_owned();
    if let Some(first) = text.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    text
}
