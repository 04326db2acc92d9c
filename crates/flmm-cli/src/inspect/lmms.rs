//! `flmm inspect lmms`: the registry.

use flmm::lmm::REGISTRY;
use serde_json::json;

use crate::failure::Result;
use crate::talk::Talk;

pub(crate) fn run(as_json: bool, talk: &Talk) -> Result<()> {
    let specs = REGISTRY.iter().map(|entry| entry.spec);
    if as_json {
        let list: Vec<_> = specs
            .map(|s| {
                json!({
                    "name": s.name, "repo": s.repo, "model_type": s.model_type, "layers": s.layers,
                    "heads": s.heads, "grid": [s.grid.0, s.grid.1], "channels": s.channels,
                    "several_images": s.several_images, "tested": s.tested,
                })
            })
            .collect();
        return talk.print(&serde_json::Value::from(list).to_string());
    }
    let heading =
        ["name", "repository", "model_type", "layers", "heads", "grid", "channels", "images", "tested"];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    rows.extend(specs.map(|s| {
        vec![
            s.name.to_owned(),
            s.repo.to_owned(),
            s.model_type.to_owned(),
            s.layers.to_string(),
            s.heads.to_string(),
            format!("{}×{}", s.grid.0, s.grid.1),
            s.channels.to_string(),
            if s.several_images { "several" } else { "one" }.to_owned(),
            s.tested.to_owned(),
        ]
    }));
    talk.print(&super::table(&rows))
}
