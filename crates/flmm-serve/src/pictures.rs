//! Pictures of a request: where they are, and what they are before they are decoded.

use axum::http::StatusCode;
use base64::Engine as _;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use flmm::image_input::Limits;

use crate::app::App;
use crate::body::{Room, off_the_loop};
use crate::error::ApiError;
use crate::work::Shown;

/// Standard base64, with or without its padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Brings the pictures at `urls` and checks their headers; nothing is decoded. `room` is that of the body they came with.
///
/// # Errors
/// [`ApiError`] 400 for an address of another kind and for what is no picture, 403 for an address that may not be
/// fetched, 502 if fetching fails, 503 if there is no room for what would be fetched.
pub(crate) async fn bring(app: &App, urls: Vec<String>, mut room: Room) -> Result<Shown, ApiError> {
    let limits = &app.settings().limits;
    let mut files = Vec::with_capacity(urls.len());
    for (number, url) in urls.into_iter().enumerate() {
        let fetcher = app.fetcher().filter(|_| is_remote(&url));
        let slot = match fetcher {
            Some(fetcher) => fetcher.slot().await,
            None => None,
        };
        // What is fetched is no part of the body, and its size is not known before.
        let fetched = fetcher.map(|_| Room::take(app.bodies(), limits.body_bytes)).transpose()?;
        // Fetching waits, however short the address.
        let bytes = if fetcher.is_some() { usize::MAX } else { url.len() };
        let shared = app.clone();
        let work = move || {
            // Held until the thread is free again, also if the client goes away meanwhile.
            let _slot = slot;
            one(&shared, number, &url)
        };
        let file = off_the_loop(bytes, work).await?;
        if let Some(mut fetched) = fetched {
            fetched.shrink_to(file.len());
            room.join(fetched);
        }
        files.push(file);
    }
    Ok(Shown::new(files, room, limits.picture()))
}

fn one(app: &App, number: usize, url: &str) -> Result<Vec<u8>, ApiError> {
    let limits = &app.settings().limits;
    let name = format!("image {number}");
    let file = match url.split_once(':') {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("data") => data(rest, &name)?,
        _ if is_remote(url) => {
            let fetcher = app.fetcher().ok_or_else(|| {
                let message = "this server does not fetch pictures";
                ApiError::new(StatusCode::FORBIDDEN, "remote_images_off", message)
                    .hint("send the picture itself: `data:image/png;base64,…`")
                    .param("image_url")
            })?;
            fetcher.get(url, limits.body_bytes as u64)?
        }
        _ => {
            return Err(ApiError::bad_request(
                "unsupported_url",
                format!("{name} has an address of no known kind"),
            )
            .hint("send the picture itself: `data:image/png;base64,…`")
            .param("image_url"));
        }
    };
    flmm::image_input::image_size(&file, &name, &limits.picture())
        .map_err(|error| ApiError::from(error).param("image_url"))?;
    Ok(file)
}

fn is_remote(url: &str) -> bool {
    let scheme = url.split_once(':').map(|(scheme, _)| scheme.to_ascii_lowercase());
    matches!(scheme.as_deref(), Some("http" | "https"))
}

/// The content of a data URL without its scheme.
fn data(rest: &str, name: &str) -> Result<Vec<u8>, ApiError> {
    let wrong = |what: String| {
        ApiError::bad_request("invalid_data_url", what)
            .hint("write `data:image/png;base64,` and the file in base64 without line breaks")
            .param("image_url")
    };
    let (kind, content) =
        rest.split_once(',').ok_or_else(|| wrong(format!("the data URL of {name} has no comma")))?;
    if !kind.to_ascii_lowercase().ends_with(";base64") {
        return Err(wrong(format!("the data URL of {name} is not base64")));
    }
    BASE64.decode(content.trim()).map_err(|e| wrong(format!("the data URL of {name} is not base64: {e}")))
}

/// Decodes a picture whose header was checked.
pub(crate) fn decode(file: &[u8], number: usize, limits: &Limits) -> Result<image::RgbImage, ApiError> {
    let name = format!("image {number}");
    let decoded = flmm::image_input::decode_image_with(file, &name, limits);
    decoded.map_err(|error| ApiError::from(error).param("image_url"))
}
