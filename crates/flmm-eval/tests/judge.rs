//! Judges against a stand-in server: patience, refusals, cache, prompts.

#[path = "common/judge.rs"]
mod fake;

use std::time::{Duration, Instant};

use fake::{Act, FakeJudge};
use flmm_eval::judge::{Judge, JudgeSettings, Role};

const VALUES: [(&str, &str); 3] =
    [("question", "What {answer}?"), ("reference", "a dog"), ("answer", "a cat")];

fn settings(server: &FakeJudge) -> JudgeSettings {
    JudgeSettings {
        key: Some("secret".into()),
        attempts: 3,
        pause: Duration::from_millis(5),
        timeout: Duration::from_millis(400),
        ..JudgeSettings::new(&server.url, "wise")
    }
}

fn grade(judge: &Judge) -> Result<String, String> {
    judge.grade(Role::VisCot, &VALUES, 0).unwrap()
}

#[test]
fn a_question_is_sent_as_the_protocol_wants_it() {
    let server = FakeJudge::new([Act::Say("score: 0.5")]);
    let judge = Judge::new(settings(&server)).unwrap();
    assert_eq!(grade(&judge).unwrap(), "score: 0.5");
    let (head, body) = server.requests().remove(0);
    assert!(head.starts_with("POST /v1/chat/completions HTTP/1.1\n"), "{head}");
    assert!(head.to_lowercase().contains("authorization: bearer secret\n"), "{head}");
    assert_eq!(body["model"], "wise");
    assert_eq!((body["temperature"].as_f64(), body["max_tokens"].as_u64()), (Some(0.2), Some(100)));
    let user = body["messages"][1]["content"].as_str().unwrap();
    assert_eq!(user, "question: What {answer}?\nstandard answer: a dog\nmodel's answer: a cat");
    assert_eq!(body["messages"][0]["role"], "system");
    assert!(!format!("{judge:?}").contains("secret"));
}

#[test]
fn passing_faults_are_tried_again() {
    let acts = [
        [Act::Status(500, "", ""), Act::Status(429, "Retry-After: 0\r\n", "{}")],
        [Act::HangUp, Act::BreakOff],
        [Act::Say("score: 0"), Act::Say("unused")],
        [Act::Status(200, "", "no json"), Act::Status(200, "", r#"{"choices":[]}"#)],
        [Act::Wait(Duration::from_millis(900)), Act::Status(503, "", "")],
    ];
    for (number, acts) in acts.into_iter().enumerate() {
        let server = FakeJudge::new(acts);
        let judge = Judge::new(settings(&server)).unwrap();
        let expected = if number == 2 { "score: 0" } else { "score: 1" };
        assert_eq!(grade(&judge).unwrap(), expected, "{number}");
        assert_eq!(server.requests().len(), if number == 2 { 1 } else { 3 }, "{number}");
    }
}

#[test]
fn patience_ends_and_says_why() {
    let server = FakeJudge::new((0..3).map(|_| Act::Status(502, "", "")));
    let judge = Judge::new(settings(&server)).unwrap();
    assert_eq!(grade(&judge).unwrap_err(), "status 502");
    assert_eq!(server.requests().len(), 3);
    // Nothing listens there.
    let closed = JudgeSettings { url: "http://127.0.0.1:9/v1".into(), ..settings(&server) };
    let clock = Instant::now();
    let error = Judge::new(closed).unwrap().check().unwrap_err();
    assert!(error.to_string().contains("127.0.0.1:9"), "{error}");
    assert!(clock.elapsed() < Duration::from_secs(5));
}

#[test]
fn refusals_are_final_and_explained() {
    let said = r#"{"error": {"message": "Incorrect API key"}}"#;
    let server = FakeJudge::new([Act::Status(401, "", said), Act::Status(404, "", "")]);
    let judge = Judge::new(settings(&server)).unwrap();
    let error = judge.check().unwrap_err();
    assert!(error.to_string().contains("status 401") && error.to_string().contains("Incorrect API key"));
    assert!(error.hint().unwrap().contains("OPENAI_API_KEY") && !error.to_string().contains("secret"));
    assert!(grade(&judge).unwrap_err().contains("status 404"));
    assert_eq!(server.requests().len(), 2);
    assert!(Judge::new(JudgeSettings { url: "localhost:1".into(), ..settings(&server) }).is_err());
}

#[test]
fn no_question_is_asked_twice() {
    let folder = tempfile::tempdir().unwrap();
    let server = FakeJudge::new([Act::Say("score: 0.25")]);
    let cached = || JudgeSettings { cache: Some(folder.path().join("deep/cache")), ..settings(&server) };
    let judge = Judge::new(cached()).unwrap();
    assert_eq!(grade(&judge).unwrap(), "score: 0.25");
    // Another process finds the reply; the key is not kept.
    let judge = Judge::new(JudgeSettings { key: None, ..cached() }).unwrap();
    assert_eq!(grade(&judge).unwrap(), "score: 0.25");
    assert_eq!(server.requests().len(), 1);
    let files: Vec<_> = std::fs::read_dir(folder.path().join("deep/cache")).unwrap().collect();
    let file = files[0].as_ref().unwrap().path();
    assert!(files.len() == 1 && !std::fs::read_to_string(&file).unwrap().contains("secret"));
    // Another attempt, another model and another text are other questions.
    assert_eq!(judge.grade(Role::VisCot, &VALUES, 1).unwrap().unwrap(), "score: 1");
    let other = Judge::new(JudgeSettings { model: "wiser".into(), ..cached() }).unwrap();
    assert_eq!(grade(&other).unwrap(), "score: 1");
    assert_eq!(server.requests().len(), 2);
    // A damaged file is asked for again and replaced.
    std::fs::write(&file, "{").unwrap();
    assert_eq!(grade(&judge).unwrap(), "score: 1");
    assert_eq!(grade(&judge).unwrap(), "score: 1");
    assert_eq!(server.requests().len(), 1);
    // Failures are not kept.
    for _ in 0..3 {
        server.then(Act::Status(500, "", ""));
    }
    assert!(judge.grade(Role::VisCot, &VALUES, 7).unwrap().is_err());
    assert!(judge.grade(Role::VisCot, &VALUES, 7).unwrap().is_ok());
}

#[test]
fn prompts_can_be_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let put = |text: &str| std::fs::write(folder.path().join("viscot.txt"), text).unwrap();
    put("temperature: 1\n\n[user]\n{question}|{reference}|{answer}\n");
    let server = FakeJudge::new([]);
    let own = || JudgeSettings { prompts: Some(folder.path().to_owned()), ..settings(&server) };
    let judge = Judge::new(own()).unwrap();
    grade(&judge).unwrap();
    let (_, body) = server.requests().remove(0);
    assert_eq!(body["messages"][0]["content"], "What {answer}?|a dog|a cat");
    assert_eq!(body["messages"].as_array().unwrap().len(), 1);
    let usual = Judge::new(settings(&server)).unwrap();
    assert_ne!(judge.describe(Role::VisCot), usual.describe(Role::VisCot));
    assert_eq!(judge.describe(Role::MmVet), usual.describe(Role::MmVet));
    put("[user]\n{question}");
    let error = Judge::new(own()).unwrap_err();
    assert!(error.to_string().contains("viscot.txt") && error.to_string().contains("{reference}"), "{error}");
}

/// A check is sent once whatever comes, and neither kept nor found in the cache.
#[test]
fn a_check_is_about_the_server_as_it_is_now() {
    let folder = tempfile::tempdir().unwrap();
    let server = FakeJudge::new([Act::Say("ready"), Act::Status(503, "", ""), Act::Say("ready")]);
    let settings = JudgeSettings { cache: Some(folder.path().to_owned()), ..settings(&server) };
    let judge = Judge::new(settings).unwrap();
    judge.check().unwrap();
    let error = judge.check().unwrap_err();
    assert!(error.to_string().contains("status 503"), "{error}");
    judge.check().unwrap();
    assert_eq!(server.requests().len(), 3);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_judge_that_never_replies_is_not_asked_for_ever() {
    let refusal = || Act::Status(400, "", r#"{"error": {"message": "no"}}"#);
    // Two refusals, a reply, then three more.
    let acts = [refusal(), refusal(), Act::Say("score: 0.5"), refusal(), refusal(), refusal()];
    let server = FakeJudge::new(acts);
    let folder = tempfile::tempdir().unwrap();
    let settings = JudgeSettings { cache: Some(folder.path().to_owned()), ..settings(&server) };
    let judge = Judge::new(settings).unwrap();
    let ask = |attempt: usize| judge.grade(Role::VisCot, &VALUES, attempt).unwrap();
    assert!(ask(0).is_err() && ask(1).is_err() && judge.halted().is_none());
    assert_eq!(ask(2).unwrap(), "score: 0.5");
    assert!(ask(3).is_err() && ask(4).is_err() && judge.halted().is_none());
    assert!(ask(5).unwrap_err().contains("status 400: no"));
    let error = judge.halted().unwrap();
    assert!(error.to_string().contains("after 3 questions without a reply"), "{error}");
    assert!(error.hint().unwrap().contains("flmm eval score"));
    assert_eq!(server.requests().len(), 6);
    // What is known is still found; nothing more is sent.
    assert_eq!(ask(2).unwrap(), "score: 0.5");
    assert!(ask(6).is_err() && server.requests().is_empty());
}
