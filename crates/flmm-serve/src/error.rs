//! The one error that clients see, in the form of OpenAI's.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

/// Why a request was not served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// Status of the response.
    pub status: StatusCode,
    /// What is wrong, as a word that programs can compare.
    pub code: &'static str,
    /// What is wrong, in words.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
    /// The part of the request at fault.
    pub param: Option<&'static str>,
    /// Seconds after which another attempt may succeed.
    pub retry_after: Option<u64>,
}

/// The body of a response that is an error.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorDetail,
}

/// What went wrong, in the fields of OpenAI's errors and a hint.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorDetail {
    /// What is wrong, in words.
    pub message: String,
    /// Kind of error: `invalid_request_error`, `authentication_error`, `rate_limit_error`, `server_error`.
    pub r#type: &'static str,
    /// The part of the request at fault.
    pub param: Option<&'static str>,
    /// What is wrong, as a word that programs can compare.
    pub code: &'static str,
    /// What to do about it.
    pub hint: Option<String>,
}

impl ApiError {
    /// An error without hint.
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), hint: None, param: None, retry_after: None }
    }

    /// The request is wrong in itself.
    pub fn bad_request(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }

    /// Something broke; what it was is in the log only.
    pub fn internal() -> Self {
        let message = "the server could not finish this request; its log says why";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
    }

    /// With what to do about it.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// With the part of the request at fault.
    pub fn param(mut self, param: &'static str) -> Self {
        self.param = Some(param);
        self
    }

    /// With the time after which another attempt may succeed.
    pub fn retry_after(mut self, seconds: u64) -> Self {
        self.retry_after = Some(seconds);
        self
    }

    /// The response's body, also of an event in a stream that has begun.
    pub fn body(&self) -> ErrorBody {
        let r#type = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        let (message, hint) = (self.message.clone(), self.hint.clone());
        ErrorBody { error: ErrorDetail { message, r#type, param: self.param, code: self.code, hint } }
    }
}

impl From<flmm::Error> for ApiError {
    fn from(error: flmm::Error) -> Self {
        let code = match &error {
            flmm::Error::Image { .. } => "invalid_image",
            flmm::Error::Request { .. } => "invalid_request",
            other => {
                // Paths and tensor names are the operator's business.
                tracing::error!(error = %other, "the model failed");
                return Self::internal();
            }
        };
        let made = Self::bad_request(code, error.to_string());
        match error.hint() {
            Some(hint) => made.hint(hint),
            None => made,
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response.extensions_mut().insert(Reason(self.code));
        response
    }
}

/// The code of an error, for the log and for metrics.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reason(pub(crate) &'static str);
