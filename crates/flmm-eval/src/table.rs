//! Markdown tables laid out like the paper's, with our rows under the published ones.

use flmm::{Error, Result};
use serde::Deserialize;

use crate::record::Metrics;
use crate::results::{Results, TaskResult};

/// The published tables (`spec/results.md`), and which metric goes into which column.
const PUBLISHED: &str = include_str!("published.json");

/// A table of the paper.
#[derive(Debug, Clone, Deserialize)]
pub struct Table {
    /// Its short name.
    pub id: String,
    /// What it is about.
    pub title: String,
    /// What the numbers are.
    pub note: String,
    /// Columns behind the first one, which names the model.
    pub columns: Vec<Column>,
    /// The published rows, as printed.
    pub rows: Vec<Vec<String>>,
}

/// A column.
#[derive(Debug, Clone, Deserialize)]
pub struct Column {
    /// Its heading.
    pub name: String,
    /// Where our number comes from, if anywhere.
    #[serde(default)]
    pub metric: Option<Source>,
}

/// `task/metric`, or several of them, which are rounded and written as `a/b`.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Source {
    /// One number.
    One(String),
    /// Several.
    Several(Vec<String>),
}

/// The published tables.
pub fn published() -> Result<Vec<Table>> {
    serde_json::from_str(PUBLISHED).map_err(|error| {
        Error::request(format!("the published tables cannot be read: {error}"), "this is a bug")
    })
}

/// The tables for which `results` has at least one number, and a list of all numbers.
pub fn markdown(results: &Results) -> Result<String> {
    let mut text = String::from("# Results\n");
    for table in published()? {
        let ours = our_rows(&table, results);
        if ours.is_empty() {
            continue;
        }
        text += &format!("\n## {}\n\n{}\n\n| Model |", table.title, table.note);
        table.columns.iter().for_each(|column| text += &format!(" {} |", column.name));
        text += &format!("\n|---|{}\n", "---|".repeat(table.columns.len()));
        for row in table.rows.iter().chain(&ours) {
            text += &format!("| {} |\n", row.join(" | "));
        }
    }
    text += "\n## All numbers\n\n| Task | Samples | Row | Numbers |\n|---|---|---|---|\n";
    for (name, task) in &results.tasks {
        let samples = match task.complete {
            true => task.samples.to_string(),
            false => format!("{} of {}", task.samples, task.of),
        };
        for (row, metrics) in rows(task) {
            let numbers: Vec<String> =
                metrics.0.iter().map(|(name, value)| format!("{name} {value:.2}")).collect();
            text += &format!("| {name} | {samples} | {row} | {} |\n", numbers.join(", "));
        }
    }
    if results.tasks.values().any(|task| !task.complete) {
        text += "\n\\* Not all samples of the data are counted.\n";
    }
    Ok(text)
}

/// What the table calls the masks of `task`, least refined first: those of other rows, then the prediction proper.
fn rows(task: &TaskResult) -> impl Iterator<Item = (String, &Metrics)> {
    let known = |name: &str| ["kmeans", "coarse"].iter().position(|known| *known == name).unwrap_or(2);
    let mut others: Vec<(&String, &Metrics)> = task.rows.iter().collect();
    others.sort_by_key(|(name, _)| known(name));
    let label = |name: &str| match name {
        "kmeans" => format!("{} (K-means)", task.model),
        other => format!("{} ({other})", task.model),
    };
    let others: Vec<_> = others.into_iter().map(|(name, metrics)| (label(name), metrics)).collect();
    others.into_iter().chain(std::iter::once((format!("**{}**", task.model), &task.metrics)))
}

/// One row per model and kind of mask; none if no column has a number.
fn our_rows(table: &Table, results: &Results) -> Vec<Vec<String>> {
    // The task with most rows first, so that every row finds its place.
    let mut tasks: Vec<&TaskResult> = results.tasks.values().collect();
    tasks.sort_by_key(|task| std::cmp::Reverse(task.rows.len()));
    let mut names: Vec<String> = Vec::new();
    for (name, _) in tasks.into_iter().flat_map(rows) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
        .into_iter()
        .filter_map(|name| {
            let cells: Vec<Option<String>> =
                table.columns.iter().map(|column| cell(column.metric.as_ref()?, &name, results)).collect();
            cells.iter().any(Option::is_some).then(|| {
                let mut row = vec![name];
                row.extend(cells.into_iter().map(|cell| cell.unwrap_or_else(|| "-".into())));
                row
            })
        })
        .collect()
}

fn cell(source: &Source, row: &str, results: &Results) -> Option<String> {
    let number = |path: &str| -> Option<(f64, bool)> {
        let (task, metric) = path.split_once('/')?;
        let task = results.tasks.get(task)?;
        let (_, metrics) = rows(task).find(|(name, _)| name == row)?;
        Some((metrics.get(metric)?, task.complete))
    };
    let mark = |complete: bool| if complete { "" } else { "\\*" };
    match source {
        Source::One(path) => number(path).map(|(value, complete)| format!("{value:.1}{}", mark(complete))),
        Source::Several(paths) => {
            let numbers: Option<Vec<(f64, bool)>> = paths.iter().map(|path| number(path)).collect();
            let numbers = numbers?;
            let texts: Vec<String> = numbers.iter().map(|(value, _)| format!("{value:.0}")).collect();
            Some(texts.join("/") + mark(numbers.iter().all(|(_, complete)| *complete)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use std::collections::BTreeMap;

    #[test]
    fn published_rows_have_all_columns() {
        for table in published().unwrap() {
            assert!(table.rows.iter().all(|row| row.len() == table.columns.len() + 1), "{}", table.id);
        }
    }

    #[test]
    fn our_rows_stand_below() {
        let task = |metrics: Metrics, complete: bool| TaskResult {
            model: "ours".into(),
            settings: Value::Null,
            samples: 3,
            of: 3 + usize::from(!complete),
            complete,
            metrics,
            details: Value::Null,
            rows: BTreeMap::from([("coarse".to_owned(), Metrics::from([("cIoU", 1.26)]))]),
        };
        let mme = Metrics::from([("perception", 1500.6), ("cognition", 300.0)]);
        let results = Results {
            tasks: BTreeMap::from([
                ("refcoco_val".to_owned(), task(Metrics::from([("cIoU", 75.04)]), true)),
                ("mme".to_owned(), task(mme, false)),
            ]),
        };
        let text = markdown(&results).unwrap();
        assert!(text.contains(
            "| ours (coarse) | - | - | - | - | 1.3 | - | - | - | - | - |\n| **ours** | 1501/300\\* |"
        ));
        assert!(text.contains("| mme | 3 of 4 |") && !text.contains("Reasoning"), "{text}");
    }
}
