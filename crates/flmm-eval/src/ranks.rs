//! Does a model that chats well also ground well? Average ranks and their correlation (`spec/evaluation.md` §7).

use flmm::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::table::{Table, published};

/// The published table with both groups of columns, what its rows of models begin with, and how many columns are chat.
const MAIN: &str = "main";
const OURS: &str = "F-LMM (";
const CHAT_COLUMNS: usize = 4;
/// The model whose two MME numbers the published computation divides instead of adding them.
const DIVIDED: &str = "LLaVA-1.6-7B";

/// Scores of models, higher is better.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RankInput {
    /// Names of the models.
    pub models: Vec<String>,
    /// The benchmarks that measure chat ability, each with one score per model.
    pub chat: Vec<Benchmark>,
    /// Those that measure grounding.
    pub grounding: Vec<Benchmark>,
}

/// The scores of all models on one benchmark.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Benchmark {
    /// Its name.
    pub name: String,
    /// In the order of the models.
    pub scores: Vec<f64>,
}

/// Average ranks of models in two groups of benchmarks, and how they go together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Ranks {
    /// Names, in the order given.
    pub models: Vec<String>,
    /// Average rank over the chat benchmarks; 1 is best.
    pub chat: Vec<f64>,
    /// Average rank over the grounding benchmarks.
    pub grounding: Vec<f64>,
    /// Correlation of the two lists.
    pub pearson: f64,
    /// Correlation of their ranks.
    pub spearman: f64,
}

impl RankInput {
    /// The ten models of the paper. `as_published` makes the slip of the published computation in one number.
    pub fn published(as_published: bool) -> Result<Self> {
        let tables = published()?;
        let bug = || Error::request("the published table of models is not as expected", "this is a bug");
        let table = tables.iter().find(|table| table.id == MAIN).ok_or_else(bug)?;
        let rows: Vec<(&str, &[String])> = table
            .rows
            .iter()
            .filter_map(|row| {
                let (name, scores) = row.split_first()?;
                let name = name.trim_matches('*').strip_prefix(OURS)?.strip_suffix(')')?;
                Some((name, scores))
            })
            .collect();
        let columns: Vec<Benchmark> = (0..table.columns.len())
            .map(|c| benchmark(table, &rows, c, as_published).ok_or_else(bug))
            .collect::<Result<_>>()?;
        let (chat, grounding) = columns.split_at_checked(CHAT_COLUMNS).ok_or_else(bug)?;
        let models = rows.iter().map(|(name, _)| (*name).to_owned()).collect();
        Ok(Self { models, chat: chat.to_vec(), grounding: grounding.to_vec() })
    }

    /// An error unless every benchmark has one finite score per model, and there are two models and benchmarks of both
    /// kinds.
    pub fn check(&self) -> Result<()> {
        let hint = "give {\"models\": [names], \"chat\": [{\"name\", \"scores\"}], \"grounding\": [{\"name\", \"scores\"}]}";
        let wrong = |what: String| Err(Error::request(what, hint));
        if self.models.len() < 2 || self.chat.is_empty() || self.grounding.is_empty() {
            return wrong("ranks need two models, a chat and a grounding benchmark".into());
        }
        for benchmark in self.chat.iter().chain(&self.grounding) {
            if benchmark.scores.len() != self.models.len() {
                let (scores, models) = (benchmark.scores.len(), self.models.len());
                return wrong(format!("`{}` has {scores} scores for {models} models", benchmark.name));
            }
            if !benchmark.scores.iter().all(|score| score.is_finite()) {
                return wrong(format!("`{}` has a score that is not finite", benchmark.name));
            }
        }
        Ok(())
    }
}

/// One column of the published table as numbers.
fn benchmark(
    table: &Table,
    rows: &[(&str, &[String])],
    column: usize,
    as_published: bool,
) -> Option<Benchmark> {
    let score = |&(name, cells): &(&str, &[String])| {
        let cell = cells.get(column)?;
        let number = |text: &str| text.trim().parse::<f64>().ok();
        match cell.split_once('/') {
            None => number(cell),
            Some((a, b)) if as_published && name == DIVIDED => Some(number(a)? / number(b)?),
            Some((a, b)) => Some(number(a)? + number(b)?),
        }
    };
    let scores = rows.iter().map(score).collect::<Option<_>>()?;
    Some(Benchmark { name: table.columns.get(column)?.name.clone(), scores })
}

/// Average ranks; models with the same score share the mean of their ranks.
///
/// # Errors
/// See [`RankInput::check`].
pub fn average_ranks(input: &RankInput) -> Result<Ranks> {
    input.check()?;
    let average = |benchmarks: &[Benchmark]| -> Vec<f64> {
        let ranks: Vec<Vec<f64>> = benchmarks.iter().map(|b| ranks(&b.scores)).collect();
        let mean = |model: usize| ranks.iter().map(|r| r[model]).sum::<f64>() / ranks.len() as f64;
        (0..input.models.len()).map(mean).collect()
    };
    Ok(correlated(input, average(&input.chat), average(&input.grounding)))
}

/// The published table, which is not one of average ranks: row k has the mean *index* of the models that are k-th best,
/// plus 1, so its rows do not belong to the models they are labelled with. In f32, as published.
///
/// # Errors
/// See [`RankInput::check`].
pub fn as_published(input: &RankInput) -> Result<Ranks> {
    input.check()?;
    let indices = |benchmarks: &[Benchmark]| -> Vec<f64> {
        let orders: Vec<Vec<usize>> = benchmarks.iter().map(|b| best_first(&b.scores)).collect();
        let mean =
            |place: usize| orders.iter().map(|o| o[place] as f32).sum::<f32>() / orders.len() as f32 + 1.0;
        (0..input.models.len()).map(|place| f64::from(mean(place))).collect()
    };
    Ok(correlated(input, indices(&input.chat), indices(&input.grounding)))
}

fn correlated(input: &RankInput, chat: Vec<f64>, grounding: Vec<f64>) -> Ranks {
    let (pearson, spearman) = (pearson(&chat, &grounding), pearson(&ranks(&chat), &ranks(&grounding)));
    Ranks { models: input.models.clone(), chat, grounding, pearson, spearman }
}

/// Indices from the highest score to the lowest, equal ones in their order.
fn best_first(scores: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    order
}

/// Ranks from 1 for the highest score; equal scores share the mean of their ranks.
fn ranks(scores: &[f64]) -> Vec<f64> {
    let rank = |score: &f64| {
        let better = scores.iter().filter(|other| *other > score).count();
        let equal = scores.iter().filter(|other| *other == score).count();
        better as f64 + (equal + 1) as f64 / 2.0
    };
    scores.iter().map(rank).collect()
}

/// Pearson's correlation; not a number for a constant list.
fn pearson(a: &[f64], b: &[f64]) -> f64 {
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    let (mean_a, mean_b) = (mean(a), mean(b));
    let product = |v: &[f64], v0: f64, w: &[f64], w0: f64| -> f64 {
        v.iter().zip(w).map(|(v, w)| (v - v0) * (w - w0)).sum()
    };
    product(a, mean_a, b, mean_b) / (product(a, mean_a, a, mean_a) * product(b, mean_b, b, mean_b)).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_scores_share_their_rank() {
        assert_eq!(ranks(&[3.0, 5.0, 3.0, 1.0]), [2.5, 1.0, 2.5, 4.0]);
        assert_eq!(best_first(&[3.0, 5.0, 3.0]), [1, 0, 2]);
        assert!((pearson(&[1.0, 2.0, 3.0], &[2.0, 4.0, 6.0]) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn scores_must_fit_the_models() {
        let mut input = RankInput::published(false).unwrap();
        assert_eq!(input.models.len(), 10);
        assert_eq!(input.chat[0].scores[7], 1519.0 + 322.0);
        input.chat[0].scores.pop();
        assert!(average_ranks(&input).unwrap_err().to_string().contains("`MME` has 9 scores for 10 models"));
    }
}
