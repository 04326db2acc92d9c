//! Grounding of given text, and attention.

use axum::http::StatusCode;
use flmm::Grounder;
use flmm::grounder::ModelPaths;
use flmm_serve::Named;
use serde_json::{Value, json};

use crate::support::{app, data_url, get, picture, post, question, repository, settings, with};

fn ground(more: Value) -> Value {
    with(json!({"image": {"url": data_url(&picture())}, "text": "A dog and a ball."}), more)
}

#[tokio::test]
async fn given_text_is_grounded() {
    let app = app();
    let answer = post(&app, "/v1/ground", &ground(json!({"phrases": ["a ball", "A dog"]}))).await.ok();
    let phrases: Vec<&Value> =
        answer["annotations"].as_array().unwrap().iter().map(|a| &a["phrase"]).collect();
    assert_eq!(phrases, ["a ball", "A dog"]);
    assert_eq!(answer["annotations"][0]["start"], 10);
    let image = image::load_from_memory(&picture()).unwrap();
    assert_eq!(answer["image"], json!({"width": image.width(), "height": image.height()}));
    assert_eq!(answer["annotations"][0]["segmentation"]["size"], json!([image.height(), image.width()]));
    let nouns = post(&app, "/v1/ground", &ground(json!({"phrases": "noun_phrases"}))).await.ok();
    assert_eq!(nouns["annotations"].as_array().unwrap().len(), 2);
    assert_eq!(nouns["timings_ms"]["encode"], 0.0, "the picture is known");
}

#[tokio::test]
async fn what_cannot_be_grounded_is_refused() {
    let app = app();
    for (more, code) in [
        (json!({"phrases": ["a cat"]}), "invalid_request"),
        (json!({"phrases": ["A", "dog", "and", "a"]}), "too_many_phrases"),
        (json!({"text": " "}), "invalid_request"),
        (json!({"threshold": 2}), "invalid_threshold"),
        (json!({"colour": 2}), "invalid_json"),
    ] {
        assert_eq!(post(&app, "/v1/ground", &ground(more)).await.error(), (400, code.to_owned()));
    }
}

/// The question with an answer to it.
fn answered(more: Value) -> Value {
    let mut value = question("What is in the picture?");
    value["messages"]
        .as_array_mut()
        .unwrap()
        .push(json!({"role": "assistant", "content": "A dog and a ball."}));
    with(value, more)
}

#[tokio::test]
async fn attention_is_what_the_decoder_computed() {
    let app = app();
    let read = async |more: Value| {
        let answer = post(&app, "/v1/attention", &answered(more)).await;
        assert_eq!(answer.status, StatusCode::OK, "{:?}", answer.body);
        let (_, header) = safetensors::SafeTensors::read_metadata(&answer.body).unwrap();
        let told = header.metadata().clone().unwrap();
        let file = safetensors::SafeTensors::deserialize(&answer.body).unwrap();
        let tensor = file.tensor("attention").unwrap();
        let values: Vec<f32> =
            tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        (tensor.shape().to_vec(), values, told)
    };
    let models = get(&app, "/v1/models").await.ok();
    let (layers, heads) =
        (models["data"][0]["layers"].as_u64().unwrap(), models["data"][0]["heads"].as_u64().unwrap());
    let (shape, all, told) = read(json!({})).await;
    assert_eq!(told["text"], "A dog and a ball.");
    let offsets: Vec<(usize, usize)> = serde_json::from_str(&told["offsets"]).unwrap();
    assert_eq!(shape, [offsets.len(), 1, layers as usize, heads as usize, 12, 12]);
    let cells = 144;
    // Shares of one token's attention, of which the rest goes to text.
    for row in all.chunks_exact(cells) {
        let sum: f32 = row.iter().sum();
        assert!(row.iter().all(|&p| (0.0..=1.0).contains(&p)) && sum <= 1.001);
    }
    let (shape, part, _) = read(json!({"tokens": [1], "layers": [5], "heads": [0, 2]})).await;
    assert_eq!(shape, [1, 1, 1, 2, 12, 12]);
    let place = |token: usize, layer: usize, head: usize| {
        let row = (token * layers as usize + layer) * heads as usize + head;
        &all[row * cells..(row + 1) * cells]
    };
    let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
    assert!(close(&part[..cells], place(1, 5, 0)) && close(&part[cells..], place(1, 5, 2)));
    let (shape, mean, _) = read(json!({"tokens": [1], "merge": "mean"})).await;
    assert_eq!(shape, [1, 1, 1, 1, 12, 12]);
    let rows = (layers * heads) as usize;
    let expected: Vec<f32> = (0..cells)
        .map(|cell| {
            all[rows * cells..2 * rows * cells].iter().skip(cell).step_by(cells).sum::<f32>() / rows as f32
        })
        .collect();
    assert!(close(&mean, &expected));

    let png = post(&app, "/v1/attention", &answered(json!({"tokens": [1], "format": "png"}))).await;
    assert_eq!(png.headers["content-type"], "image/png");
    let (drawn, image) =
        (image::load_from_memory(&png.body).unwrap(), image::load_from_memory(&picture()).unwrap());
    assert_eq!((drawn.width(), drawn.height()), (image.width(), image.height()));
}

#[tokio::test]
async fn attention_that_there_is_not_is_refused() {
    let app = app();
    for more in [json!({"layers": [99]}), json!({"heads": [5]}), json!({"tokens": [99]})] {
        let answer = post(&app, "/v1/attention", &answered(more)).await;
        assert_eq!(answer.error(), (400, "invalid_request".to_owned()));
    }
    let open = post(&app, "/v1/attention", &question("Where?")).await;
    assert_eq!(open.error(), (400, "no_answer".to_owned()));
    let other = post(&app, "/v1/attention", &answered(json!({"image": 1}))).await;
    assert_eq!(other.error(), (400, "no_such_image".to_owned()));
}

#[tokio::test]
async fn a_conversation_may_be_about_several_pictures() {
    let paths = ModelPaths {
        model: repository("fixtures/lmm/deepseek_vl_1_3b/model"),
        sam: repository("fixtures/lmm/_sam/sam_vit_tiny.pth"),
        head: None,
    };
    let grounder = Grounder::open(&paths, &candle_core::Device::Cpu, candle_core::DType::F32).unwrap();
    let app = flmm_serve::app(settings(), Named { name: "random".into(), grounder }).unwrap();
    let model = get(&app, "/v1/models").await.ok()["data"][0].clone();
    assert_eq!(model["several_images"], true);
    let image = |file: &str| {
        let bytes = std::fs::read(repository(file)).unwrap();
        json!({"type": "image_url", "image_url": {"url": data_url(&bytes)}})
    };
    let text = |text: &str| json!({"type": "text", "text": text});
    let content = [
        image("examples/scene.png"),
        text("Here is one, and here "),
        image("examples/colours.png"),
        text(" another. What differs?"),
    ];
    let asked = json!({"messages": [{"role": "user", "content": content}], "max_tokens": 6,
        "grounding": {"image": 1, "phrases": "noun_phrases"}});
    let answer = post(&app, "/v1/chat/completions", &asked).await.ok();
    let tokens = model["image_tokens"].as_u64().unwrap();
    assert!(answer["usage"]["prompt_tokens"].as_u64().unwrap() > 2 * tokens);

    let mut looked = asked["messages"].as_array().unwrap().clone();
    looked.push(json!({"role": "assistant", "content": "A dog."}));
    let looked = json!({"messages": looked, "image": 1, "layers": [0], "heads": [0]});
    let answer = post(&app, "/v1/attention", &looked).await;
    assert_eq!(answer.status, StatusCode::OK, "{:?}", answer.body);
    // The question about the same two pictures had read them.
    let other = with(asked, json!({"grounding": false}));
    let again = post(&app, "/v1/chat/completions", &other).await.ok();
    assert!(again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 2 * tokens);
}
