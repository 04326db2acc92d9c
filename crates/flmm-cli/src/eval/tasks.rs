//! `flmm eval tasks`: what can be run, and what each task needs.

use std::path::PathBuf;

use clap::Args;
use flmm_data::images::ImageStore;
use flmm_eval::{Need, registry};
use serde_json::json;

use crate::failure::{Failure, Result};
use crate::talk::Talk;

#[derive(Debug, Args)]
pub(crate) struct TasksArgs {
    /// Data root; with it, the list says what is there.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &TasksArgs, talk: &Talk) -> Result<()> {
    if let Some(data) = args.data.as_ref().filter(|data| !data.is_dir()) {
        return Err(Failure::usage(format!("`{}`: no such folder", data.display()), "give the data root"));
    }
    let store = args.data.as_ref().map(ImageStore::open).transpose()?;
    let present = |need: &Need| store.as_ref().map(|store| need.is_present(store));
    let tasks = registry();
    if args.json {
        let list: Vec<_> = tasks
            .iter()
            .map(|task| {
                let needs: Vec<_> = task
                    .needs()
                    .iter()
                    .map(|need| json!({ "path": need.path, "source": need.source, "present": present(need) }))
                    .collect();
                json!({ "task": task.name(), "about": task.about(), "needs": needs })
            })
            .collect();
        return talk.print(&format!("{:#}", json!(list)));
    }
    let mut text = String::new();
    for task in &tasks {
        text += &format!("{}  {}\n", task.name(), task.about());
        for need in task.needs() {
            let mark = match present(&need) {
                Some(true) => "there   ",
                Some(false) => "MISSING ",
                None => "",
            };
            text += &format!("    {mark}{}  ({})\n", need.path, need.source);
        }
    }
    talk.print(&text)
}
