//! How alike two phrases are: by a sentence-embedding model, or as given in a file.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use flmm::{Error, Result};

use super::bert::Bert;

/// Where similarities come from.
pub enum Similarity {
    /// Cosine of mean-pooled BERT states.
    Model(Box<Model>),
    /// Matrices made by another program.
    Given(Given),
}

/// A model and the texts it has seen.
pub struct Model {
    bert: Bert,
    seen: Mutex<HashMap<String, Vec<f32>>>,
}

/// Similarity matrices `[true phrase][predicted phrase]` by sample.
pub struct Given {
    file: PathBuf,
    matrices: HashMap<String, Vec<Vec<f64>>>,
}

impl Similarity {
    /// A BERT encoder in the Hugging Face layout.
    pub fn model(folder: &Path) -> Result<Self> {
        Ok(Self::Model(Box::new(Model { bert: Bert::open(folder)?, seen: Mutex::default() })))
    }

    /// A JSON file `{"<sample id>": [[…], …], …}`.
    pub fn file(file: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(file).map_err(|e| Error::io(file, e))?;
        let matrices = serde_json::from_str(&text).map_err(|e| {
            Error::config(
                file,
                format!("not a file of similarities: {e}"),
                "write {\"<sample id>\": [[similarity of true phrase 0 and predicted phrase 0, …], …], …}",
            )
        })?;
        Ok(Self::Given(Given { file: file.to_owned(), matrices }))
    }

    /// `[true phrase][predicted phrase]`. An error if a given matrix is missing or of another size.
    pub fn between(&self, id: &str, truth: &[String], predicted: &[String]) -> Result<Vec<Vec<f64>>> {
        match self {
            Self::Model(model) => {
                let embed =
                    |texts: &[String]| texts.iter().map(|text| model.embed(text)).collect::<Result<Vec<_>>>();
                let (rows, columns) = (embed(truth)?, embed(predicted)?);
                Ok(rows
                    .iter()
                    .map(|row| columns.iter().map(|column| cosine(row, column)).collect())
                    .collect())
            }
            Self::Given(given) => given.matrix(id, truth.len(), predicted.len()),
        }
    }
}

impl Model {
    fn embed(&self, text: &str) -> Result<Vec<f32>> {
        let seen = || self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = seen().get(text) {
            return Ok(known.clone());
        }
        let embedding = self.bert.embed(text)?;
        seen().insert(text.to_owned(), embedding.clone());
        Ok(embedding)
    }
}

impl Given {
    fn matrix(&self, id: &str, rows: usize, columns: usize) -> Result<Vec<Vec<f64>>> {
        let hint = "one row per true phrase, one number per predicted phrase, for every sample";
        let matrix = self
            .matrices
            .get(id)
            .ok_or_else(|| Error::config(&self.file, format!("sample {id} has no similarities"), hint))?;
        if matrix.len() != rows || matrix.iter().any(|row| row.len() != columns) {
            let widths: Vec<usize> = matrix.iter().map(Vec::len).collect();
            let what = format!(
                "sample {id} has {rows} true and {columns} predicted phrases, the similarities have {} rows of {widths:?}",
                matrix.len()
            );
            return Err(Error::config(&self.file, what, hint));
        }
        match matrix.iter().flatten().all(|v| v.is_finite()) {
            true => Ok(matrix.clone()),
            false => Err(Error::config(&self.file, format!("sample {id}: a similarity is not finite"), hint)),
        }
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a).sqrt() * dot(b, b).sqrt()).max(1e-8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_similarities_must_fit() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("s.json");
        std::fs::write(&file, r#"{"7": [[0.5, 1.0]]}"#).unwrap();
        let given = Similarity::file(&file).unwrap();
        let texts = |n: usize| vec![String::new(); n];
        assert_eq!(given.between("7", &texts(1), &texts(2)).unwrap(), [[0.5, 1.0]]);
        for (id, rows, columns) in [("8", 1, 2), ("7", 2, 2), ("7", 1, 1)] {
            let error = given.between(id, &texts(rows), &texts(columns)).unwrap_err().to_string();
            assert!(error.contains(&format!("sample {id}")), "{error}");
        }
        std::fs::write(&file, "[]").unwrap();
        assert!(Similarity::file(&file).is_err());
    }
}
