//! Beginning from a model that is there: trained tensors carried into fresh ones, also where the vocabulary has grown.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use candle_core::{DType, Device, Tensor};
use flmm::weights::load_checkpoint;
use tokenizers::Tokenizer;

/// Tensors with one row per word.
const TABLES: [&str; 2] = ["language_model.model.embed_tokens.weight", "language_model.lm_head.weight"];

/// A trained LMM: tensors by name, and what its rows of words mean.
pub(crate) struct Trained {
    tensors: BTreeMap<String, Tensor>,
    tokenizer: Tokenizer,
}

impl Trained {
    /// Reads an LMM folder with its tokenizer, or the folder or file of a stage, whose tokenizer is `own`.
    pub(crate) fn open(path: &Path, own: &Tokenizer) -> Result<Self> {
        let stage = path.join("model.safetensors");
        ensure!(
            stage.is_file() || !path.join("checkpoint.safetensors").is_file(),
            "the stage in {} has not come to its end; hint: run it again, --steps ends it earlier",
            path.display()
        );
        let file = if stage.is_file() { &stage } else { path };
        let tensors = load_checkpoint(file, Some(DType::F32), &Device::Cpu)?.into_iter().collect();
        let vocabulary = path.join("tokenizer.json");
        let tokenizer = match vocabulary.is_file() {
            true => {
                Tokenizer::from_file(&vocabulary).map_err(|e| anyhow!("{}: {e}", vocabulary.display()))?
            }
            false => own.clone(),
        };
        Ok(Self { tensors, tokenizer })
    }

    /// Replaces the `fresh` tensors that are there by the trained ones. Words keep their rows by their text, those that
    /// `words` knows in addition stay fresh.
    pub(crate) fn carry_into(&self, fresh: &mut BTreeMap<String, Tensor>, words: &Tokenizer) -> Result<()> {
        let mut found = 0;
        for (name, tensor) in fresh {
            let Some(trained) = self.tensors.get(name) else { continue };
            let carried = match TABLES.contains(&name.as_str()) {
                true => self.rows(trained, tensor, words)?,
                false => trained.clone(),
            };
            ensure!(
                carried.dims() == tensor.dims(),
                "`{name}` is {:?} there and {:?} here; begin from a model of the same sizes",
                carried.dims(),
                tensor.dims()
            );
            *tensor = carried;
            found += 1;
        }
        ensure!(
            found > 0,
            "the model to begin from has no tensor of this stage; hint: name an LMM folder or stage"
        );
        Ok(())
    }

    /// `fresh [words, width]` with the rows of the words that `trained` has.
    fn rows(&self, trained: &Tensor, fresh: &Tensor, words: &Tokenizer) -> Result<Tensor> {
        let (known, mut rows) = (trained.to_vec2::<f32>()?, fresh.to_vec2::<f32>()?);
        for (id, row) in rows.iter_mut().enumerate() {
            let there = words.id_to_token(id as u32).and_then(|word| self.tokenizer.token_to_id(&word));
            if let Some(there) = there {
                let known = known.get(there as usize).with_context(|| format!("no row for word {there}"))?;
                row.clone_from(known);
            }
        }
        Ok(Tensor::new(rows, fresh.device())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text;

    fn tokenizer(text: &str) -> Tokenizer {
        text::to_json(&text::train([text.to_owned()].into_iter()).unwrap()).unwrap().parse().unwrap()
    }

    #[test]
    fn words_keep_their_rows_in_a_larger_vocabulary() -> Result<()> {
        let (old, new) = (tokenizer("a red dog"), tokenizer("a red zebra and a dog"));
        let row = |tokenizer: &Tokenizer, word: &str| tokenizer.encode(word, false).unwrap().get_ids()[0];
        let table = |tokenizer: &Tokenizer, sign: f32| {
            let rows = tokenizer.get_vocab_size(true);
            Tensor::new((0..rows).map(|id| vec![sign * (id as f32 + 1.0)]).collect::<Vec<_>>(), &Device::Cpu)
        };
        let norm = "language_model.model.norm.weight".to_owned();
        let trained = Trained {
            tensors: BTreeMap::from([
                (TABLES[0].to_owned(), table(&old, 1.0)?),
                (norm.clone(), Tensor::new(&[3f32, 4.0], &Device::Cpu)?),
            ]),
            tokenizer: old.clone(),
        };
        let mut fresh = BTreeMap::from([
            (TABLES[0].to_owned(), table(&new, -1.0)?),
            (norm.clone(), Tensor::new(&[0f32, 0.0], &Device::Cpu)?),
            ("other".to_owned(), Tensor::new(&[7f32], &Device::Cpu)?),
        ]);
        trained.carry_into(&mut fresh, &new)?;
        let rows = fresh[TABLES[0]].flatten_all()?.to_vec1::<f32>()?;
        assert_ne!(row(&old, "dog"), row(&new, "dog"));
        assert_eq!(rows[row(&new, "dog") as usize], row(&old, "dog") as f32 + 1.0);
        assert!(rows[row(&new, "zebra") as usize] < 0.0);
        assert_eq!(fresh[&norm].to_vec1::<f32>()?, [3.0, 4.0]);
        assert_eq!(fresh["other"].to_vec1::<f32>()?, [7.0]);

        fresh.insert(norm, Tensor::new(&[0f32], &Device::Cpu)?);
        assert!(trained.carry_into(&mut fresh, &new).is_err(), "another size");

        let mut other = BTreeMap::from([("other".to_owned(), Tensor::new(&[7f32], &Device::Cpu)?)]);
        assert!(trained.carry_into(&mut other, &new).is_err(), "nothing to begin from");
        Ok(())
    }

    #[test]
    fn an_unfinished_stage_is_nothing_to_begin_from() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("checkpoint.safetensors"), []).unwrap();
        let error = Trained::open(folder.path(), &tokenizer("a dog")).err().unwrap();
        assert!(error.to_string().contains("has not come to its end"), "{error}");
    }
}
