//! Training the keyword selector: a linear layer that tells which tokens belong to something that can be seen
//! (`spec/training.md` §8.2).

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use flmm::capture::weighted_hidden;
use flmm::grounder::GroundingHead;
use flmm::nn::Linear;
use flmm::phrases::LAMBDA;
use flmm::{Error, Result};
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::head::linear;
use crate::losses::bce;
use crate::task::{Losses, Metric, Task};

/// How the selector is trained.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SelectorConfig {
    /// Factor of the loss of tokens that belong to a phrase.
    pub pos_weight: f64,
    /// Share of such tokens that the fresh bias expects.
    pub positive_rate: f64,
}

impl Default for SelectorConfig {
    fn default() -> Self {
        Self { pos_weight: 1.0, positive_rate: 0.5 }
    }
}

impl SelectorConfig {
    /// Fresh `weight [1, hidden]` and `bias [1]`.
    pub fn init(&self, hidden: usize, rng: &mut impl Rng) -> Result<BTreeMap<String, Tensor>> {
        let p = self.positive_rate;
        if !(p > 0.0 && p < 1.0) {
            return Err(Error::request(format!("`positive_rate` is {p}"), "give a rate between 0 and 1"));
        }
        let bias = Tensor::new(&[(p / (1.0 - p)).ln() as f32], &Device::Cpu)?;
        Ok(BTreeMap::from([("weight".into(), linear(&[1, hidden], hidden, rng)?), ("bias".into(), bias)]))
    }
}

/// Mean cross-entropy over the tokens of a text, and metrics.
///
/// `hidden [L, T, D]`, `text_layer_weights [L]`, `labels [T]` (0 or 1). Gradients reach the selector only.
pub fn selector_loss(
    selector: &Linear,
    hidden: &Tensor,
    text_layer_weights: &Tensor,
    labels: &Tensor,
    config: &SelectorConfig,
) -> Result<(Tensor, Vec<Metric>)> {
    let (_, tokens, _) = hidden.dims3()?;
    if labels.dims() != [tokens] || tokens == 0 {
        return Err(Error::request(
            format!("{tokens} tokens, but labels of shape {:?}", labels.dims()),
            "give one label per token of a text with tokens",
        ));
    }
    let states = weighted_hidden(&hidden.detach(), &text_layer_weights.detach())?;
    let logits = selector.forward(&states)?.squeeze(1)?;
    let labels = labels.to_dtype(logits.dtype())?;
    let loss = if config.pos_weight == 1.0 {
        bce(&logits, &labels)?
    } else {
        // y·w·softplus(−x) + (1 − y)·softplus(x) = softplus(x)·(1 + (w − 1)·y) − w·x·y
        let softplus = (logits.relu()? + (logits.abs()?.neg()?.exp()? + 1.0)?.log()?)?;
        let weighted = softplus.mul(&((&labels * (config.pos_weight - 1.0))? + 1.0)?)?;
        (weighted - (logits.mul(&labels)? * config.pos_weight)?)?.mean_all()?
    };
    let scores = logits.detach().to_vec1::<f32>()?;
    let wanted = labels.to_vec1::<f32>()?;
    let positive = |x: f32| 1.0 / (1.0 + (-x).exp()) > LAMBDA;
    let right = scores.iter().zip(&wanted).filter(|(x, y)| positive(**x) == (**y > 0.5)).count();
    let metrics = vec![
        Metric { name: "selector_loss", value: f64::from(loss.to_scalar::<f32>()?), weight: 1.0 },
        Metric { name: "selector_accuracy", value: right as f64 / tokens as f64, weight: tokens as f64 },
    ];
    Ok((loss, metrics))
}

/// A text: hidden states `[L, T, D]` and labels `[T]` (0 or 1).
#[derive(Debug, Clone)]
pub struct SelectorSample {
    /// Hidden states of the text's tokens.
    pub hidden: Tensor,
    /// 1 for tokens that belong to a phrase.
    pub labels: Tensor,
}

/// Trains the selector alone (mode b): everything else is frozen, so hidden states may be cached.
pub struct SelectorTask {
    selector: Linear,
    text_layer_weights: Tensor,
    config: SelectorConfig,
}

impl SelectorTask {
    /// A task that trains the selector of `head`; fails if it has none.
    pub fn of(head: &GroundingHead, config: SelectorConfig) -> Result<Self> {
        let selector = head.keyword_selector.clone().ok_or_else(|| {
            Error::request("the head has no keyword selector", "add `keyword_selector.weight` and `.bias`")
        })?;
        Ok(Self::new(selector, head.text_layer_weights.clone(), config))
    }

    /// A task that trains `selector` on states weighted by `text_layer_weights [L]`.
    pub fn new(selector: Linear, text_layer_weights: Tensor, config: SelectorConfig) -> Self {
        Self { selector, text_layer_weights, config }
    }
}

impl Task for SelectorTask {
    type Sample = SelectorSample;

    fn weights(&self, _: &SelectorSample) -> Vec<f64> {
        vec![1.0]
    }

    fn losses(&self, sample: &SelectorSample) -> Result<Losses> {
        let SelectorSample { hidden, labels } = sample;
        let (loss, metrics) =
            selector_loss(&self.selector, hidden, &self.text_layer_weights, labels, &self.config)?;
        Ok(Losses { terms: vec![loss], metrics })
    }
}
