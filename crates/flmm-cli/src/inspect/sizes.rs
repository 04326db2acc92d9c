//! `flmm inspect model`: the sizes of a model's parts.

use serde_json::{Value, json};

use crate::args::ModelArgs;
use crate::failure::Result;
use crate::model;
use crate::talk::Talk;

pub(crate) fn run(args: &ModelArgs, as_json: bool, talk: &Talk) -> Result<()> {
    let model = model::open(args, talk)?;
    let (lmm, head) = (model.grounder.lmm(), model.grounder.head());
    let sam = model.grounder.sam().map(|sam| {
        let sam = sam.config();
        json!({
            "image_size": sam.image_size,
            "patch_size": sam.patch_size,
            "embed_dim": sam.embed_dim,
            "depth": sam.depth,
            "heads": sam.num_heads,
        })
    });
    let (spec, decoder) = (lmm.spec(), lmm.decoder().config());
    let facts = json!({
        "model": model.name,
        "lmm": {
            "family": spec.model_type,
            "layers": spec.layers,
            "heads": spec.heads,
            "key_value_heads": decoder.num_kv_heads,
            "hidden_size": decoder.hidden_size,
            "vocabulary": lmm.tokenizer().vocabulary_size(),
            "context": decoder.max_positions,
        },
        "maps": { "grid": [spec.grid.0, spec.grid.1], "channels": spec.channels },
        "sam": sam,
        "head": { "keyword_selector": head.keyword_selector.is_some() },
    });
    if as_json {
        return talk.print(&facts.to_string());
    }
    let mut rows = Vec::new();
    flatten("", &facts, &mut rows);
    talk.print(&super::table(&rows))
}

/// `{"a": {"b": 1}}` as the row `a.b  1`.
pub(super) fn flatten(prefix: &str, value: &Value, rows: &mut Vec<Vec<String>>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(&path, value, rows);
            }
        }
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(Value::to_string).collect();
            rows.push(vec![prefix.to_owned(), items.join("×")]);
        }
        Value::String(text) => rows.push(vec![prefix.to_owned(), text.clone()]),
        other => rows.push(vec![prefix.to_owned(), other.to_string()]),
    }
}
