//! `flmm inspect`: what is inside.

mod attention;
mod folder;
mod lmms;
mod sizes;

use crate::args::Inspect;
use crate::failure::Result;
use crate::talk::Talk;

pub(crate) fn run(what: &Inspect, talk: &Talk) -> Result<()> {
    match what {
        Inspect::Lmms { json } => lmms::run(*json, talk),
        Inspect::Model { path: Some(path), json, .. } => folder::run(path, *json, talk),
        Inspect::Model { path: None, model, json } => sizes::run(model, *json, talk),
        Inspect::Attention(args) => attention::run(args, talk),
    }
}

/// Rows of cells as aligned columns; the first row is the heading.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| {
        rows.iter().filter_map(|row| row.get(c)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}
