//! What other ways reach than those of the finished model: max merging, fewer heads, noun-phrase rules, clusters.
//!
//! Nothing is trained anew. Where the trained head sees other maps than it was trained on, that counts against them.

use anyhow::Result;
use candle_core::{D, Tensor};
use flmm::Grounder;
use flmm::clusters::{at_logit_size, better_side};
use flmm::grounder::{Caption, Observation};
use flmm::masks::Mask;
use flmm::phrases::{
    LAMBDA, char_range_to_tokens, noun_phrases, select_keywords, token_offsets, token_texts, true_ranges,
};
use flmm_data::world::Scene;
use serde_json::{Value, json};
use tokenizers::Tokenizer;

use crate::measure::{Overlap, Phrases, truth};
use crate::stage_head::{Told, narration};

/// How many of the best heads are looked at.
const BEST: [usize; 4] = [16, 8, 4, 1];

/// Of heads in order the best [`BEST`] of them, where that is not all.
fn fewer(ranked: &[usize]) -> impl Iterator<Item = &[usize]> {
    BEST.iter().filter(|count| **count < ranked.len()).map(|count| &ranked[..*count])
}

/// The numbers of all heads, best first by how often they point right.
pub(crate) fn ranked(pointing: &[usize]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..pointing.len()).collect();
    order.sort_by_key(|head| std::cmp::Reverse(pointing[*head]));
    order
}

/// Masks made in one way.
#[derive(Debug, Default)]
struct Way {
    name: String,
    /// Referring expressions, then phrases of narrations: coarse and refined.
    overlaps: [[Overlap; 2]; 2],
}

impl Way {
    fn named(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// Adds masks of `texts`, 0 for referring expressions and 1 for narrations.
    fn add(&mut self, texts: usize, masks: &[(Mask, Mask)], truths: &[Mask]) -> Result<()> {
        for ((refined, coarse), truth) in masks.iter().zip(truths) {
            self.overlaps[texts][0].add(coarse, truth)?;
            self.overlaps[texts][1].add(refined, truth)?;
        }
        Ok(())
    }

    fn json(&self) -> Value {
        let [[referring_coarse, referring_refined], [narration_coarse, narration_refined]] = &self.overlaps;
        json!({
            "way": self.name,
            "referring_coarse": referring_coarse.ciou(),
            "referring_refined": referring_refined.ciou(),
            "narration_coarse": narration_coarse.ciou(),
            "narration_refined": narration_refined.ciou(),
        })
    }
}

/// The table of a model.
pub(crate) struct Ablations {
    /// Heads, best first.
    ranked: Vec<usize>,
    /// As trained, by max, by ever fewer heads.
    ways: Vec<Way>,
    /// Referring expressions by K-means of all heads and of ever fewer.
    clusters: Vec<(String, Overlap)>,
    selector: Phrases,
    rules: Phrases,
    rules_without_articles: Phrases,
}

impl Ablations {
    /// For a model whose heads point right in this order.
    pub(crate) fn new(ranked: Vec<usize>) -> Self {
        let names: Vec<String> = fewer(&ranked)
            .map(|heads| match heads.len() {
                1 => "best head".into(),
                count => format!("best {count} heads"),
            })
            .collect();
        let ways = ["mean, all heads", "max, all heads"].into_iter().map(Way::named);
        let clusters = std::iter::once("all heads".to_owned()).chain(names.iter().cloned());
        Self {
            ways: ways.chain(names.iter().map(|name| Way::named(format!("mean, {name}")))).collect(),
            clusters: clusters.map(|name| (name, Overlap::default())).collect(),
            ranked,
            selector: Phrases::default(),
            rules: Phrases::default(),
            rules_without_articles: Phrases::default(),
        }
    }

    /// Referring expressions that are observed already.
    pub(crate) fn expressions(
        &mut self,
        grounder: &Grounder,
        scene: &Scene,
        caption: &Caption,
        observation: &Observation,
        truths: &[Mask],
    ) -> Result<()> {
        self.masks(grounder, scene, caption, observation, truths, 0)?;
        let choices = std::iter::once(&self.ranked[..]).chain(fewer(&self.ranked));
        for ((_, overlap), heads) in self.clusters.iter_mut().zip(choices) {
            let heads: Vec<u32> = heads.iter().map(|head| *head as u32).collect();
            let maps = observation.maps.index_select(&Tensor::new(heads, observation.maps.device())?, 1)?;
            for (at, truth) in truths.iter().enumerate() {
                let stack = at_logit_size(&maps.get(at)?, &observation.geometry)?;
                overlap.add(&better_side(&stack, truth, 0)?.mask, truth)?;
            }
        }
        Ok(())
    }

    /// The scene's narration: masks, and phrases by the selector and by rules.
    pub(crate) fn narration(&mut self, grounder: &Grounder, raw: &Tokenizer, scene: &Scene) -> Result<()> {
        let Told { caption, segments, .. } = narration(raw, scene, 0)?;
        let observation = grounder.observe(&scene.image, &caption)?;
        let truths = segments.iter().map(|segments| truth(scene, segments)).collect::<Result<Vec<_>>>()?;
        self.masks(grounder, scene, &caption, &observation, &truths, 1)?;
        let tokenizer = grounder.lmm().tokenizer();
        let wanted = true_ranges(&caption.mask_ids);
        let texts = token_texts(tokenizer, &caption.token_ids);
        if let Some(probs) = grounder.head().keyword_probs(&observation.hidden)? {
            self.selector.add(&select_keywords(&probs, &texts, LAMBDA), &wanted);
        }
        let (text, offsets) = token_offsets(tokenizer, &caption.token_ids);
        let ruled = noun_phrases(&text);
        let ruled: Vec<_> = ruled.iter().filter_map(|chars| char_range_to_tokens(chars, &offsets)).collect();
        self.rules.add(&ruled, &wanted);
        let is_article = |token: usize| {
            let word = texts[token].trim().to_lowercase();
            ["a", "an", "the"].contains(&word.as_str())
        };
        let bare: Vec<_> = ruled
            .into_iter()
            .map(|range| range.start + usize::from(is_article(range.start))..range.end)
            .collect();
        self.rules_without_articles.add(&bare, &wanted);
        Ok(())
    }

    /// The masks of every way.
    fn masks(
        &mut self,
        grounder: &Grounder,
        scene: &Scene,
        caption: &Caption,
        observation: &Observation,
        truths: &[Mask],
        texts: usize,
    ) -> Result<()> {
        let Self { ranked, ways, .. } = self;
        let max = max_merged(grounder, scene, caption, observation)?;
        let fewer = fewer(ranked).map(|heads| only(&observation.maps, heads));
        let maps = [Ok(observation.maps.clone()), Ok(max)].into_iter().chain(fewer);
        for (way, maps) in ways.iter_mut().zip(maps) {
            let seen = Observation { maps: maps?, ..observation.clone() };
            way.add(texts, &grounder.segment(&seen)?, truths)?;
        }
        Ok(())
    }

    pub(crate) fn json(&self) -> Value {
        let clusters = self.clusters.iter().map(|(name, overlap)| (name.clone(), overlap.ciou().into()));
        json!({
            "masks_cIoU": self.ways.iter().map(Way::json).collect::<Vec<_>>(),
            "referring_kmeans_cIoU": clusters.collect::<serde_json::Map<_, _>>(),
            "phrases": {
                "selector": self.selector.json(),
                "noun_phrases": self.rules.json(),
                "noun_phrases_without_articles": self.rules_without_articles.json(),
            },
        })
    }
}

/// The maps `[N, C, h, w]` of every phrase, its tokens merged by their maximum: observed with every token as a phrase.
fn max_merged(
    grounder: &Grounder,
    scene: &Scene,
    caption: &Caption,
    observation: &Observation,
) -> Result<Tensor> {
    let mut single = caption.clone();
    let mut owners = Vec::new();
    for id in single.mask_ids.iter_mut().filter(|id| **id >= 0) {
        owners.push(std::mem::replace(id, owners.len() as i32));
    }
    let tokens = grounder.attention(&scene.image, &single)?.maps;
    let mut merged = Vec::new();
    for phrase in 0..observation.phrases.len() {
        let rows = (0..owners.len()).filter(|row| owners[*row] == phrase as i32);
        let rows: Vec<u32> = rows.map(|row| row as u32).collect();
        merged.push(tokens.index_select(&Tensor::new(rows, tokens.device())?, 0)?.max(0)?);
    }
    Ok(Tensor::stack(&merged, 0)?)
}

/// Maps `[N, C, h, w]` in which all channels but `heads` say nothing: their attention is spread evenly.
fn only(maps: &Tensor, heads: &[usize]) -> Result<Tensor> {
    let (_, channels, ..) = maps.dims4()?;
    let kept: Vec<f32> = (0..channels).map(|c| f32::from(u8::from(heads.contains(&c)))).collect();
    let kept = Tensor::new(kept, maps.device())?.reshape((1, channels, 1, 1))?;
    let even = maps.mean_keepdim(D::Minus1)?.mean_keepdim(D::Minus2)?;
    let spread = even.broadcast_mul(&kept.affine(-1.0, 1.0)?)?;
    Ok(maps.broadcast_mul(&kept)?.broadcast_add(&spread)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn heads_are_ranked_by_how_often_they_point_right() {
        assert_eq!(ranked(&[3, 9, 9, 1]), [1, 2, 0, 3]);
    }

    #[test]
    fn other_heads_say_nothing_but_keep_their_attention() -> Result<()> {
        let maps = Tensor::new(&[[[[1f32, 3.0]], [[2.0, 6.0]]]], &Device::Cpu)?;
        assert_eq!(only(&maps, &[1])?.flatten_all()?.to_vec1::<f32>()?, [2.0, 2.0, 2.0, 6.0]);
        assert_eq!(only(&maps, &[0, 1])?.flatten_all()?.to_vec1::<f32>()?, [1.0, 3.0, 2.0, 6.0]);
        Ok(())
    }
}
