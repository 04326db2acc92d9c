//! Chat completions.

use axum::http::StatusCode;
use flmm::grounder::AnswerOptions;
use flmm::lmm::Turn;
use flmm::masks::{Mask, Segmentation};
use flmm_serve::Settings;
use serde_json::{Value, json};

use crate::support::{
    NAME, app, app_with, chat, data_url, events, grounder, picture, question, repository, settings, with,
};

const QUESTION: &str = "What is in the picture?";

fn text(completion: &Value) -> &str {
    completion["choices"][0]["message"]["content"].as_str().unwrap()
}

fn annotations(completion: &Value) -> &[Value] {
    completion["choices"][0]["message"]["annotations"].as_array().unwrap()
}

fn mask(annotation: &Value) -> Mask {
    let segmentation: Segmentation = serde_json::from_value(annotation["segmentation"].clone()).unwrap();
    Mask::from_coco(&segmentation).unwrap()
}

#[tokio::test]
async fn an_answer_carries_its_phrases_and_masks() {
    let app = app();
    let answer = chat(&app, &question(QUESTION)).await;
    assert!(answer.headers.contains_key("x-request-id"));
    let completion = answer.ok();
    assert_eq!(completion["object"], "chat.completion");
    assert_eq!(completion["model"], NAME);
    assert_eq!(completion["choices"][0]["finish_reason"], "stop");
    let content: Vec<char> = text(&completion).chars().collect();
    assert!(!content.is_empty());

    // The same as from the library.
    let image = flmm::image_input::decode_image(&picture(), "scene").unwrap();
    let expected = grounder().answer(&image, &[Turn::user(QUESTION)], &AnswerOptions::default()).unwrap();
    assert_eq!(text(&completion), expected.answer);
    assert_eq!(completion["usage"]["completion_tokens"], expected.token_ids.len());
    let found = annotations(&completion);
    assert!(!found.is_empty());
    assert_eq!(found.len(), expected.phrases.len());
    for (number, (annotation, phrase)) in found.iter().zip(&expected.phrases).enumerate() {
        assert_eq!((&annotation["type"], &annotation["index"]), (&json!("grounding"), &json!(number)));
        assert_eq!(annotation["phrase"], phrase.text);
        let span =
            annotation["start"].as_u64().unwrap() as usize..annotation["end"].as_u64().unwrap() as usize;
        assert_eq!(content[span].iter().collect::<String>(), phrase.text);
        assert_eq!(annotation["tokens"], json!([phrase.tokens.0, phrase.tokens.1]));
        let mask = mask(annotation);
        assert_eq!((mask.width() as u32, mask.height() as u32), image.dimensions());
        assert_eq!(mask, phrase.mask);
        assert_eq!(annotation["bbox"], json!(mask.bbox()));
        assert_eq!(annotation["area"], mask.area());
        assert!((0.0..=1.0).contains(&annotation["score"].as_f64().unwrap()));
        assert!(annotation.get("coarse").is_none());
    }
    let usage = &completion["usage"];
    let count = |name: &str| usage[name].as_u64().unwrap();
    assert_eq!(count("prompt_tokens") + count("completion_tokens"), count("total_tokens"));
    assert!(count("prompt_tokens") > 144, "image tokens count");
}

#[tokio::test]
async fn the_text_does_not_depend_on_grounding_or_streaming() {
    for sampling in [json!({}), json!({"temperature": 1.3, "top_p": 0.9, "seed": 11})] {
        let mut texts = Vec::new();
        let mut masks: Vec<Vec<Value>> = Vec::new();
        for grounding in [json!(true), json!(false), json!({"phrases": "noun_phrases", "mask": "none"})] {
            // A router of its own each, so that no picture is known.
            let app = app();
            let asked = with(with(question(QUESTION), sampling.clone()), json!({"grounding": grounding}));
            let completion = chat(&app, &asked).await.ok();
            texts.push(text(&completion).to_owned());
            assert_eq!(annotations(&completion).is_empty(), grounding == json!(false));
            let streamed = chat(&self::app(), &with(asked, json!({"stream": true}))).await;
            assert_eq!(streamed.status, StatusCode::OK);
            let (text, told, _) = read(&events(&streamed.body));
            texts.push(text);
            assert_eq!(told, annotations(&completion));
            masks.push(told);
        }
        assert!(!texts[0].is_empty() && texts.iter().all(|text| *text == texts[0]), "{texts:?}");
        assert!(!masks[0].is_empty());
    }
}

/// Text, annotations and usage of a stream, whose form is checked.
fn read(events: &[(String, String)]) -> (String, Vec<Value>, Option<Value>) {
    let (mut text, mut told, mut usage) = (String::new(), Vec::new(), None);
    let (last, chunks) = events.split_last().unwrap();
    assert_eq!(last, &(String::new(), "[DONE]".to_owned()));
    let mut finished = false;
    for (number, (name, data)) in chunks.iter().enumerate() {
        let chunk: Value = serde_json::from_str(data).unwrap();
        assert_eq!(chunk["object"], "chat.completion.chunk");
        if let Some(counts) = chunk.get("usage") {
            assert!(finished && chunk["choices"] == json!([]));
            usage = Some(counts.clone());
            continue;
        }
        let choice = &chunk["choices"][0];
        let delta = &choice["delta"];
        assert_eq!(delta.get("role").is_some(), number == 0);
        assert!(!finished, "nothing but usage follows the last chunk");
        finished = !choice["finish_reason"].is_null();
        if let Some(content) = delta["content"].as_str() {
            assert_eq!(name, "");
            text += content;
        }
        if let Some(annotations) = delta["annotations"].as_array() {
            assert_eq!((name.as_str(), annotations.len()), ("grounding", 1));
            // A phrase is told when its text has been.
            assert!(annotations[0]["end"].as_u64().unwrap() as usize <= text.chars().count());
            told.extend(annotations.clone());
        }
    }
    assert!(finished);
    (text, told, usage)
}

#[tokio::test]
async fn phrases_are_told_while_the_answer_grows() {
    let asked = with(
        question("Please give me a description of the image."),
        json!({"stream": true, "stream_options": {"include_usage": true}}),
    );
    let streamed = chat(&app(), &asked).await;
    assert_eq!(streamed.headers["content-type"], "text/event-stream");
    let events = events(&streamed.body);
    let (text, told, usage) = read(&events);
    assert!(told.len() > 1, "{text}");
    let first = events.iter().position(|(name, _)| name == "grounding").unwrap();
    let texts_after = events[first..].iter().filter(|(_, data)| data.contains(r#""content""#)).count();
    assert!(texts_after > 1, "the first phrase came at the end");
    let usage = usage.unwrap();
    assert!(usage["completion_tokens"].as_u64().unwrap() > 1);
}

#[tokio::test]
async fn a_second_question_does_not_look_again() {
    let app = app();
    let first = chat(&app, &question(QUESTION)).await.ok();
    assert_eq!(first["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let again = chat(&app, &question(QUESTION)).await.ok();
    assert!(again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 144);
    assert_eq!(text(&first), text(&again));
    assert_eq!(annotations(&first).len(), annotations(&again).len());

    let mut conversation = question(QUESTION);
    let messages = conversation["messages"].as_array_mut().unwrap();
    messages.push(json!({"role": "assistant", "content": text(&first)}));
    messages.push(json!({"role": "user", "content": "What is in the background?"}));
    let second = chat(&app, &conversation).await.ok();
    let cached = second["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(cached > again["usage"]["prompt_tokens"].as_u64().unwrap() - 2, "{cached}");
    assert!(!text(&second).is_empty());

    // What the model refuses does not cost what is known of the picture.
    assert_eq!(chat(&app, &question(" ")).await.error(), (400, "invalid_request".to_owned()));
    let after = chat(&app, &question(QUESTION)).await.ok();
    assert!(after["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 144);
}

#[tokio::test]
async fn pictures_are_kept_within_a_bound_and_the_least_recently_used_goes() {
    let ask = async |app: &axum::Router, file: &str| {
        let picture = std::fs::read(repository(file)).unwrap();
        let content = json!([
            {"type": "image_url", "image_url": {"url": data_url(&picture)}}, {"type": "text", "text": QUESTION},
        ]);
        let completion = chat(app, &json!({"messages": [{"role": "user", "content": content}]})).await.ok();
        completion["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 0
    };
    let (a, b, c) = ("examples/scene.png", "examples/book-and-dog.png", "examples/colours.png");
    // Room for two pictures and a half.
    let grounder = grounder();
    let image = flmm::image_input::decode_image(&picture(), "scene").unwrap();
    let mut session = grounder.start(&image).unwrap();
    grounder.ask(&mut session, QUESTION, &AnswerOptions::default()).unwrap();
    let app = app_with(Settings { prefix_cache_bytes: session.bytes() * 5 / 2, ..settings() });
    let mut known = Vec::new();
    for file in [a, b, a, b, c, b, a, c] {
        known.push(ask(&app, file).await);
    }
    assert_eq!(known, [false, false, true, true, false, true, false, false]);
    let nothing = app_with(Settings { prefix_cache_bytes: 0, ..settings() });
    assert!(!ask(&nothing, a).await && !ask(&nothing, a).await);
}

#[tokio::test]
async fn answers_end_where_they_are_told_to() {
    let app = app();
    let whole = chat(&app, &question(QUESTION)).await.ok();
    let short = chat(&app, &with(question(QUESTION), json!({"max_tokens": 2}))).await.ok();
    assert_eq!(short["choices"][0]["finish_reason"], "length");
    assert_eq!(short["usage"]["completion_tokens"], 2);
    assert!(text(&whole).starts_with(text(&short)) && text(&short).len() < text(&whole).len());
    let word = text(&whole).split(' ').nth(2).unwrap();
    let stopped = chat(&app, &with(question(QUESTION), json!({"stop": word}))).await.ok();
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    assert!(text(&whole).starts_with(text(&stopped)) && !text(&stopped).contains(word));
    let many = with(question(QUESTION), json!({"max_completion_tokens": 100_000, "stop": ["zzz"]}));
    assert_eq!(text(&chat(&app, &many).await.ok()), text(&whole));
}

#[tokio::test]
async fn masks_come_in_every_form() {
    let app = app();
    let ask = async |mask: &str| {
        let grounding = json!({"grounding": {"mask": mask, "coarse": true}});
        annotations(&chat(&app, &with(question(QUESTION), grounding)).await.ok()).to_vec()
    };
    let rle = ask("rle").await;
    let (polygons, png, none) = (ask("polygons").await, ask("png").await, ask("none").await);
    for (number, whole) in rle.iter().enumerate() {
        let mask = mask(whole);
        assert!(whole["coarse"]["counts"].is_string());
        let outlines: Vec<Vec<f64>> =
            serde_json::from_value(polygons[number]["segmentation"].clone()).unwrap();
        let filled = Mask::from_polygons(&outlines, mask.width(), mask.height()).unwrap();
        assert!(filled.iou(&mask).unwrap() > 0.95, "holes are filled, nothing else changes");
        let url = png[number]["segmentation"].as_str().unwrap().to_owned();
        let bytes = url.strip_prefix("data:image/png;base64,").unwrap();
        let bytes = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, bytes).unwrap();
        let grey = image::load_from_memory(&bytes).unwrap().into_luma8();
        let drawn =
            Mask::from_fn(mask.width(), mask.height(), |x, y| grey.get_pixel(x as u32, y as u32).0[0] == 255);
        assert_eq!(drawn, mask);
        assert!(none[number].get("segmentation").is_none() && none[number].get("coarse").is_none());
        assert_eq!(none[number]["bbox"], whole["bbox"]);
    }
}
