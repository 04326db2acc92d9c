//! The world's questions in the published formats of the question-answering benchmarks, one format each, so that every
//! reader is exercised (`evaluation.md` §6). Splits for training have none.

use super::records::Record;
use super::text::{Question, QuestionKind as Kind};
use super::write::{link, make_folder, write_file, write_json};
use super::{Level, classes};
use crate::qa::write::{Column, base64, parquet, tsv};
use flmm::Result;
use serde_json::{Map, Value, json};
use std::path::Path;

/// Options of a choice.
const OPTIONS: usize = 4;
/// Rows of a Parquet group: small, so that tables have several.
const ROWS_PER_GROUP: usize = 16;
const YES_NO: &str = " Please answer yes or no.";

/// Writes all benchmarks below `folder` for `records`, whose pictures lie in `pictures`; those that POPE and VQAv2 refer to
/// by name must be in `OUT/coco/val2014`.
pub(super) fn write(folder: &Path, pictures: &Path, level: Level, records: &[Record]) -> Result<()> {
    for name in [
        "pope",
        "mme/data",
        "gqa/images",
        "vqav2",
        "ai2d/data",
        "mmbench",
        "mmvet/images",
        "llavabench/images",
    ] {
        make_folder(&folder.join(name))?;
    }
    pope(&folder.join("pope"), records)?;
    mme(&folder.join("mme"), records)?;
    gqa(&folder.join("gqa"), pictures, records)?;
    vqa(&folder.join("vqav2"), records)?;
    ai2d(&folder.join("ai2d"), level, records)?;
    mmbench(&folder.join("mmbench"), level, records)?;
    mm_vet(&folder.join("mmvet"), pictures, records)?;
    llava_bench(&folder.join("llavabench"), pictures, records)
}

/// All questions of some kinds with the record they are about.
fn of_kinds<'a>(
    records: &'a [Record],
    kinds: &'a [Kind],
) -> impl Iterator<Item = (&'a Record, &'a Question)> {
    let wanted = |question: &&Question| kinds.contains(&question.kind);
    records.iter().flat_map(move |r| r.questions.iter().filter(wanted).map(move |q| (r, q)))
}

fn says_yes(question: &Question) -> bool {
    question.answer.starts_with("Yes")
}

fn yes_or_no(question: &Question) -> &'static str {
    if says_yes(question) { "yes" } else { "no" }
}

/// The answer in a word or phrase.
fn short(question: &Question) -> Option<String> {
    let answer = match question.kind {
        Kind::Exist | Kind::RelYesNo => yes_or_no(question).to_owned(),
        Kind::Colour => question.answer.split_once(" is ")?.1.trim_end_matches('.').to_owned(),
        Kind::Count => match question.links.first() {
            Some(link) => question.answer.get(link.range.clone())?.split(' ').next()?.to_owned(),
            None => "0".to_owned(),
        },
        Kind::WhatIn | Kind::Largest | Kind::Smallest => {
            question.answer.get(question.links.first()?.range.clone())?.to_owned()
        }
        _ => return None,
    };
    Some(answer)
}

fn lines(path: &Path, values: &[Value]) -> Result<()> {
    write_file(path, values.iter().map(|value| format!("{value}\n")).collect::<String>().as_bytes())
}

fn pope(folder: &Path, records: &[Record]) -> Result<()> {
    let mut sets = [Vec::new(), Vec::new(), Vec::new()];
    for (number, (record, question)) in of_kinds(records, &[Kind::Exist]).enumerate() {
        let set = &mut sets[number % 3];
        set.push(json!({
            "question_id": set.len() + 1,
            "image": record.picture_name_val2014(),
            "text": question.question,
            "label": yes_or_no(question),
        }));
    }
    for (name, set) in ["random", "popular", "adversarial"].iter().zip(&sets) {
        lines(&folder.join(format!("coco_pope_{name}.json")), set)?;
    }
    Ok(())
}

/// A Parquet table: per picture and sub-task one question with "yes" and one with "no".
fn mme(folder: &Path, records: &[Record]) -> Result<()> {
    let (mut ids, mut categories, mut questions, mut answers, mut pictures) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (category, kind) in [("existence", Kind::Exist), ("position", Kind::RelYesNo)] {
        for record in records {
            let first = |yes| record.questions.iter().find(|q| q.kind == kind && says_yes(q) == yes);
            let (Some(yes), Some(no)) = (first(true), first(false)) else { continue };
            for (question, answer) in [(yes, "Yes"), (no, "No")] {
                ids.push(format!("{category}/{}", record.picture_name()));
                categories.push(category.to_owned());
                questions.push(question.question.clone() + YES_NO);
                answers.push(answer.to_owned());
                pictures.push(record.jpeg.clone());
            }
        }
    }
    let columns = [
        ("question_id", Column::Texts(ids)),
        ("image", Column::Pictures(pictures)),
        ("question", Column::Texts(questions)),
        ("answer", Column::Texts(answers)),
        ("category", Column::Texts(categories)),
    ];
    write_file(&folder.join("data/test-00000-of-00001.parquet"), &parquet(&columns, ROWS_PER_GROUP)?)
}

fn gqa(folder: &Path, pictures: &Path, records: &[Record]) -> Result<()> {
    let mut entries = Map::new();
    for (record, question) in of_kinds(records, &[Kind::Colour, Kind::WhatIn, Kind::RelYesNo]) {
        let Some(answer) = short(question) else { continue };
        let image = record.image_id.to_string();
        link(&pictures.join(record.picture_name()), &folder.join("images").join(format!("{image}.jpg")))?;
        let entry = json!({
            "imageId": image,
            "question": question.question,
            "answer": answer,
            "fullAnswer": question.answer,
        });
        entries.insert(format!("{}", entries.len() + 1), entry);
    }
    write_json(&folder.join("testdev_balanced_questions.json"), &entries)
}

fn vqa(folder: &Path, records: &[Record]) -> Result<()> {
    let (mut questions, mut annotations) = (Vec::new(), Vec::new());
    for (record, question) in of_kinds(records, &[Kind::Exist, Kind::Count, Kind::Colour]) {
        let Some(answer) = short(question) else { continue };
        let id = record.image_id * 1000 + questions.len() as u64;
        questions
            .push(json!({ "image_id": record.image_id, "question": question.question, "question_id": id }));
        let answers: Vec<Value> = (1..=10)
            .map(|n| json!({ "answer": answer, "answer_confidence": "yes", "answer_id": n }))
            .collect();
        annotations.push(json!({
            "image_id": record.image_id,
            "question_id": id,
            "multiple_choice_answer": answer,
            "answers": answers,
        }));
    }
    write_json(
        &folder.join("v2_OpenEnded_mscoco_val2014_questions.json"),
        &json!({ "questions": questions }),
    )?;
    write_json(&folder.join("v2_mscoco_val2014_annotations.json"), &json!({ "annotations": annotations }))
}

/// The right option and others from classes that are not in the picture; which place the right one has.
fn options(
    level: Level,
    record: &Record,
    question: &Question,
    number: usize,
) -> Option<(Vec<String>, usize)> {
    let right = short(question)?;
    let present = |class: usize| record.instances.iter().any(|object| object.category_id == class as u64 + 1);
    let count = classes(level).len();
    // Another run of classes for every question.
    let others = (0..count).map(|step| (number * 7 + step) % count).filter(|&class| !present(class));
    let mut options: Vec<String> =
        others.take(OPTIONS - 1).map(|class| classes(level)[class].name.to_owned()).collect();
    let place = number % (options.len() + 1);
    options.insert(place, right);
    Some((options, place))
}

fn ai2d(folder: &Path, level: Level, records: &[Record]) -> Result<()> {
    let (mut questions, mut all_options, mut answers, mut pictures) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (number, (record, question)) in of_kinds(records, &[Kind::Largest, Kind::Smallest]).enumerate() {
        let Some((options, place)) = options(level, record, question, number) else { continue };
        questions.push(question.question.clone());
        all_options.push(options);
        answers.push(place.to_string());
        pictures.push(record.jpeg.clone());
    }
    let columns = [
        ("question", Column::Texts(questions)),
        ("options", Column::Lists(all_options)),
        ("answer", Column::Texts(answers)),
        ("image", Column::Pictures(pictures)),
    ];
    write_file(&folder.join("data/test-00000-of-00001.parquet"), &parquet(&columns, ROWS_PER_GROUP)?)
}

/// A TSV with every item in all rotations of its options.
fn mmbench(folder: &Path, level: Level, records: &[Record]) -> Result<()> {
    let header = [
        "index",
        "question",
        "hint",
        "A",
        "B",
        "C",
        "D",
        "answer",
        "category",
        "image",
        "l2-category",
        "split",
    ];
    let mut rows = Vec::new();
    for (number, (record, question)) in of_kinds(records, &[Kind::WhatIn]).enumerate() {
        let Some((options, place)) = options(level, record, question, number) else { continue };
        for rotation in 0..options.len() {
            let at = |slot: usize| options.get((slot + rotation) % options.len());
            let slot = (place + options.len() - rotation) % options.len();
            let mut row =
                vec![(rotation * 1_000_000 + number).to_string(), question.question.clone(), String::new()];
            row.extend(
                (0..OPTIONS)
                    .map(|slot| at(slot).filter(|_| slot < options.len()).cloned().unwrap_or_default()),
            );
            row.push(char::from(b'A' + slot as u8).to_string());
            // Copies name the item whose picture they share.
            let image = if rotation == 0 { base64(&record.jpeg) } else { number.to_string() };
            row.extend(["object_localization".into(), image, "finegrained_perception".into(), "dev".into()]);
            rows.push(row);
        }
    }
    write_file(&folder.join("mmbench_dev_world.tsv"), tsv(&header, &rows).as_bytes())
}

fn mm_vet(folder: &Path, pictures: &Path, records: &[Record]) -> Result<()> {
    let mut entries = Map::new();
    for (record, question) in of_kinds(records, &[Kind::Reason, Kind::Where]) {
        link(&pictures.join(record.picture_name()), &folder.join("images").join(record.picture_name()))?;
        let capability: &[&str] =
            if question.kind == Kind::Reason { &["rec", "know"] } else { &["rec", "spat"] };
        let entry = json!({
            "imagename": record.picture_name(),
            "question": question.question,
            "answer": question.answer,
            "capability": capability,
            "imagesource": "world",
        });
        entries.insert(format!("v1_{}", entries.len()), entry);
    }
    write_json(&folder.join("mm-vet.json"), &entries)
}

fn llava_bench(folder: &Path, pictures: &Path, records: &[Record]) -> Result<()> {
    let (mut questions, mut answers, mut contexts) = (Vec::new(), Vec::new(), Vec::new());
    let kinds = [("conv", Kind::WhatIn), ("detail", Kind::List), ("complex", Kind::Reason)];
    for record in records {
        let Some((caption, _)) = &record.caption else { continue };
        let image = record.picture_name();
        link(&pictures.join(&image), &folder.join("images").join(&image))?;
        contexts.push(json!({ "id": image, "image": image, "caption": caption }));
        for (category, kind) in kinds {
            let Some(question) = record.questions.iter().find(|q| q.kind == kind) else { continue };
            let id = questions.len();
            questions.push(json!({
                "question_id": id, "image": image, "text": question.question, "category": category,
            }));
            answers.push(json!({ "question_id": id, "text": question.answer }));
        }
    }
    lines(&folder.join("questions.jsonl"), &questions)?;
    lines(&folder.join("answers_gpt4.jsonl"), &answers)?;
    lines(&folder.join("context.jsonl"), &contexts)
}
