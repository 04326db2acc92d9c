//! Every cargo command of the workspace compiles a crate with the same features, so that they share their work.

use std::collections::BTreeSet;
use std::process::Command;

/// `name version [features]` of everything that is compiled for `selection`.
fn resolved(selection: &[&str], edges: &str) -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--locked", "--edges", edges, "--prefix", "none", "--format", "{p} [{f}]"])
        .args(selection)
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| line.trim_end_matches(" (*)").to_string())
        .collect()
}

#[test]
fn commands_share_what_they_compile() {
    let workspace = resolved(&["--workspace"], "normal,build,dev");
    for package in ["flmm-cli", "flmm-tiny", "xtask"] {
        let alone = resolved(&["-p", package], "normal,build");
        let others: Vec<_> = alone.difference(&workspace).collect();
        assert!(
            others.is_empty(),
            "`-p {package}` compiles these anew: {others:#?}; see crates/workspace-hack/Cargo.toml"
        );
    }
}
