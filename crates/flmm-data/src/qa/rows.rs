//! From one row of a published table to a question.

use flmm::Result;

use super::Question;
use super::table::Row;

/// The question and its picture, which every table has.
fn asked(row: &Row) -> Result<Question> {
    Ok(Question { question: row.text("question")?, picture: row.picture()?, ..Question::default() })
}

/// As [`asked`], with the id and one answer or several.
fn answered(row: &Row, answers: Vec<String>) -> Result<Question> {
    Ok(Question { id: row.text("question_id")?, answers, ..asked(row)? })
}

pub(super) fn mme(row: &Row) -> Result<Question> {
    Ok(Question {
        // Both questions about a picture have its name as id.
        group: row.text("question_id")?,
        answers: vec![row.text("answer")?],
        category: row.text("category")?,
        ..asked(row)?
    })
}

pub(super) fn mmbench(row: &Row) -> Result<Question> {
    let index = row.number("index")?;
    let options = row.lettered_options()?;
    let answer = row.optional_text("answer")?.ok_or_else(|| {
        row.error("no `answer`", "the test split is scored by the benchmark's server only: use the dev split")
    })?;
    let answer = answer.trim().to_owned();
    if !options.iter().any(|(letter, _)| answer == letter.to_string()) {
        return Err(
            row.error(format!("answer {answer:?} is none of the options"), "compare with the published file")
        );
    }
    let l2 = row.optional_text("l2-category")?;
    Ok(Question {
        id: index.to_string(),
        hint: row.optional_text("hint")?.unwrap_or_default(),
        options,
        answers: vec![answer],
        category: row.optional_text("category")?.unwrap_or_default(),
        l2_category: l2
            .map_or_else(|| row.optional_text("L2-category"), |l2| Ok(Some(l2)))?
            .unwrap_or_default(),
        group: (index % 1_000_000).to_string(),
        ..asked(row)?
    })
}

pub(super) fn ai2d(row: &Row) -> Result<Question> {
    let options = match row.cells.contains_key("options") {
        true => ('A'..='Z').zip(row.texts("options", "")?).collect(),
        false => row.lettered_options()?,
    };
    let gold = row.text("answer")?;
    let letter = match gold.trim().parse::<usize>() {
        Ok(index) => options.get(index).map(|(letter, _)| *letter),
        Err(_) => options.iter().map(|(letter, _)| *letter).find(|letter| gold.trim() == letter.to_string()),
    };
    let letter = letter.ok_or_else(|| {
        let hint = "expected an option's letter, or its number counted from 0";
        row.error(format!("answer {gold:?} is none of the {} options", options.len()), hint)
    })?;
    Ok(Question { options, answers: vec![letter.to_string()], ..asked(row)? })
}

pub(super) fn pope(row: &Row) -> Result<Question> {
    let category = row.text("category")?;
    Ok(Question {
        id: format!("{category}-{}", row.text("question_id")?),
        answers: vec![row.text("answer")?],
        category,
        ..asked(row)?
    })
}

pub(super) fn vqa(row: &Row) -> Result<Question> {
    answered(row, row.texts("answers", "answer")?)
}

pub(super) fn mm_vet(row: &Row) -> Result<Question> {
    Ok(Question { capabilities: row.texts("capability", "")?, ..answered(row, vec![row.text("answer")?])? })
}

pub(super) fn llava_bench(row: &Row) -> Result<Question> {
    Ok(Question {
        category: row.text("category")?,
        context: row.texts_or_text("caption")?,
        ..answered(row, vec![row.text("gpt_answer")?])?
    })
}

/// A cell that becomes part of a path: one name.
pub(super) fn plain_name(row: &Row, cell: &str) -> Result<String> {
    let name = row.text(cell)?;
    match name.contains(['/', '\\']) || name == ".." {
        false => Ok(name),
        true => Err(row
            .error(format!("`{cell}` is {name:?}, expected a file name"), "compare with the published file")),
    }
}
