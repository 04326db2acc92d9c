//! A recipe: the phases that make a model, as a TOML file.
//!
//! ```toml
//! level = 2
//! [sizes]                 # optional: what differs from the shipped sizes
//! [[phase]]
//! name = "codes-6"        # its folder below the run's
//! stage = "codes"         # the keys of a stage are its options on the command line, with `_` for `-`
//! grid = 6
//! gate = ["Exist=90@1000"]
//! ```

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use flmm_data::world::Level;
use serde::Deserialize;

use crate::config::LmmSizes;
use crate::workshop::Stage;

/// What is made of which phases.
#[derive(Debug)]
pub(crate) struct Recipe {
    /// Level of the world.
    pub(crate) level: Level,
    /// Sizes of the LMM.
    pub(crate) sizes: LmmSizes,
    /// In the order in which they are carried out.
    pub(crate) phases: Vec<Phase>,
}

/// One stage with its options.
#[derive(Debug)]
pub(crate) struct Phase {
    /// Name of its folder.
    pub(crate) name: String,
    /// What it does.
    pub(crate) stage: Stage,
    /// What the recipe says of it.
    pub(crate) settings: toml::Table,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    level: u8,
    #[serde(default)]
    sizes: LmmSizes,
    phase: Vec<toml::Table>,
}

impl Recipe {
    /// Reads `file`; phases may begin from earlier ones and from what is there below `out` or anywhere.
    ///
    /// # Errors
    /// Names the file and the phase for an unknown key, a wrong value, a name that is used twice, an input that neither
    /// is there nor will be made.
    pub(crate) fn read(file: &Path, out: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        Self::parse(&text, out).with_context(|| {
            let hint =
                "hint: `flmm-tiny STAGE --help` lists a stage's options, docs/flmm-tiny.md has an example";
            format!("{} is no recipe\n  {hint}", file.display())
        })
    }

    fn parse(text: &str, out: &Path) -> Result<Self> {
        let File { level, sizes, phase } = toml::from_str(text)?;
        let level = Level::from_number(level).ok_or_else(|| anyhow!("level is {level}, expected 1 or 2"))?;
        sizes.check().context("sizes")?;
        let mut phases: Vec<Phase> = Vec::new();
        for (at, table) in phase.into_iter().enumerate() {
            let place = match table.get("name").and_then(toml::Value::as_str) {
                Some(name) => format!("phase `{name}`"),
                None => format!("phase {}", at + 1),
            };
            let phase = Phase::parse(table).with_context(|| place.clone())?;
            let earlier = |path: &Path| phases.iter().any(|p| Path::new(&p.name) == path);
            ensure!(!earlier(Path::new(&phase.name)), "{place}: there is one of this name already");
            for input in phase.stage.inputs() {
                ensure!(
                    earlier(input) || out.join(input).exists() || input.exists(),
                    "{place}: `{}` is neither an earlier phase nor there",
                    input.display()
                );
            }
            phases.push(phase);
        }
        ensure!(!phases.is_empty(), "it has no phase");
        Ok(Self { level, sizes, phases })
    }
}

impl Phase {
    fn parse(settings: toml::Table) -> Result<Self> {
        let mut options = settings.clone();
        let mut text = |key: &str| match options.remove(key) {
            Some(toml::Value::String(text)) => Ok(text),
            Some(other) => Err(anyhow!("`{key}` is {other}, expected a text")),
            None => Err(anyhow!("`{key}` is missing")),
        };
        let (name, stage) = (text("name")?, text("stage")?);
        let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        ensure!(
            !name.is_empty() && name.chars().all(is_plain),
            "the name is a folder's: expected small letters, digits and `-`"
        );
        let stage = match stage.as_str() {
            "tower" => Stage::Tower(options.try_into()?),
            "codes" => Stage::Codes(options.try_into()?),
            "lmm" => Stage::Lmm(options.try_into()?),
            "sam" => Stage::Sam(options.try_into()?),
            "freeze" => Stage::Freeze(options.try_into()?),
            "head" => Stage::Head(options.try_into()?),
            "evaluate" => Stage::Evaluate(options.try_into()?),
            other => bail!(
                "no stage is called `{other}`: expected tower, codes, lmm, sam, freeze, head or evaluate"
            ),
        };
        Ok(Self { name, stage, settings })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "level = 2\n";

    fn parse(phases: &str) -> Result<Recipe> {
        Recipe::parse(&format!("{HEAD}{phases}"), Path::new("/nowhere"))
    }

    fn complaint(phases: &str) -> String {
        format!("{:#}", parse(phases).expect_err(phases))
    }

    #[test]
    fn a_phase_has_the_defaults_of_the_command_line() {
        let recipe = parse(
            "[sizes]\nlayers = 8\n[[phase]]\nname = 'codes-6'\nstage = 'codes'\ngrid = 6\nobjects = '1-2'\n\
             gate = ['Exist=90@1000', 'Pointing=70']\n[[phase]]\nname = 'b'\nstage = 'codes'\nfrom = 'codes-6'",
        )
        .unwrap();
        assert_eq!((recipe.sizes.layers, recipe.sizes.width), (8, LmmSizes::default().width));
        let [Phase { stage: Stage::Codes(first), .. }, Phase { stage: Stage::Codes(second), .. }] =
            &recipe.phases[..]
        else {
            panic!("two phases of codes");
        };
        assert_eq!((first.grid, second.grid), (Some(6), None));
        assert_eq!((first.steps, first.gate.len(), second.gate.len()), (6000, 2, 0));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let codes = "[[phase]]\nname = 'a'\nstage = 'codes'\n";
        assert!(
            complaint(&format!("{codes}grids = 6")).starts_with("phase `a`: unknown field `grids`, expected")
        );
        assert!(
            complaint(&format!("{codes}gate = ['Wher=3']")).contains("no kind of question is called `Wher`")
        );
        assert!(complaint(&format!("{codes}objects = '0-2'")).contains("`0-2` is no number of objects"));
        assert!(
            complaint(&format!("{codes}from = 'b'")).contains("`b` is neither an earlier phase nor there")
        );
        assert!(complaint(&format!("{codes}{codes}")).contains("of this name already"));
        assert!(complaint("[[phase]]\nstage = 'codes'").starts_with("phase 1: `name` is missing"));
        assert!(complaint("[[phase]]\nname = '../a'\nstage = 'codes'").contains("small letters"));
        assert!(complaint("[[phase]]\nname = 'a'\nstage = 'code'").contains("no stage is called `code`"));
        assert!(complaint("phase = []\n").contains("no phase"));
        assert!(complaint(&format!("[sizes]\nheads = 7\n{codes}")).contains("heads is 7"));
        assert!(complaint(&format!("[sizes]\nvocab = 7\n{codes}")).contains("unknown field `vocab`"));
    }

    #[test]
    fn the_recipes_in_the_repository_are_recipes() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
        let mut count = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let file = entry.unwrap().path();
            // Models that they begin from are named from the repository's root.
            let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
            Recipe::read(&file, &root).unwrap();
            count += 1;
        }
        assert_eq!(count, 2);
    }
}
