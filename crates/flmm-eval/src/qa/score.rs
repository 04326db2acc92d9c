//! From the scores of single questions to a benchmark's numbers.

use std::collections::BTreeMap;

use flmm::Result;
use flmm_data::qa::{Benchmark, Question};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::mmbench::{Copy, circular, judged};
use super::yes_no::{MmeScore, Verdict, mme, mme_right, pope};
use super::{choice, normalise, vqa};
use crate::judge::{Judge, READINGS, Role, offline, parse};
use crate::record::Metrics;
use crate::task::{Aggregate, parse_scores};

/// POPE.
#[derive(Debug, Serialize, Deserialize)]
struct PopeScore {
    reply: Verdict,
    gold: Verdict,
    set: String,
}

/// GQA, AI2D, VQAv2: 0 to 1.
#[derive(Debug, Serialize, Deserialize)]
struct Accuracy {
    accuracy: f64,
}

/// MM-Vet and LLaVA-Bench.
#[derive(Debug, Serialize, Deserialize)]
struct OpenScore {
    /// Sub-task, or abilities.
    groups: Vec<String>,
    #[serde(flatten)]
    graded: Graded,
}

/// What is known of a free answer with and without a judge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Graded {
    /// The judge's score of the answer; none without a judge, and of LLaVA-Bench where it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub judge: Option<f64>,
    /// Its score of the reference (LLaVA-Bench).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<f64>,
    /// Why the judge gave none. The answer then counts 0, as published; in LLaVA-Bench, whose score is a quotient, it
    /// counts in neither sum.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// [`offline::exact`].
    pub exact: bool,
    /// [`offline::anls`].
    pub anls: f64,
}

impl Graded {
    /// Grades `answer` by what needs no judge.
    pub fn offline(answer: &str, gold: &str) -> Self {
        let (exact, anls) = (offline::exact(answer, gold), offline::anls(answer, gold));
        Self { judge: None, reference: None, failed: None, exact, anls }
    }

    /// Asks `judge` in `role` until `read` makes numbers (reference, answer) of its reply, at most `attempts` times.
    pub fn ask(
        mut self,
        judge: &Judge,
        role: Role,
        values: &[(&str, &str)],
        attempts: usize,
        read: impl Fn(&str) -> Option<(Option<f64>, f64)>,
    ) -> Result<Self> {
        self.judge = (role != Role::LlavaBench).then_some(0.0);
        for attempt in 0..attempts {
            match judge.grade(role, values, attempt)? {
                Ok(reply) => match read(&reply) {
                    Some((reference, score)) => {
                        let known = Self { judge: Some(score), reference, failed: None, ..self };
                        return Ok(known);
                    }
                    None => self.failed = Some(format!("unreadable reply {reply:?}")),
                },
                Err(reason) => {
                    self.failed = Some(reason);
                    break;
                }
            }
        }
        Ok(self)
    }
}

/// Numbers of graded answers, in percent: `offline exact` and `offline ANLS`, which no judge is needed for and which are
/// not comparable with published scores; and how many answers a judge failed on, if any.
pub fn push_offline(metrics: &mut Metrics, name: &str, graded: &[&Graded]) {
    let mean = |value: &dyn Fn(&Graded) -> f64| {
        100.0 * graded.iter().map(|g| value(g)).sum::<f64>() / graded.len().max(1) as f64
    };
    let space = if name.is_empty() { "" } else { " " };
    metrics.push(format!("offline exact{space}{name}"), mean(&|g| f64::from(u8::from(g.exact))));
    metrics.push(format!("offline ANLS{space}{name}"), mean(&|g| g.anls));
}

/// The score of one reply.
pub(super) fn score(
    benchmark: Benchmark,
    question: &Question,
    reply: &str,
    judge: Option<&Judge>,
) -> Result<Value> {
    let gold = question.answers.first().map_or("", String::as_str);
    Ok(match benchmark {
        Benchmark::Pope => json!(PopeScore {
            reply: Verdict::strict(reply),
            gold: Verdict::strict(gold),
            set: question.category.clone(),
        }),
        Benchmark::Mme => json!(MmeScore {
            question_id: question.group.clone(),
            category: question.category.clone(),
            right: mme_right(reply, gold),
        }),
        Benchmark::Gqa => json!(Accuracy { accuracy: exact(reply, gold) }),
        Benchmark::Ai2d => json!(Accuracy { accuracy: exact(choice::leading_letter(reply), gold) }),
        Benchmark::VqaV2 => json!(Accuracy { accuracy: vqa::accuracy(reply, &question.answers) }),
        Benchmark::MmBench => json!(mmbench(question, gold, reply, judge)?),
        Benchmark::MmVet => {
            let mut graded = Graded::offline(reply, gold);
            if let Some(judge) = judge {
                let values =
                    [("question", question.question.as_str()), ("reference", gold), ("answer", reply)];
                let read = |reply: &str| Some((None, parse::mmvet_score(reply)?));
                graded = graded.ask(judge, Role::MmVet, &values, READINGS, read)?;
            }
            json!(OpenScore { groups: question.capabilities.clone(), graded })
        }
        Benchmark::LlavaBench => {
            let mut graded = Graded::offline(reply, gold);
            if let Some(judge) = judge {
                let values = [
                    ("context", question.context.as_str()),
                    ("question", question.question.as_str()),
                    ("reference", gold),
                    ("answer", reply),
                ];
                let read = |reply: &str| {
                    parse::llavabench_scores(reply).map(|(reference, answer)| (Some(reference), answer))
                };
                graded = graded.ask(judge, Role::LlavaBench, &values, READINGS, read)?;
            }
            json!(OpenScore { groups: vec![question.category.clone()], graded })
        }
    })
}

fn exact(reply: &str, gold: &str) -> f64 {
    f64::from(u8::from(normalise::exact_match(reply, gold)))
}

fn mmbench(question: &Question, gold: &str, reply: &str, judge: Option<&Judge>) -> Result<Copy> {
    let index = question.id.parse().unwrap_or_default();
    let read = choice::infer(reply, &question.options);
    let options: Vec<String> =
        question.options.iter().map(|(letter, text)| format!("{letter}. {text}")).collect();
    let options = options.join(" ");
    let values = [("question", question.question.as_str()), ("options", options.as_str()), ("answer", reply)];
    let judged = match (read, judge) {
        (None, Some(judge)) => judged(index, &question.options, |attempt| {
            Ok(judge.grade(Role::MmBench, &values, attempt)?.ok())
        })?,
        _ => None,
    };
    Ok(Copy {
        index,
        answer: gold.chars().next().unwrap_or_default(),
        read,
        judged,
        category: question.category.clone(),
        l2_category: question.l2_category.clone(),
    })
}

/// The benchmark's numbers, percent (of MME points).
pub(crate) fn aggregate(benchmark: Benchmark, scores: &[Value]) -> Result<Aggregate> {
    match benchmark {
        Benchmark::Pope => {
            let scores: Vec<PopeScore> = parse_scores(scores)?;
            let of = |set: Option<&str>| {
                let chosen = scores.iter().filter(|score| set.is_none_or(|set| score.set == set));
                pope(chosen.map(|score| (score.reply, score.gold)))
            };
            let all = of(None);
            let metrics = Metrics::from([
                ("f1", 100.0 * all.f1),
                ("accuracy", 100.0 * all.accuracy),
                ("precision", 100.0 * all.precision),
                ("recall", 100.0 * all.recall),
            ]);
            let sets: BTreeMap<&str, _> =
                scores.iter().map(|score| (score.set.as_str(), of(Some(&score.set)))).collect();
            let other = scores.iter().filter(|score| score.reply == Verdict::Other).count();
            Ok(Aggregate { metrics, details: json!({ "sets": sets, "replies neither yes nor no": other }) })
        }
        Benchmark::Mme => {
            let points = mme(&parse_scores::<MmeScore>(scores)?);
            let metrics = Metrics::from([("perception", points.perception), ("cognition", points.cognition)]);
            Ok(Aggregate { metrics, details: json!({ "categories": points.categories }) })
        }
        Benchmark::Gqa | Benchmark::Ai2d | Benchmark::VqaV2 => {
            let scores: Vec<Accuracy> = parse_scores(scores)?;
            let sum: f64 = scores.iter().map(|score| score.accuracy).sum();
            Ok(Metrics::from([("accuracy", 100.0 * sum / scores.len().max(1) as f64)]).into())
        }
        Benchmark::MmBench => {
            let found = circular(&parse_scores::<Copy>(scores)?);
            let metrics = Metrics::from([("accuracy", 100.0 * found.accuracy)]);
            Ok(Aggregate { metrics, details: json!(found) })
        }
        Benchmark::MmVet | Benchmark::LlavaBench => open(benchmark, &parse_scores(scores)?),
    }
}

fn open(benchmark: Benchmark, scores: &[OpenScore]) -> Result<Aggregate> {
    // 100 · mean of the answers' scores, of LLaVA-Bench relative to the references'.
    let judged = |group: Option<&str>| {
        let chosen =
            scores.iter().filter(|score| group.is_none_or(|group| score.groups.iter().any(|g| g == group)));
        let graded: Vec<&Graded> =
            chosen.map(|score| &score.graded).filter(|graded| graded.judge.is_some()).collect();
        let sum: f64 = graded.iter().filter_map(|graded| graded.judge).sum();
        let whole = match benchmark {
            Benchmark::LlavaBench => graded.iter().filter_map(|graded| graded.reference).sum(),
            _ => graded.len() as f64,
        };
        (whole > 0.0).then(|| 100.0 * sum / whole)
    };
    let mut metrics = Metrics::default();
    // Answers of which some were never given to a judge have no comparable score.
    let asked = |graded: &Graded| graded.judge.is_some() || graded.failed.is_some();
    if scores.iter().all(|score| asked(&score.graded))
        && let Some(score) = judged(None)
    {
        metrics.push("score", score);
    }
    push_offline(&mut metrics, "", &scores.iter().map(|score| &score.graded).collect::<Vec<_>>());
    let groups: BTreeMap<&str, Option<f64>> = scores
        .iter()
        .flat_map(|score| &score.groups)
        .map(|group| (group.as_str(), judged(Some(group))))
        .collect();
    let failures = scores.iter().filter(|score| score.graded.failed.is_some()).count();
    Ok(Aggregate { metrics, details: json!({ "groups": groups, "judge failures": failures }) })
}
