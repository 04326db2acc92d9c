//! Questions with their answers. A question is asked only where its answer is beyond doubt.

use super::affordances::affordances;
use super::catalog::{Level, classes, stuff_classes};
use super::dice::Dice;
use super::facts::{Facts, NUMBERS, PLACES, Relation, Truth, objects};
use super::text::{Question, QuestionKind as Kind, SegmentRef, Text, article};

/// All kinds of questions about a scene, at most `per_kind` of each, in random order.
pub(super) fn questions(facts: &Facts, dice: &mut Dice, per_kind: usize) -> Vec<Question> {
    let mut all = exist(facts, dice, per_kind);
    all.push(background(facts));
    all.push(list(facts, dice));
    let makers: [fn(&Facts, &mut Dice) -> Vec<Question>; 8] =
        [count, what_in, places, relations, relations_yes_no, sizes, colours, which];
    for make in makers {
        let found = make(facts, dice);
        keep_some(dice, found, per_kind, &mut all);
    }
    if facts.level == Level::Two {
        let found = behind(facts, dice);
        keep_some(dice, found, per_kind, &mut all);
    }
    dice.shuffle(&mut all);
    all
}

fn keep_some(dice: &mut Dice, mut found: Vec<Question>, most: usize, all: &mut Vec<Question>) {
    dice.shuffle(&mut found);
    found.truncate(most);
    all.append(&mut found);
}

/// Words that mean object `index` alone and can follow "the": its class, or colour and class.
pub(super) fn mention(facts: &Facts, dice: &mut Dice, index: usize) -> Option<String> {
    if facts.unique_class(index) && !(facts.objects[index].colour.is_some() && dice.chance(0.4)) {
        Some(facts.noun(index).to_owned())
    } else if facts.unique_name(index) {
        Some(facts.name(index))
    } else {
        None
    }
}

/// As many "yes" as "no": objects, colours, sometimes the background.
fn exist(facts: &Facts, dice: &mut Dice, per_kind: usize) -> Vec<Question> {
    let mut order: Vec<usize> = facts.all().collect();
    dice.shuffle(&mut order);
    let mut asked: Vec<String> = Vec::new();
    let mut out = Vec::new();
    for index in order {
        if out.len() == per_kind {
            break;
        }
        let by_name = facts.objects[index].colour.is_some() && dice.chance(0.4);
        let same = if by_name { facts.same_name(index) } else { facts.same_class(index) };
        let (one, many) = if by_name {
            (facts.name(index), facts.names(index))
        } else {
            (facts.noun(index).to_owned(), facts.objects[index].class().plural.to_owned())
        };
        if asked.contains(&one) {
            continue;
        }
        let question = format!("Is there {}{one}?", article(&one));
        let answer = if same.len() == 1 {
            Text::new().say("Yes, there is ").article(&one).link(&one, objects(&same), false)
        } else {
            let phrase = format!("{} {many}", NUMBERS[same.len()]);
            Text::new().say("Yes, there are ").link(&phrase, objects(&same), false)
        };
        out.push(answer.say(".").answer(Kind::Exist, question, true));
        asked.push(one);
    }
    if dice.chance(0.25) {
        let region = dice.below(facts.stuff.len());
        let class = facts.stuff_class(region);
        let answer = Text::new().say("Yes, there is ").say(class.article);
        let answer = answer.link(class.name, vec![SegmentRef::Stuff(region)], false).say(".");
        out.push(answer.answer(Kind::Exist, format!("Is there {}{}?", class.article, class.name), true));
        dice.shuffle(&mut out);
        out.truncate(per_kind.max(1));
    }
    for _ in 0..out.len() {
        let (given, absent) = absent(facts, dice, &asked);
        let question = format!("Is there {given}{absent}?");
        out.push(Text::new().say(&format!("No, there is no {absent}.")).answer(Kind::Exist, question, true));
        asked.push(absent);
    }
    out
}

/// Something that the scene does not contain, with its article: a class, a colour of a class, or a background.
fn absent(facts: &Facts, dice: &mut Dice, asked: &[String]) -> (&'static str, String) {
    loop {
        if dice.chance(0.12) {
            let class = dice.pick(stuff_classes());
            if facts.stuff.iter().all(|region| stuff_classes()[region.class].name != class.name) {
                return (class.article, class.name.to_owned());
            }
            continue;
        }
        // A wrong colour of something that is there is the interesting case.
        let class = if dice.chance(0.25) {
            facts.objects[dice.below(facts.objects.len())].class
        } else {
            dice.below(classes(facts.level).len())
        };
        let present = |colour| {
            facts.objects.iter().any(|o| o.class == class && (colour == o.colour || Option::is_none(&colour)))
        };
        let colours: Vec<_> = classes(facts.level)[class].colours().collect();
        let name = classes(facts.level)[class].name;
        let name = if !colours.is_empty() && dice.chance(0.5) {
            let colour = *dice.pick(&colours);
            if present(Some(colour)) {
                continue;
            }
            format!("{} {name}", colour.name())
        } else if present(None) {
            continue;
        } else {
            name.to_owned()
        };
        if !asked.contains(&name) {
            return (article(&name), name);
        }
    }
}

fn count(facts: &Facts, dice: &mut Dice) -> Vec<Question> {
    let ask = |many: &str, one: &str, found: &[usize]| {
        let question = format!("How many {many} are there?");
        let text = match found.len() {
            0 => Text::new().say(&format!("There are no {many}")),
            1 => Text::new().say("There is ").link(&format!("one {one}"), objects(found), false),
            n => Text::new().say("There are ").link(&format!("{} {many}", NUMBERS[n]), objects(found), false),
        };
        text.say(".").answer(Kind::Count, question, true)
    };
    let mut out = Vec::new();
    let copies = facts.all().any(|index| !facts.unique_class(index));
    for index in facts.all() {
        let same = facts.same_class(index);
        // Where there are copies, they are what is asked for.
        if same[0] == index && (same.len() > 1 || !copies) {
            out.push(ask(facts.objects[index].class().plural, facts.noun(index), &same));
        }
        if facts.same_name(index)[0] == index && facts.objects[index].colour.is_some() && dice.chance(0.3) {
            out.push(ask(&facts.names(index), &facts.name(index), &facts.same_name(index)));
        }
    }
    if dice.chance(0.12) {
        let class = dice.below(classes(facts.level).len());
        if facts.objects.iter().all(|object| object.class != class) {
            out = vec![ask(classes(facts.level)[class].plural, "", &[])];
        }
    }
    out
}

fn what_in(facts: &Facts, _: &mut Dice) -> Vec<Question> {
    let mut out = Vec::new();
    for (row, words) in PLACES.iter().enumerate() {
        for (column, place) in words.iter().enumerate() {
            if let Some(only) = facts.only(facts.all(), |index| facts.at_place(index, (column, row))) {
                let name = facts.name(only);
                let answer = Text::new().article(&name).link(&name, objects(&[only]), true);
                let answer = answer.say(&format!(" is {place}."));
                out.push(answer.answer(Kind::WhatIn, format!("What is {place}?"), true));
            }
        }
    }
    out
}

fn places(facts: &Facts, dice: &mut Dice) -> Vec<Question> {
    let mut out = Vec::new();
    for index in facts.all() {
        if let (Some((column, row)), Some(words)) = (facts.cell(index), mention(facts, dice, index)) {
            let answer = Text::new().say("The ").link(&words, objects(&[index]), false);
            let answer = answer.say(&format!(" is {}.", PLACES[row][column]));
            out.push(answer.answer(Kind::Where, format!("Where is the {words}?"), true));
        }
    }
    out
}

fn relations(facts: &Facts, dice: &mut Dice) -> Vec<Question> {
    let mut out = Vec::new();
    for landmark in facts.all() {
        let Some(words) = mention(facts, dice, landmark) else { continue };
        for relation in Relation::ALL {
            let Some(found) = facts.matches(facts.others(landmark), |a| facts.related(a, relation, landmark))
            else {
                continue;
            };
            let relation = relation.words();
            let text = match found[..] {
                // Nothing there: true in every scene, so it is asked rarely.
                [] if dice.chance(0.06) => Text::new().say("Nothing"),
                [a] => {
                    let (name, new) = (facts.name(a), facts.noun(a) != facts.noun(landmark));
                    Text::new().article(&name).link(&name, objects(&[a]), new)
                }
                _ => continue,
            };
            let answer = text.say(&format!(" is {relation} the "));
            let answer = answer.link(&words, objects(&[landmark]), false).say(".");
            out.push(answer.answer(Kind::Rel, format!("What is {relation} the {words}?"), true));
        }
    }
    out
}

fn relations_yes_no(facts: &Facts, dice: &mut Dice) -> Vec<Question> {
    let mut out = Vec::new();
    for a in facts.all() {
        for b in facts.others(a) {
            let Some(relation) = facts.relation(a, b) else { continue };
            let (Some(words_a), Some(words_b)) = (mention(facts, dice, a), mention(facts, dice, b)) else {
                continue;
            };
            let asked = if dice.chance(0.5) {
                relation
            } else if dice.chance(0.75) {
                relation.opposite()
            } else {
                *dice.pick(&Relation::ALL)
            };
            let start = match facts.related(a, asked, b) {
                Truth::Yes => "Yes, the ",
                Truth::No => "No, the ",
                Truth::Unclear => continue,
            };
            let answer = Text::new().say(start).link(&words_a, objects(&[a]), false);
            let answer = answer.say(&format!(" is {} the ", relation.words()));
            let answer = answer.link(&words_b, objects(&[b]), false).say(".");
            let question = format!("Is the {words_a} {} the {words_b}?", asked.words());
            out.push(answer.answer(Kind::RelYesNo, question, true));
        }
    }
    out
}

fn sizes(facts: &Facts, _: &mut Dice) -> Vec<Question> {
    let all: Vec<usize> = facts.all().collect();
    let mut out = Vec::new();
    if all.len() < 2 {
        return out;
    }
    let largest = facts.extreme(&all, |a, b| facts.larger(a, b));
    let smallest = facts.extreme(&all, |a, b| facts.larger(b, a));
    for (found, word, kind) in [(largest, "largest", Kind::Largest), (smallest, "smallest", Kind::Smallest)] {
        if let Some(index) = found.filter(|&index| facts.unique_name(index)) {
            let answer = Text::new().say("The ").link(&facts.name(index), objects(&[index]), true);
            let question = format!("Which object is the {word}?");
            out.push(answer.say(&format!(" is the {word}.")).answer(kind, question, true));
        }
    }
    out
}

fn colours(facts: &Facts, _: &mut Dice) -> Vec<Question> {
    let unique = facts.all().filter(|&index| facts.unique_class(index));
    let coloured = unique.filter_map(|index| Some((index, facts.objects[index].colour?.name())));
    let ask = |(index, colour): (usize, &str)| {
        let noun = facts.noun(index);
        let answer =
            Text::new().say("The ").link(noun, objects(&[index]), false).say(&format!(" is {colour}."));
        answer.answer(Kind::Colour, format!("What colour is the {noun}?"), true)
    };
    coloured.map(ask).collect()
}

/// Choices between two objects, of different classes or of different colours of one class.
fn which(facts: &Facts, dice: &mut Dice) -> Vec<Question> {
    let mut out = Vec::new();
    for a in facts.all() {
        for b in facts.others(a) {
            let words = if facts.larger(a, b) && dice.chance(0.5) {
                "larger"
            } else if facts.related(a, Relation::Left, b) == Truth::Yes {
                "on the left"
            } else if facts.related(a, Relation::Right, b) == Truth::Yes {
                "on the right"
            } else {
                continue;
            };
            let pair = facts.same_class(a);
            let (question, name) = if pair.len() == 2 && pair.contains(&b) && facts.unique_name(a) {
                (format!("Which {} is {words}?", facts.noun(a)), facts.name(a))
            } else if let (Some(name_a), Some(name_b)) = (mention(facts, dice, a), mention(facts, dice, b)) {
                let (first, second) = if dice.chance(0.5) { (&name_a, &name_b) } else { (&name_b, &name_a) };
                (format!("Which is {words}, the {first} or the {second}?"), name_a)
            } else {
                continue;
            };
            let answer =
                Text::new().say("The ").link(&name, objects(&[a]), false).say(&format!(" is {words}."));
            out.push(answer.answer(Kind::Which, question, true));
        }
    }
    out
}

fn background(facts: &Facts) -> Question {
    let mut answer = Text::new().say("There is ");
    for region in 0..facts.stuff.len() {
        let class = facts.stuff_class(region);
        let answer_so_far = if region > 0 { answer.say(" and ") } else { answer };
        answer = answer_so_far.say(class.article).link(class.name, vec![SegmentRef::Stuff(region)], true);
    }
    answer.say(".").answer(Kind::WhatBackground, "What is in the background?".into(), true)
}

fn list(facts: &Facts, dice: &mut Dice) -> Question {
    let (groups, clear) = facts.groups();
    let question = *dice.pick(&["What is in the picture?", "What do you see?"]);
    enumerate(facts, &groups).say(".").answer(Kind::List, question.into(), clear)
}

/// "There is a dog, a cat and two books", links included, without the full stop.
pub(super) fn enumerate(facts: &Facts, groups: &[Vec<usize>]) -> Text {
    let plural = groups.first().is_some_and(|group| group.len() > 1);
    let mut text = Text::new().say(if plural { "There are " } else { "There is " });
    for (k, group) in groups.iter().enumerate() {
        text = match k {
            0 => text,
            _ if k + 1 == groups.len() => text.say(" and "),
            _ => text.say(", "),
        };
        text = group_phrase(facts, text, group, true);
    }
    text
}

/// "a dog" or "two red books".
pub(super) fn group_phrase(facts: &Facts, text: Text, group: &[usize], from_image: bool) -> Text {
    if let [only] = group {
        let name = facts.name(*only);
        text.article(&name).link(&name, objects(group), from_image)
    } else {
        let phrase = format!("{} {}", NUMBERS[group.len()], facts.names(group[0]));
        text.link(&phrase, objects(group), from_image)
    }
}

fn behind(facts: &Facts, dice: &mut Dice) -> Vec<Question> {
    let mut out = Vec::new();
    for landmark in facts.all() {
        let Some(words) = mention(facts, dice, landmark) else { continue };
        let hidden = facts.only(facts.others(landmark), |a| facts.behind(a, landmark));
        let hiding = facts.only(facts.others(landmark), |a| facts.behind(landmark, a));
        for (found, relation) in [(hidden, "behind"), (hiding, "in front of")] {
            let Some(a) = found else { continue };
            let (name, new) = (facts.name(a), facts.noun(a) != facts.noun(landmark));
            let answer = Text::new().article(&name).link(&name, objects(&[a]), new);
            let answer = answer.say(&format!(" is {relation} the "));
            let answer = answer.link(&words, objects(&[landmark]), false).say(".");
            out.push(answer.answer(Kind::Behind, format!("What is {relation} the {words}?"), true));
        }
    }
    out
}

/// Questions about what things are for, where exactly one object qualifies.
pub(super) fn reasoning(facts: &Facts) -> Vec<Question> {
    let mut out = Vec::new();
    for affordance in affordances(facts.level) {
        let judge = |index: usize| match affordance.applies(facts.objects[index].class) {
            Some(true) => Truth::Yes,
            Some(false) => Truth::No,
            None => Truth::Unclear,
        };
        if let Some(index) = facts.only(facts.all(), judge) {
            let (before, after) = affordance.answer;
            let answer = Text::new().say(before).link(&facts.name(index), objects(&[index]), true).say(after);
            out.push(answer.answer(Kind::Reason, affordance.question.to_owned(), true));
        }
    }
    out
}
