//! Names by which the server is asked.
//!
//! A web page can have a name of its own lead to 127.0.0.1 once it is loaded (DNS rebinding) and would then be let at a server
//! on the visitor's machine as if it came from there. Its requests carry that name as `Host`; a server that asks for no keys
//! and listens at loopback answers to addresses, to `localhost` and to names it was told.

use std::net::IpAddr;

use axum::extract::{Request, State};
use axum::http::{StatusCode, header, uri::Authority};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::app::App;
use crate::error::ApiError;
use crate::settings::Settings;

/// Refuses requests under a name that is not the server's.
pub(crate) async fn check(State(app): State<App>, request: Request, next: Next) -> Response {
    let host = request.headers().get(header::HOST);
    // Browsers always send one.
    let known = host.is_none_or(|host| host.to_str().is_ok_and(|host| is_known(host, app.settings())));
    match known {
        true => next.run(request).await,
        false => {
            let message = "this server does not answer to the name in `Host`";
            ApiError::new(StatusCode::MISDIRECTED_REQUEST, "unknown_host", message)
                .hint("use its address, or start it with --allow-host NAME")
                .into_response()
        }
    }
}

fn is_known(host: &str, settings: &Settings) -> bool {
    if !settings.addr.ip().is_loopback() || !settings.api_keys.is_empty() {
        return true;
    }
    let Ok(authority) = host.parse::<Authority>() else { return false };
    let name = authority.host();
    let address = name.trim_start_matches('[').trim_end_matches(']');
    address.parse::<IpAddr>().is_ok()
        || name.eq_ignore_ascii_case("localhost")
        || settings.hosts.iter().any(|known| known.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_names_do_not_lead_to_loopback() {
        let mut settings = Settings { hosts: vec!["pictures.example".into()], ..Settings::default() };
        for host in
            ["127.0.0.1:8080", "localhost", "LOCALHOST:1", "[::1]:8080", "10.0.0.1", "pictures.example:80"]
        {
            assert!(is_known(host, &settings), "{host}");
        }
        for host in ["evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "", "a b"] {
            assert!(!is_known(host, &settings), "{host}");
        }
        settings.api_keys.push("key".into());
        assert!(is_known("evil.example", &settings), "keys keep strangers out");
    }
}
