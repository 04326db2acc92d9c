//! The description of the interface, generated from the types.

use axum::Json;
use axum::response::IntoResponse;
use utoipa::OpenApi;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};

use crate::{attention, chat, ground, health, observe};

/// The interface.
#[derive(OpenApi)]
#[openapi(
    info(title = "flmm", description = "Grounded chat about pictures: OpenAI's chat interface, with masks."),
    paths(
        chat::complete,
        ground::ground,
        attention::attention,
        health::models,
        health::alive,
        health::ready,
        observe::metrics
    ),
    components(schemas(crate::api::Chunk)),
    modifiers(&Keys),
    security(("key" = []), ())
)]
struct Document;

/// Says that a key may be asked for.
struct Keys;

impl utoipa::Modify for Keys {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        if let Some(components) = &mut document.components {
            components.add_security_scheme("key", SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
        }
    }
}

/// `GET /openapi.json`
pub(crate) async fn document() -> impl IntoResponse {
    Json(Document::openapi())
}

#[cfg(test)]
mod tests {
    use utoipa::OpenApi;

    /// `openapi.json` is for readers and for those who generate clients; `FLMM_UPDATE_OPENAPI=1` writes it.
    #[test]
    fn the_file_in_the_repository_is_up_to_date() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");
        let made = super::Document::openapi().to_pretty_json().unwrap() + "\n";
        if std::env::var_os("FLMM_UPDATE_OPENAPI").is_some() {
            flmm::atomic::write(file, |to| to.write_all(made.as_bytes())).unwrap();
        }
        let kept = std::fs::read_to_string(file).unwrap_or_default();
        assert!(kept == made, "openapi.json is out of date: run this test with FLMM_UPDATE_OPENAPI=1");
    }
}
