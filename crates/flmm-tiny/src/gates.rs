//! What training has to reach, and when it is checked.

use anyhow::{Result, ensure};
use flmm_data::world::QuestionKind;
use serde::Deserialize;

use crate::lmm::Report;
use crate::pack::Kind;

/// What a gate looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Measure {
    /// Questions of a kind that are answered right.
    Question(QuestionKind),
    /// Questions with exactly one right answer.
    Closed,
    /// Phrases of closed answers that had to be seen in the picture.
    Seen,
    /// Phrases whose strongest patch lies on the named thing, by the best head.
    Pointing,
}

impl Measure {
    fn percent(self, report: &Report) -> f64 {
        let percent = |(right, all): (usize, usize)| 100.0 * right as f64 / all.max(1) as f64;
        match self {
            Self::Question(kind) => {
                percent(report.answers.get(&Kind::Question(kind)).copied().unwrap_or_default())
            }
            Self::Closed => percent(report.closed),
            Self::Seen => percent(report.seen),
            Self::Pointing => 100.0 * report.best_head().1,
        }
    }
}

/// A least share in percent, written `Where=80` or, to be checked before the end, `Where=60@250`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Gate {
    name: String,
    measure: Measure,
    percent: f64,
    /// When it is checked; at the end if `None`.
    step: Option<usize>,
}

impl Gate {
    /// Whether the evaluation at `step` is the first at or behind the gate's own step, of `steps` in all.
    /// It depends on nothing else, so a resumed run checks what an uninterrupted one checks.
    pub(crate) fn is_due(&self, step: usize, steps: usize, every: usize) -> bool {
        let at = self.step.unwrap_or(steps).min(steps);
        let before = (step - 1) / every.max(1) * every;
        before < at && at <= step
    }
}

impl std::str::FromStr for Gate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, rest) = text.split_once('=').ok_or("expected KIND=PERCENT, such as Where=80")?;
        let (percent, step) = match rest.split_once('@') {
            Some((percent, step)) => (percent, Some(step)),
            None => (rest, None),
        };
        let measure = match name {
            "Closed" => Measure::Closed,
            "Seen" => Measure::Seen,
            "Pointing" => Measure::Pointing,
            kind => Measure::Question(question_kind(kind)?),
        };
        let percent = percent.parse().map_err(|_| format!("`{percent}` is not a number"))?;
        let step = step
            .map(|s| s.parse().ok().filter(|s| *s > 0).ok_or(format!("`{s}` is not a step")))
            .transpose()?;
        Ok(Self { name: name.into(), measure, percent, step })
    }
}

impl TryFrom<String> for Gate {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// A kind of question by the name it has in the log.
pub(crate) fn question_kind(name: &str) -> Result<QuestionKind, String> {
    let kind = serde_json::from_value(serde_json::Value::from(name));
    kind.map_err(|_| format!("no kind of question is called `{name}`"))
}

/// Hours are not worth spending on a model that has not learnt what they build on.
pub(crate) fn check_gates<'a>(
    gates: impl Iterator<Item = &'a Gate>,
    report: &Report,
    step: usize,
) -> Result<()> {
    for Gate { name, measure, percent: wanted, .. } in gates {
        let percent = measure.percent(report);
        ensure!(
            percent >= *wanted,
            "gate missed at step {step}: {name} {percent:.0} %, wanted {wanted} %; train longer"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(text: &str) -> Result<Gate, String> {
        text.parse()
    }

    #[test]
    fn a_gate_is_due_at_one_evaluation() {
        let steps = |text: &str| {
            let gate = gate(text).expect(text);
            let evaluations = [250, 500, 750, 900];
            evaluations.into_iter().filter(|step| gate.is_due(*step, 900, 250)).collect::<Vec<_>>()
        };
        assert_eq!(steps("Where=80"), [900]);
        assert_eq!(steps("Where=80@250"), [250]);
        assert_eq!(steps("Where=80@251"), [500]);
        assert_eq!(steps("Where=80@800"), [900]);
        assert_eq!(steps("Where=80@5000"), [900]);
    }

    #[test]
    fn wrong_gates_are_refused() {
        for text in ["Where", "Where=x", "Wher=80", "Where=80@", "Where=80@0", "Where=80@x"] {
            assert!(gate(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_missed_gate_names_its_kind_and_step() -> Result<()> {
        let mut report = Report::default();
        report.answers.insert(Kind::Question(QuestionKind::Where), (7, 10));
        let gates = ["Where=70", "Where=71"].map(|text| gate(text).expect(text));
        check_gates(gates[..1].iter(), &report, 500)?;
        let missed = check_gates(gates.iter(), &report, 500).expect_err("70 % is less than 71 %").to_string();
        assert_eq!(missed, "gate missed at step 500: Where 70 %, wanted 71 %; train longer");
        Ok(())
    }

    #[test]
    fn gates_look_at_more_than_questions() -> Result<()> {
        let mut report = Report::default();
        (report.closed, report.seen, report.pointing, report.phrases) = ((8, 10), (3, 4), vec![1, 9], 10);
        let passes = |text: &str| check_gates([gate(text).expect(text)].iter(), &report, 1).is_ok();
        assert!(passes("Closed=80") && passes("Seen=75") && passes("Pointing=90"));
        assert!(!passes("Closed=81") && !passes("Seen=76") && !passes("Pointing=91"));
        Ok(())
    }
}
