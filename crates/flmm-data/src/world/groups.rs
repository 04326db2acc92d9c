//! gRefCOCO's references of a world: expressions for one object, for two, and for none.

use super::Split;
use super::records::Record;
use crate::grefcoco::{GroupReference, GroupSentence, OneOrMany};

/// Records that are searched for an expression of something that a picture does not show.
const LOOK_AHEAD: usize = 32;

/// The reference list. Pictures without any referring expression have none.
pub(super) fn group_references(split: Split, records: &[Record]) -> Vec<GroupReference> {
    let mut all = Vec::new();
    for (number, record) in records.iter().enumerate() {
        let name = match split {
            Split::Test => ["testA", "testB"][number % 2],
            other => other.name(),
        };
        let id = |object: usize| record.instances[object].id as i64;
        let first = |at: usize| {
            record.references.get(at).and_then(|(object, texts)| Some((id(*object), texts.first()?)))
        };
        let mut add = |text: String, ids: Vec<i64>| {
            all.push(GroupReference {
                ref_id: all.len() as u64,
                image_id: record.image_id,
                split: name.to_owned(),
                no_target: ids.is_empty(),
                ann_id: OneOrMany::Many(if ids.is_empty() { vec![-1] } else { ids }),
                sentences: vec![GroupSentence { sent_id: all.len() as u64, raw: text.clone(), sent: text }],
            });
        };
        if let Some((object, text)) = first(0) {
            add(text.clone(), vec![object]);
            if let Some((other, more)) = first(1) {
                add(format!("{text} and {more}"), vec![object, other]);
            }
        }
        if let Some(text) = absent(number, records) {
            add(text, Vec::new());
        }
    }
    all
}

/// An expression of a later record for an object of a class that record `number` does not show.
fn absent(number: usize, records: &[Record]) -> Option<String> {
    let shown = |category: u64| records[number].instances.iter().any(|shown| shown.category_id == category);
    records.iter().cycle().skip(number + 1).take(LOOK_AHEAD.min(records.len())).find_map(|other| {
        let reference =
            other.references.iter().find(|(object, _)| !shown(other.instances[*object].category_id));
        reference?.1.first().cloned()
    })
}
