//! Standard output for results, standard error for everything else.

use std::io::{ErrorKind, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::failure::{Failure, Result};

/// How much is told, and whether in colour.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Talk {
    quiet: bool,
    verbose: bool,
    stdout_colour: bool,
    stderr_colour: bool,
    stderr_terminal: bool,
}

impl Talk {
    pub(crate) fn new(quiet: bool, verbose: bool) -> Self {
        let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let colour = !set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        let stderr_terminal = std::io::stderr().is_terminal();
        Self {
            quiet,
            verbose,
            stdout_colour: colour && std::io::stdout().is_terminal(),
            stderr_colour: colour && stderr_terminal,
            stderr_terminal,
        }
    }

    /// Whether results may be coloured.
    pub(crate) fn colour(&self) -> bool {
        self.stdout_colour
    }

    /// Whether nothing but results and errors was asked for.
    pub(crate) fn quiet(&self) -> bool {
        self.quiet
    }

    /// Whether more was asked for.
    pub(crate) fn verbose(&self) -> bool {
        self.verbose
    }

    /// A result, followed by a line end.
    pub(crate) fn print(&self, text: &str) -> Result<()> {
        let mut out = std::io::stdout().lock();
        let end = if text.ends_with('\n') { "" } else { "\n" };
        write!(out, "{text}{end}").and_then(|()| out.flush()).map_err(|e| match e.kind() {
            ErrorKind::BrokenPipe => Failure::ReaderGone,
            _ => Failure::other(format!("cannot write to standard output: {e}")),
        })
    }

    /// Something worth knowing that is not the result.
    pub(crate) fn note(&self, text: impl std::fmt::Display) {
        if !self.quiet {
            self.err(&format!("{text}\n"));
        }
    }

    /// Something worth knowing to those who asked for more.
    pub(crate) fn detail(&self, text: impl std::fmt::Display) {
        if self.verbose {
            self.err(&format!("{text}\n"));
        }
    }

    /// The sign that a question is expected; only for people.
    pub(crate) fn ask(&self) {
        if self.stderr_terminal && std::io::stdin().is_terminal() && !self.quiet {
            self.err("> ");
        }
    }

    pub(crate) fn failure(&self, failure: &Failure) {
        let label = |name: &str, colour: &str| match self.stderr_colour {
            true => format!("\x1b[1;{colour}m{name}:\x1b[0m"),
            false => format!("{name}:"),
        };
        let hint = failure.hint().map(|hint| format!("{} {hint}\n", label("hint", "36")));
        self.err(&format!("{} {failure}\n{}", label("error", "31"), hint.unwrap_or_default()));
    }

    /// Shows that `what` is going on until the result is dropped; only on a terminal.
    pub(crate) fn during(&self, what: &'static str) -> Spinner {
        if self.quiet || !self.stderr_terminal {
            return Spinner(None);
        }
        let bar = ProgressBar::new_spinner().with_message(what);
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(120));
        Spinner(Some(bar))
    }

    /// A bar of `total` steps; invisible unless on a terminal.
    pub(crate) fn bar(&self, total: u64) -> ProgressBar {
        if self.quiet || !self.stderr_terminal {
            return ProgressBar::hidden();
        }
        let bar = ProgressBar::new(total);
        match ProgressStyle::with_template("{wide_bar} {pos}/{len} {eta}") {
            Ok(style) => bar.with_style(style),
            Err(_) => bar,
        }
    }

    /// A bar of `total` bytes; invisible unless on a terminal.
    pub(crate) fn bytes_bar(&self, total: u64) -> ProgressBar {
        if self.quiet || !self.stderr_terminal {
            return ProgressBar::hidden();
        }
        let bar = ProgressBar::new(total);
        match ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}") {
            Ok(style) => bar.with_style(style),
            Err(_) => bar,
        }
    }

    fn err(&self, text: &str) {
        // Nobody to tell if standard error is closed.
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
}

/// Ends its display when dropped.
pub(crate) struct Spinner(Option<ProgressBar>);

impl Spinner {
    /// What is displayed, if anything.
    pub(crate) fn bar(&self) -> Option<ProgressBar> {
        self.0.clone()
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        if let Some(bar) = self.0.take() {
            bar.finish_and_clear();
        }
    }
}
