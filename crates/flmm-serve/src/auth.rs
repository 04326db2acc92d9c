//! API keys.

use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use crate::app::App;
use crate::error::ApiError;

/// The keys that are accepted, as digests: neither a comparison's time nor a memory dump tells a key.
pub(crate) struct Keys(Vec<[u8; 32]>);

impl Keys {
    pub(crate) fn new(keys: &[String]) -> Self {
        Self(keys.iter().map(|key| Sha256::digest(key.as_bytes()).into()).collect())
    }

    /// Whether `key` is one of them. All are compared, whatever is found.
    fn accept(&self, key: &str) -> bool {
        let digest: [u8; 32] = Sha256::digest(key.as_bytes()).into();
        let found = self.0.iter().fold(Choice::from(0), |found, known| found | known.ct_eq(&digest));
        found.into()
    }
}

/// Lets requests through that carry a key, or all where there are no keys.
pub(crate) async fn check(State(app): State<App>, request: Request, next: Next) -> Response {
    let keys = app.keys();
    if keys.0.is_empty() {
        return next.run(request).await;
    }
    let given = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let key = given.and_then(|value| {
        let (scheme, key) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
    });
    match key {
        Some(key) if keys.accept(key) => next.run(request).await,
        given => {
            let what = if given.is_some() { "the API key is not known" } else { "an API key is needed" };
            let hint = "send `Authorization: Bearer KEY` with a key from the server's operator";
            ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", what).hint(hint).into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Keys;

    #[test]
    fn only_whole_keys_are_accepted() {
        let keys = Keys::new(&["alpha".into(), "beta".into()]);
        assert!(keys.accept("alpha") && keys.accept("beta"));
        assert!(["", "alph", "alphaa", "ALPHA"].iter().all(|key| !keys.accept(key)));
    }
}
