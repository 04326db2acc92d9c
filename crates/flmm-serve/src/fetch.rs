//! Pictures from the network, never from a private one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use ureq::Agent;
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};

use crate::error::ApiError;
use crate::settings::Limits;

const MAX_REDIRECTS: u32 = 3;
/// Pictures that are fetched at a time: half of the threads that the server has for what blocks, so that slow addresses hold
/// up nobody who sends pictures.
const AT_A_TIME: usize = 8;

/// Fetches files over http and https.
pub(crate) struct Fetcher {
    agent: Agent,
    slots: Arc<Semaphore>,
}

/// Finds addresses as usual and refuses names that lead to a private network. ureq connects to exactly the addresses that
/// are returned here, and asks anew at every redirect, so there is no second look-up to be tricked.
#[derive(Debug)]
struct PublicOnly {
    default: DefaultResolver,
    public: fn(IpAddr) -> bool,
}

impl Resolver for PublicOnly {
    fn resolve(
        &self,
        uri: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let found = self.default.resolve(uri, config, timeout)?;
        match found.iter().all(|address| (self.public)(address.ip())) {
            true => Ok(found),
            false => Err(ureq::Error::Other(Box::new(NotPublic))),
        }
    }
}

/// A name led to an address that is not public.
#[derive(Debug, thiserror::Error)]
#[error("the address is not public")]
struct NotPublic;

impl Fetcher {
    /// A client that knows no cookies, no proxies and no credentials.
    pub(crate) fn new(limits: &Limits) -> Self {
        Self::with_rule(limits.fetch_time, is_public)
    }

    fn with_rule(time: Duration, public: fn(IpAddr) -> bool) -> Self {
        let config = Agent::config_builder()
            .timeout_global(Some(time))
            .max_redirects(MAX_REDIRECTS)
            .max_response_header_size(16 << 10)
            // A proxy would look names up itself, out of reach of the rule above.
            .proxy(None)
            .user_agent(concat!("flmm/", env!("CARGO_PKG_VERSION")))
            .build();
        let resolver = PublicOnly { default: DefaultResolver::default(), public };
        let agent = Agent::with_parts(config, DefaultConnector::default(), resolver);
        Self { agent, slots: Arc::new(Semaphore::new(AT_A_TIME)) }
    }

    /// Waits for one's turn; to be held by the thread that calls [`Fetcher::get`].
    pub(crate) async fn slot(&self) -> Option<OwnedSemaphorePermit> {
        self.slots.clone().acquire_owned().await.ok()
    }

    /// The file at `url`, at most `limit` bytes.
    ///
    /// # Errors
    /// [`ApiError`] 400 for a malformed address, 403 for one that is not public, 413 for a larger file, 502 for
    /// everything that goes wrong on the way.
    pub(crate) fn get(&self, url: &str, limit: u64) -> Result<Vec<u8>, ApiError> {
        let uri: Uri = url.parse().map_err(|_| {
            ApiError::bad_request("unsupported_url", "the address of a picture is malformed")
                .param("image_url")
        })?;
        if uri.authority().is_none_or(|authority| authority.as_str().contains('@')) {
            let message = "the address of a picture carries credentials, or no host";
            return Err(ApiError::bad_request("unsupported_url", message).param("image_url"));
        }
        let mut response = self.agent.get(uri).call().map_err(explain)?;
        response.body_mut().with_config().limit(limit).read_to_vec().map_err(explain)
    }
}

/// Says no more than that it failed: what answers at some address is not a client's business.
fn explain(error: ureq::Error) -> ApiError {
    let (status, code, message) = match &error {
        ureq::Error::Other(other) if other.is::<NotPublic>() => {
            (StatusCode::FORBIDDEN, "address_not_public", "pictures are fetched from public addresses only")
        }
        ureq::Error::BodyExceedsLimit(_) => (
            StatusCode::PAYLOAD_TOO_LARGE,
            "image_too_large",
            "the file at the picture's address is too large",
        ),
        ureq::Error::Timeout(_) => {
            (StatusCode::BAD_GATEWAY, "fetch_timeout", "the picture's address took too long to answer")
        }
        _ => (StatusCode::BAD_GATEWAY, "fetch_failed", "the picture could not be fetched from its address"),
    };
    tracing::debug!(%error, "a picture was not fetched");
    ApiError::new(status, code, message).param("image_url")
}

/// Whether an address is one of the internet at large.
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    // "This network" 0/8, shared 100.64/10, protocol assignments 192.0.0/24, benchmarks 198.18/15, reserved 240/4.
    let special = a == 0
        || (a == 100 && (64..128).contains(&b))
        || (a, b, c) == (192, 0, 0)
        || (a == 198 && (18..20).contains(&b))
        || a >= 240;
    !(special
        || address.is_private()
        || address.is_loopback()
        || address.is_link_local()
        || address.is_documentation()
        || address.is_multicast())
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let [a, b, c, d, e, f, g, h] = address.segments();
    let low = Ipv4Addr::from((u32::from(g) << 16) | u32::from(h));
    match (a, b, c, d, e, f) {
        // Addresses of IPv4 in another dress: mapped, translated (NAT64).
        (0, 0, 0, 0, 0, 0xffff) | (0x64, 0xff9b, 0, 0, 0, 0) => is_public_v4(low),
        // 6to4.
        (0x2002, ..) => is_public_v4(Ipv4Addr::from((u32::from(b) << 16) | u32::from(c))),
        // Only 2000::/3 is handed out; of it, 2001::/23 is for protocols, 2001:db8::/32 and 3fff::/20 for examples.
        (0x2001, b, ..) if b < 0x200 || b == 0xdb8 => false,
        (0x3fff, b, ..) if b < 0x1000 => false,
        _ => (0x2000..0x4000).contains(&a),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn private_addresses_are_known() {
        let private = [
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "0.0.0.0",
            "100.64.0.1",
            "198.18.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "192.0.2.1",
            "::1",
            "::",
            "fe80::1",
            "fc00::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::127.0.0.1",
            "64:ff9b::a00:1",
            "2002:7f00:1::",
            "2001::1",
            "2001:db8::1",
        ];
        for address in private {
            assert!(!is_public(address.parse().unwrap()), "{address}");
        }
        for address in
            ["1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]
        {
            assert!(is_public(address.parse().unwrap()), "{address}");
        }
    }

    /// Answers one request at `host` with `response`.
    fn answer(host: &str, response: Vec<u8>) -> String {
        let listener = TcpListener::bind((host, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            if let Ok((mut stream, _)) = listener.accept() {
                let _ = stream.read(&mut [0; 4096]);
                let _ = stream.write_all(&response);
            }
        });
        format!("http://{address}/a.png")
    }

    /// Lets 127.0.0.1 pass for public.
    fn lenient(address: IpAddr) -> bool {
        address == IpAddr::V4(Ipv4Addr::LOCALHOST)
    }

    fn ok(body: &[u8]) -> Vec<u8> {
        [format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len()).as_bytes(), body].concat()
    }

    fn to(url: &str) -> Vec<u8> {
        format!("HTTP/1.1 302 Found\r\nLocation: {url}\r\nContent-Length: 0\r\n\r\n").into_bytes()
    }

    #[test]
    fn redirects_do_not_lead_to_a_private_network() {
        let fetcher = Fetcher::with_rule(Duration::from_secs(5), lenient);
        let good = answer("127.0.0.1", ok(b"picture"));
        assert_eq!(fetcher.get(&answer("127.0.0.1", to(&good)), 100).unwrap(), b"picture");
        let hidden = answer("127.0.0.2", ok(b"secret"));
        let code = |url: &str| fetcher.get(url, 3).unwrap_err().code;
        assert_eq!(code(&hidden), "address_not_public");
        assert_eq!(code(&answer("127.0.0.1", to(&hidden))), "address_not_public");
        assert_eq!(code(&answer("127.0.0.1", to("file:///etc/passwd"))), "fetch_failed");
        assert_eq!(code(&answer("127.0.0.1", ok(b"large"))), "image_too_large");
        assert_eq!(code("http://user:password@127.0.0.1/"), "unsupported_url");
        let strict = Fetcher::new(&Limits::default());
        assert_eq!(strict.get("http://localhost:1/", 1).unwrap_err().code, "address_not_public");
    }

    #[test]
    fn slow_answers_are_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let fetcher = Fetcher::with_rule(Duration::from_millis(200), lenient);
        assert_eq!(fetcher.get(&url, 100).unwrap_err().code, "fetch_timeout");
    }
}
