//! Tables of the documents that follow from the code.

use std::path::Path;

use anyhow::{Context, Result, bail};
use flmm::lmm::REGISTRY;

/// A generated part of a document, between `<!-- NAME:begin … -->` and `<!-- NAME:end -->`.
struct Part {
    file: &'static str,
    name: &'static str,
    text: fn() -> String,
}

const PARTS: [Part; 1] = [Part { file: "README.md", name: "lmms", text: lmms }];

/// Writes the parts anew, or with `check` fails if one differs.
pub(crate) fn run(check: bool) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    for part in &PARTS {
        let file = root.join(part.file);
        let old = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", part.file))?;
        let new = replaced(&old, part.name, &(part.text)()).with_context(|| part.file.to_owned())?;
        if new == old {
            continue;
        }
        if check {
            bail!("{} is out of date\nhint: cargo run --release -p xtask -- docs", part.file);
        }
        flmm::atomic::write(&file, |to| to.write_all(new.as_bytes()))?;
        eprintln!("{} written", part.file);
    }
    Ok(())
}

/// `document` with what lies between the marks of `name` replaced by `text`.
fn replaced(document: &str, name: &str, text: &str) -> Result<String> {
    let begin =
        document.find(&format!("<!-- {name}:begin")).with_context(|| format!("no mark {name}:begin"))?;
    let begin = begin + document[begin..].find("-->").context("the mark is not closed")? + 3;
    let end = document.find(&format!("<!-- {name}:end")).with_context(|| format!("no mark {name}:end"))?;
    if end < begin {
        bail!("the marks of {name} are in the wrong order");
    }
    Ok(format!("{}\n{text}\n{}", &document[..begin], &document[end..]))
}

/// The table of supported LMMs.
fn lmms() -> String {
    let mut lines = vec![
        "| model | weights | layers × heads | channels | grid |".to_owned(),
        "|---|---|---|---|---|".to_owned(),
    ];
    lines.extend(REGISTRY.iter().map(|entry| {
        let s = &entry.spec;
        format!(
            "| {} | [{repo}](https://huggingface.co/{repo}) | {} × {} | {} | {} × {} |",
            s.name,
            s.layers,
            s.heads,
            s.channels,
            s.grid.0,
            s.grid.1,
            repo = s.repo
        )
    }));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::replaced;

    #[test]
    fn only_the_marked_part_changes() {
        let document = "a\n<!-- t:begin (note) -->\nold\n<!-- t:end -->\nb\n";
        let new = replaced(document, "t", "new").unwrap();
        assert_eq!(new, "a\n<!-- t:begin (note) -->\nnew\n<!-- t:end -->\nb\n");
        assert_eq!(replaced(&new, "t", "new").unwrap(), new);
        assert!(replaced("nothing", "t", "new").is_err());
    }
}
