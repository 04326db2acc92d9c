//! Carrying out a recipe: finished phases are passed over, the first one that fails ends it.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::recipe::Phase;

/// What a finished phase leaves in its folder: the settings it was made with.
const DONE: &str = "done.toml";

/// Carries out `phases` by `run`, each in a folder of its name below `out`.
///
/// # Errors
/// Those of `run`, with the phase; a finished phase whose settings are other ones now.
pub(crate) fn make(
    phases: &[Phase],
    out: &Path,
    mut run: impl FnMut(&Phase, &Path) -> Result<()>,
) -> Result<()> {
    for (at, phase) in phases.iter().enumerate() {
        let folder = out.join(&phase.name);
        let place = format!("phase {} of {}, `{}`", at + 1, phases.len(), phase.name);
        let done = folder.join(DONE);
        if done.exists() {
            check(&done, phase).with_context(|| place.clone())?;
            eprintln!("{place}: finished before");
            continue;
        }
        eprintln!("{place}");
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        run(phase, &folder).with_context(|| {
            format!("{place} stopped; what it learnt is in {}, the same command goes on", folder.display())
        })?;
        let settings = toml::to_string(&phase.settings)?;
        flmm::atomic::write(&done, |to| to.write_all(settings.as_bytes()))?;
    }
    Ok(())
}

/// A finished phase must be the one that the recipe asks for.
fn check(done: &Path, phase: &Phase) -> Result<()> {
    let text = std::fs::read_to_string(done).with_context(|| format!("cannot read {}", done.display()))?;
    let made: toml::Table =
        toml::from_str(&text).with_context(|| format!("{} is damaged", done.display()))?;
    let keys = made.keys().chain(phase.settings.keys());
    let changed: std::collections::BTreeSet<&String> =
        keys.filter(|key| made.get(*key) != phase.settings.get(*key)).collect();
    let folder = done.parent().unwrap_or(done).display();
    let changed: Vec<&str> = changed.into_iter().map(String::as_str).collect();
    ensure!(
        changed.is_empty(),
        "it was finished with another {}; put that back, or remove {folder} and those that build on it",
        changed.join(", ")
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Recipe;

    fn phases(second: &str) -> Vec<Phase> {
        let text = format!(
            "level = 1\n[[phase]]\nname = 'a'\nstage = 'codes'\nsteps = 3\n\
             [[phase]]\nname = 'b'\nstage = 'codes'\nfrom = 'a'\n{second}"
        );
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("recipe.toml");
        std::fs::write(&file, text).unwrap();
        Recipe::read(&file, folder.path()).unwrap().phases
    }

    /// The phases that are run, and how it ends.
    fn made(phases: &[Phase], out: &Path, failing: &str) -> (Vec<String>, Result<()>) {
        let mut names = Vec::new();
        let result = make(phases, out, |phase, folder| {
            assert!(folder.is_dir());
            names.push(phase.name.clone());
            ensure!(phase.name != failing, "gate missed");
            Ok(())
        });
        (names, result)
    }

    #[test]
    fn a_missed_gate_ends_it_and_finished_phases_are_not_run_again() {
        let out = tempfile::tempdir().unwrap();
        let (names, result) = made(&phases(""), out.path(), "a");
        assert_eq!(names, ["a"]);
        assert!(
            format!("{:#}", result.unwrap_err()).starts_with("phase 1 of 2, `a` stopped; what it learnt")
        );
        let (names, result) = made(&phases(""), out.path(), "b");
        assert_eq!(names, ["a", "b"]);
        assert!(format!("{:#}", result.unwrap_err()).ends_with("gate missed"));
        // What has not been finished may be done otherwise.
        let (names, result) = made(&phases("steps = 9"), out.path(), "");
        assert_eq!(names, ["b"]);
        result.unwrap();
        assert!(made(&phases("steps = 9"), out.path(), "").0.is_empty());
    }

    #[test]
    fn a_finished_phase_keeps_its_settings() {
        let out = tempfile::tempdir().unwrap();
        made(&phases("steps = 9"), out.path(), "").1.unwrap();
        let (names, result) = made(&phases("steps = 10\ngrid = 6"), out.path(), "");
        assert!(names.is_empty());
        let message = format!("{:#}", result.unwrap_err());
        assert!(
            message.contains("phase 2 of 2, `b`: it was finished with another grid, steps;"),
            "{message}"
        );
    }
}
