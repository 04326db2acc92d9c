//! Question-answering benchmarks: MME, MMBench, MM-Vet, LLaVA-Bench, POPE, GQA, VQAv2, AI2D (`spec/evaluation.md` §6).
//!
//! Grounding does not change what a model says, so these are numbers of the language model alone.

pub mod choice;
pub mod mmbench;
pub mod normalise;
pub mod prompts;
pub mod score;
pub mod vqa;
pub mod yes_no;

use std::sync::Arc;

use flmm::grounder::AnswerOptions;
use flmm::lmm::Turn;
use flmm::{Error, Grounder, Result};
use flmm_data::qa::{Benchmark, QaData};
use image::RgbImage;
use serde_json::{Value, json};

use crate::judge::{Judge, Role};
use crate::record::Prediction;
use crate::task::{Aggregate, Need, Predicted, Rows, Samples, Settings, Task};

/// A benchmark as a task.
struct QaTask(Benchmark);

/// All benchmarks.
pub fn tasks() -> impl Iterator<Item = Box<dyn Task>> {
    Benchmark::ALL.into_iter().map(|benchmark| Box::new(QaTask(benchmark)) as Box<dyn Task>)
}

/// Which judge's role a benchmark needs, if any.
fn role(benchmark: Benchmark) -> Option<Role> {
    match benchmark {
        Benchmark::MmVet => Some(Role::MmVet),
        Benchmark::LlavaBench => Some(Role::LlavaBench),
        Benchmark::MmBench => Some(Role::MmBench),
        _ => None,
    }
}

impl Task for QaTask {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn about(&self) -> String {
        match self.0 {
            Benchmark::Mme => "MME: points for yes-no questions, perception and cognition",
            Benchmark::MmBench => {
                "MMBench (EN dev): accuracy, circular; a judge reads unclear replies (--judge-url)"
            }
            Benchmark::MmVet => "MM-Vet: open questions, scored by a judge (--judge-url)",
            Benchmark::LlavaBench => {
                "LLaVA-Bench in the wild: open questions, scored by a judge (--judge-url)"
            }
            Benchmark::Pope => "POPE: F1 and accuracy of yes-no questions about objects, all three sets",
            Benchmark::Gqa => "GQA, testdev balanced: exact match",
            Benchmark::VqaV2 => "VQAv2, val: agreement with ten annotators",
            Benchmark::Ai2d => "AI2D, test: multiple choice about diagrams",
        }
        .to_owned()
    }

    fn needs(&self) -> Vec<Need> {
        vec![Need::new(self.0.folder(), self.0.source())]
    }

    fn open(&self, settings: &Settings) -> Result<Box<dyn Samples>> {
        Ok(Box::new(QaSamples::open(self.0, settings)?))
    }

    fn aggregate(&self, scores: &[Value]) -> Result<Aggregate> {
        score::aggregate(self.0, scores)
    }
}

/// The questions of a benchmark.
pub struct QaSamples {
    benchmark: Benchmark,
    data: QaData,
    ids: Vec<String>,
    judge: Option<Arc<Judge>>,
}

impl QaSamples {
    /// Reads the questions below the data root.
    pub fn open(benchmark: Benchmark, settings: &Settings) -> Result<Self> {
        let data = QaData::open_in(settings.pictures()?, benchmark)?;
        let ids = data.questions.iter().map(|question| question.id.clone()).collect();
        let judge = settings.judge.clone().filter(|_| role(benchmark).is_some());
        Ok(Self { benchmark, data, ids, judge })
    }

    /// What is asked in question `index`, and most tokens of the reply.
    pub fn prompt(&self, index: usize) -> (String, usize) {
        let prompt = prompts::prompt(self.benchmark, &self.data.questions[index]);
        (prompt, prompts::most_tokens(self.benchmark))
    }

    /// The picture of question `index`.
    pub fn picture(&self, index: usize) -> Result<RgbImage> {
        self.data.picture(index)
    }
}

impl Samples for QaSamples {
    fn ids(&self) -> &[String] {
        &self.ids
    }

    fn scoring(&self) -> Value {
        let judge = self.judge.as_ref().zip(role(self.benchmark)).map(|(judge, role)| judge.describe(role));
        match judge {
            Some(judge) => json!({ "judge": judge }),
            None => Value::Null,
        }
    }

    fn halted(&self) -> Option<Error> {
        self.judge.as_ref()?.halted()
    }

    fn template(&self, index: usize) -> Result<Value> {
        let image = self.data.picture_name(index);
        Ok(json!({ "id": self.ids[index], "image": image, "prompt": self.prompt(index).0 }))
    }

    fn predict(&self, index: usize, grounder: &Grounder, _rows: Rows) -> Result<Predicted> {
        let (prompt, most_tokens) = self.prompt(index);
        let answer = reply(grounder, &self.picture(index)?, &Turn::user(&prompt), most_tokens)?;
        Ok(Prediction { id: self.ids[index].clone(), prompt, answer, ..Prediction::default() }.into())
    }

    fn score(&self, index: usize, prediction: &Prediction) -> Result<Value> {
        let question = self.data.questions.get(index).ok_or_else(|| {
            Error::request(format!("there is no question {index}"), "the data changed while they were read")
        })?;
        score::score(self.benchmark, question, &prediction.answer, self.judge.as_deref())
    }
}

/// The model's reply to `turn` about `picture`, greedy, at most `most_tokens` long, without special tokens and the blanks
/// around it, as the models of the public harness give it.
///
/// Every question has a session of its own: numbers must not depend on what was asked before.
pub(crate) fn reply(
    grounder: &Grounder,
    picture: &RgbImage,
    turn: &Turn,
    most_tokens: usize,
) -> Result<String> {
    let mut session = grounder.start(picture)?;
    session.turns = vec![turn.clone()];
    reply_in(grounder, session, most_tokens)
}

/// As [`reply`], to the last turn of a conversation.
pub(crate) fn reply_in(
    grounder: &Grounder,
    mut session: flmm::grounder::Session,
    most_tokens: usize,
) -> Result<String> {
    // One more, because the last token generated never belongs to the answer.
    let options =
        AnswerOptions { max_new_tokens: most_tokens + 1, phrases: None, ..AnswerOptions::default() };
    let answer = grounder.reply(&mut session, &options, &mut |_| {})?;
    Ok(grounder.lmm().tokenizer().decode(&answer.token_ids, true).trim().to_owned())
}
