//! Question answering and visual chain of thought against recorded numbers (`goldens/metrics/{qa,cot}.json`): parsed
//! texts, letters, boxes exact; scores within 1e-9.

#[path = "../../flmm-data/tests/common/mod.rs"]
mod common;

use std::collections::BTreeMap;
use std::error::Error;

use flmm::masks::{Mask, Segmentation};
use flmm_data::qa::{Benchmark, Question};
use flmm_data::viscot;
use flmm_eval::judge::parse::viscot_score;
use flmm_eval::qa::mmbench::{Copy, circular, judged};
use flmm_eval::qa::prompts::prompt;
use flmm_eval::qa::yes_no::{MmeScore, Verdict, mme, mme_right, pope};
use flmm_eval::qa::{choice, normalise, vqa};
use flmm_eval::viscot::region::box_from_mask;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

type TestResult<T = ()> = Result<T, Box<dyn Error>>;

/// A part of a file.
fn part<T: DeserializeOwned>(file: &str, name: &str) -> TestResult<T> {
    let path = common::golden_dir("metrics").ok_or("no metrics among the goldens")?.join(file);
    let bytes = std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let whole: Value = serde_json::from_slice(&bytes)?;
    let part = whole.get(name).ok_or_else(|| format!("{} has no `{name}`", path.display()))?;
    Ok(T::deserialize(part).map_err(|error| format!("{} {name}: {error}", path.display()))?)
}

#[track_caller]
fn close(what: &str, found: f64, expected: f64) {
    assert!((found - expected).abs() <= 1e-9, "{what}: {found}, expected {expected}");
}

#[test]
fn goldens_pope() -> TestResult {
    #[derive(Deserialize)]
    struct Pope {
        rows: Vec<(String, String)>,
        expected: BTreeMap<String, f64>,
    }
    let case: Pope = part("qa.json", "pope")?;
    let read = |(reply, gold): &(String, String)| (Verdict::strict(reply), Verdict::strict(gold));
    let scores = pope(case.rows.iter().map(read));
    for (name, expected) in &case.expected {
        let found = match name.as_str() {
            "accuracy" => scores.accuracy,
            "precision" => scores.precision,
            "recall" => scores.recall,
            "f1" => scores.f1,
            _ => return Err(format!("unknown measure {name}").into()),
        };
        close(name, found, *expected);
    }
    assert!(!case.rows.is_empty() && case.expected.len() >= 4);
    Ok(())
}

#[test]
fn goldens_mme() -> TestResult {
    #[derive(Deserialize)]
    struct Mme {
        rows: Vec<Row>,
        parsed: Vec<Verdict>,
        expected: Expected,
        prompts: Vec<Prompt>,
        parse_cases: Vec<Parsed>,
    }
    #[derive(Deserialize)]
    struct Row {
        question_id: String,
        category: String,
        answer: String,
        reply: String,
    }
    #[derive(Deserialize)]
    struct Expected {
        perception: f64,
        cognition: f64,
    }
    #[derive(Deserialize)]
    struct Prompt {
        question: String,
        prompt: String,
    }
    #[derive(Deserialize)]
    struct Parsed {
        reply: String,
        label: Verdict,
    }
    let case: Mme = part("qa.json", "mme")?;
    assert_eq!(case.rows.len(), case.parsed.len());
    for (row, parsed) in case.rows.iter().zip(&case.parsed) {
        assert_eq!(Verdict::lenient(&row.reply), *parsed, "{:?}", row.reply);
    }
    for parsed in &case.parse_cases {
        assert_eq!(Verdict::lenient(&parsed.reply), parsed.label, "{:?}", parsed.reply);
    }
    for asked in &case.prompts {
        let question = Question { question: asked.question.clone(), ..Question::default() };
        assert_eq!(prompt(Benchmark::Mme, &question), asked.prompt);
    }
    let mut scores: Vec<MmeScore> = case
        .rows
        .into_iter()
        .map(|row| MmeScore {
            right: mme_right(&row.reply, &row.answer),
            question_id: row.question_id,
            category: row.category,
        })
        .collect();
    for _ in 0..2 {
        let points = mme(&scores);
        close("perception", points.perception, case.expected.perception);
        close("cognition", points.cognition, case.expected.cognition);
        scores.reverse();
    }
    Ok(())
}

#[test]
fn goldens_vqa() -> TestResult {
    #[derive(Deserialize)]
    struct Vqa {
        rows: Vec<Row>,
        expected: f64,
        normalisation: Vec<Normalised>,
    }
    #[derive(Deserialize)]
    struct Row {
        reply: String,
        answers: Vec<String>,
        accuracy: f64,
        normalised_reply: String,
    }
    #[derive(Deserialize)]
    struct Normalised {
        text: String,
        normalised: String,
    }
    let case: Vqa = part("qa.json", "vqav2")?;
    for Normalised { text, normalised } in &case.normalisation {
        assert_eq!(normalise::vqa(text), *normalised, "{text:?}");
    }
    let mut sum = 0.0;
    for row in &case.rows {
        assert_eq!(normalise::vqa(&row.reply), row.normalised_reply);
        let accuracy = vqa::accuracy(&row.reply, &row.answers);
        close(&row.reply, accuracy, row.accuracy);
        sum += accuracy;
    }
    close("mean", sum / case.rows.len() as f64, case.expected);
    Ok(())
}

#[test]
fn goldens_exact_match() -> TestResult {
    #[derive(Deserialize)]
    struct Exact {
        rows: Vec<Row>,
        expected: f64,
        prompt: Option<Prompt>,
    }
    #[derive(Deserialize)]
    struct Row {
        reply: String,
        gold: String,
        filtered: Option<String>,
        correct: bool,
    }
    #[derive(Deserialize)]
    struct Prompt {
        question: String,
        options: Vec<String>,
        text: String,
    }
    for name in ["gqa", "ai2d"] {
        let case: Exact = part("qa.json", name)?;
        let mut right = 0;
        for row in &case.rows {
            let mut reply = row.reply.as_str();
            if let Some(filtered) = &row.filtered {
                reply = choice::leading_letter(reply);
                assert_eq!(reply, filtered);
            }
            assert_eq!(normalise::exact_match(reply, &row.gold), row.correct, "{name} {:?}", row.reply);
            right += usize::from(row.correct);
        }
        close(name, right as f64 / case.rows.len() as f64, case.expected);
        if let Some(asked) = case.prompt {
            let options = ('A'..='Z').zip(asked.options).collect();
            let question = Question { question: asked.question, options, ..Question::default() };
            assert_eq!(prompt(Benchmark::Ai2d, &question), asked.text);
        }
    }
    Ok(())
}

#[test]
fn goldens_mmbench() -> TestResult {
    #[derive(Deserialize)]
    struct MmBench {
        rows: Vec<Row>,
        rule_extraction: Vec<Option<char>>,
        expected: Expected,
        extraction_cases: Vec<Extraction>,
    }
    #[derive(Deserialize)]
    struct Row {
        index: u64,
        answer: char,
        prediction: String,
        judge: String,
        category: String,
        l2: String,
        #[serde(flatten)]
        others: BTreeMap<String, Value>,
    }
    #[derive(Deserialize)]
    struct Expected {
        accuracy: f64,
        category: BTreeMap<String, f64>,
        l2: BTreeMap<String, f64>,
    }
    #[derive(Deserialize)]
    struct Extraction {
        prediction: String,
        choices: BTreeMap<char, String>,
        option: Option<char>,
        text: Option<char>,
        #[serde(rename = "final")]
        both: Option<char>,
    }
    let case: MmBench = part("qa.json", "mmbench")?;
    for extraction in &case.extraction_cases {
        let (reply, choices) = (&extraction.prediction, extraction.choices.clone());
        let options: Vec<(char, String)> = choices.into_iter().collect();
        assert_eq!(choice::infer_letter(reply), extraction.option, "{reply:?}");
        assert_eq!(choice::infer(reply, &options), extraction.both, "{reply:?}");
        // The recorded harness looks at the texts only where no letter was found.
        if extraction.option.is_none() {
            assert_eq!(choice::infer_text(reply, &options), extraction.text, "{reply:?}");
        }
    }
    let mut copies = Vec::new();
    assert_eq!(case.rows.len(), case.rule_extraction.len());
    for (row, extracted) in case.rows.iter().zip(&case.rule_extraction) {
        let options = ('A'..='E')
            .filter_map(|letter| Some((letter, row.others.get(&letter.to_string())?.as_str()?.to_owned())));
        let options: Vec<(char, String)> = options.collect();
        let read = choice::infer(&row.prediction, &options);
        assert_eq!(read, *extracted, "{:?}", row.prediction);
        // A judge's reply is recorded where one is asked.
        let judged = match read {
            None if !row.judge.is_empty() => judged(row.index, &options, |_| Ok(Some(row.judge.clone())))?,
            _ => None,
        };
        copies.push(Copy {
            index: row.index,
            answer: row.answer,
            read,
            judged,
            category: row.category.clone(),
            l2_category: row.l2.clone(),
        });
    }
    for _ in 0..copies.len() {
        copies.rotate_left(1);
        let scores = circular(&copies);
        close("accuracy", scores.accuracy, case.expected.accuracy);
        assert_eq!((&scores.category, &scores.l2), (&case.expected.category, &case.expected.l2));
    }
    Ok(())
}

#[test]
fn goldens_box_from_mask() -> TestResult {
    #[derive(Deserialize)]
    struct Case {
        mask: Segmentation,
        box_scale: f64,
        #[serde(rename = "box")]
        expected: [u32; 4],
    }
    let cases: Vec<Case> = part("cot.json", "box_from_mask")?;
    for (number, case) in cases.iter().enumerate() {
        let mask = Mask::from_coco(&case.mask)?;
        assert_eq!(box_from_mask(&mask, case.box_scale), case.expected, "case {number}");
    }
    assert!(!cases.is_empty());
    Ok(())
}

#[test]
fn goldens_judge_parsing() -> TestResult {
    #[derive(Deserialize)]
    struct Case {
        reply: String,
        score: Option<f64>,
        error: Option<String>,
    }
    let cases: Vec<Case> = part("cot.json", "judge_parsing")?;
    let mean: f64 = part("cot.json", "mean_score_over_parsed")?;
    let (mut scores, mut broken) = (Vec::new(), 0);
    for case in &cases {
        let found = viscot_score(&case.reply);
        match (case.score, &case.error) {
            (Some(score), _) => {
                close(&case.reply, found, score);
                scores.push(found);
            }
            // Where the recorded one breaks off, ours reads the number without the dots behind it, or gives 0.
            (None, Some(_)) => {
                let behind = case.reply.to_lowercase().split_once("score: ").map(|(_, rest)| rest.to_owned());
                let behind = behind.ok_or("no score in a reply that the recorded parser breaks off at")?;
                let number: String = behind.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
                let expected = number.trim_end_matches('.').parse().unwrap_or(0.0);
                close(&case.reply, found, f64::min(expected, 1.0));
                broken += 1;
            }
            (None, None) => return Err(format!("{:?} has no score", case.reply).into()),
        }
    }
    close("mean", scores.iter().sum::<f64>() / scores.len() as f64, mean);
    assert!(broken > 0, "no reply that the recorded parser breaks off at");
    Ok(())
}

#[test]
fn goldens_viscot_entries() -> TestResult {
    #[derive(Deserialize)]
    struct Case {
        entry: Value,
        question: String,
        gt_box: [f64; 4],
        image: String,
        answer: String,
    }
    let cases: Vec<Case> = part("cot.json", "entries")?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("entries.json");
    std::fs::write(&path, serde_json::to_vec(&cases.iter().map(|case| &case.entry).collect::<Vec<_>>())?)?;
    let questions = viscot::read(&path)?;
    assert_eq!(questions.len(), cases.len());
    for (found, case) in questions.iter().zip(&cases) {
        assert_eq!(found.question, case.question);
        assert_eq!(
            (found.box_in_image, &found.image, &found.answer),
            (case.gt_box, &case.image, &case.answer)
        );
    }
    Ok(())
}
