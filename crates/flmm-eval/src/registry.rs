//! Every task this build knows.

use flmm::{Error, Result};

use crate::task::Task;
use crate::{gcg, grefcoco, keywords, png, qa, reasonseg, res, viscot};

/// All tasks, in the order in which they are listed.
pub fn registry() -> Vec<Box<dyn Task>> {
    let mut tasks = Vec::new();
    tasks.extend(res::tasks());
    tasks.extend(grefcoco::tasks());
    tasks.extend(png::tasks());
    tasks.extend(keywords::tasks());
    tasks.extend(reasonseg::tasks());
    tasks.extend(gcg::tasks());
    tasks.extend(qa::tasks());
    tasks.extend(viscot::tasks());
    tasks
}

/// The task called `name`. An error suggests the nearest known name.
pub fn find(name: &str) -> Result<Box<dyn Task>> {
    let mut tasks = registry();
    if let Some(at) = tasks.iter().position(|task| task.name() == name) {
        return Ok(tasks.swap_remove(at));
    }
    let nearest = tasks.iter().map(|task| task.name()).min_by_key(|known| distance(known, name));
    let hint = match nearest.filter(|nearest| distance(nearest, name) <= 3) {
        Some(nearest) => format!("did you mean `{nearest}`? `flmm eval tasks` lists all"),
        None => "`flmm eval tasks` lists all tasks".to_owned(),
    };
    Err(Error::request(format!("there is no task `{name}`"), hint))
}

/// Edit distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let changed = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
