//! The thin edge: sends a [`Call`], and reads what comes back.

use super::call::{self, Call, Method};
use super::error::{Effect, PveError};
use super::token::Token;
use crate::failpoints::around;
use crate::telemetry;
use crate::trust::{Distrust, Trust, TrustError, causes};
use bytes::Bytes;
use data_encoding::BASE64;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue, USER_AGENT};
use http::{Request, Response, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::ext::ReasonPhrase;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use mayfly_api::pinned::Pinned;
use rustls::pki_types::ServerName;
use secrecy::ExposeSecret;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Where the API answers below its address.
const API: &str = "/api2/json";
/// More than the largest answer: 16 MiB of a file, each byte six characters of JSON at worst.
const LARGEST_ANSWER: usize = 100 << 20;
/// A connection is not used again after a longer pause: what the server closes meanwhile would break a call.
const IDLE: Duration = Duration::from_secs(2);

/// Settings that cannot be used: which, and what is allowed.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The address.
    #[error("{address:?} is no address of a Proxmox VE API ({what}): https://host:8006 is wanted")]
    Address {
        /// What was given.
        address: String,
        /// What is wrong with it.
        what: String,
    },
    /// The token's id.
    #[error("{0:?} is no id of an API token: user@realm!name is wanted")]
    TokenId(String),
    /// The token's secret, which is not shown.
    #[error("the secret of the API token {0} is empty, or has characters that no secret has")]
    TokenSecret(String),
    /// Whose certificate is to be believed.
    #[error(transparent)]
    Trust(#[from] TrustError),
}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Until a connection stands.
    pub connect: Duration,
    /// A whole call, its connection and answer included. Proxmox VE itself waits up to 10 s for a lock.
    pub call: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            call: Duration::from_secs(40),
        }
    }
}

/// One API: an address, who we are there, and how we know that it is the right one.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// `https://host:8006`: any node of the cluster, or what stands in front of them.
    pub address: String,
    /// Who we are.
    pub token: Token,
    /// Whose certificate is believed.
    pub trust: Trust,
    /// How long things may take.
    pub limits: Limits,
}

/// A client of one API. Clones share its connections.
#[derive(Clone)]
pub struct Client {
    http: HttpClient<HttpsConnector<HttpConnector>, Full<Bytes>>,
    address: String,
    token: String,
    authorization: HeaderValue,
    pinned: Option<Arc<Pinned>>,
    tls: Arc<rustls::ClientConfig>,
    limits: Limits,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("address", &self.address)
            .field("token", &self.token)
            .finish_non_exhaustive()
    }
}

/// What every answer is wrapped in.
#[derive(Deserialize)]
struct Envelope<T> {
    data: T,
}

/// What is beside the data of a refusal.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Complaint {
    message: Option<String>,
    errors: BTreeMap<String, serde_json::Value>,
}

impl Client {
    /// Reads the authority's file if there is one; connects nowhere yet.
    ///
    /// # Errors
    /// See [`SettingsError`].
    pub fn new(endpoint: &Endpoint) -> Result<Self, SettingsError> {
        let address = checked_address(&endpoint.address)?;
        let (tls, pinned) = endpoint.trust.tls()?;
        let tls = Arc::new(tls);
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(endpoint.limits.connect));
        // HTTP/1.1 only: HTTP/2 has no reason phrase, and that is where Proxmox VE says what is wrong.
        let https = HttpsConnectorBuilder::new()
            .with_tls_config((*tls).clone())
            .https_only()
            .enable_http1()
            .wrap_connector(tcp);
        let http = HttpClient::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .build(https);
        Ok(Self {
            http,
            address,
            token: endpoint.token.id().to_owned(),
            authorization: endpoint.token.header()?,
            pinned,
            tls,
            limits: endpoint.limits,
        })
    }

    /// `https://host:8006`
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The id of the token.
    #[must_use]
    pub fn token(&self) -> &str {
        &self.token
    }

    /// Sends a call and waits for its answer. One that reads is sent once more if the connection breaks off: a server may
    /// close one at the moment it is used again. One that changes something is sent once.
    ///
    /// # Errors
    /// See [`PveError`]; [`PveError::retry`] says whether it may be sent again.
    pub async fn send<T: DeserializeOwned>(&self, call: &Call<T>) -> Result<T, PveError> {
        let exchange = async {
            match self.exchange(call).await {
                Err(PveError::BrokenOff {
                    effect: Effect::Reads,
                    ..
                }) => self.exchange(call).await,
                outcome => outcome,
            }
        };
        let bounded = async {
            let exchange = tokio::time::timeout(self.limits.call, exchange);
            exchange.await.unwrap_or_else(|_| {
                Err(PveError::NoAnswer {
                    call: call.describe(),
                    effect: call.effect(),
                    address: self.address.clone(),
                    limit: self.limits.call,
                })
            })
        };
        let pattern = call.pattern();
        around(&pattern, telemetry::call(pattern.clone(), bounded)).await
    }

    /// The certificate that is shown there, in PEM, if it is one that is believed.
    ///
    /// # Errors
    /// See [`PveError`].
    pub async fn certificate(&self) -> Result<String, PveError> {
        let call = call::version();
        let shake = async {
            let uri: Uri = self.address.parse().map_err(io::Error::other)?;
            let host = uri.host().unwrap_or_default();
            let socket =
                tokio::net::TcpStream::connect((host, uri.port_u16().unwrap_or(443))).await?;
            let name = host.trim_matches(['[', ']']).to_owned();
            let name = ServerName::try_from(name).map_err(io::Error::other)?;
            let connector = tokio_rustls::TlsConnector::from(self.tls.clone());
            connector.connect(name, socket).await
        };
        let shaken = tokio::time::timeout(self.limits.call, shake);
        let shaken = around("certificate", shaken)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(|error| self.transport(&call, &error, true))?;
        let shown = shaken.get_ref().1.peer_certificates();
        let leaf = shown.and_then(<[_]>::first).map(AsRef::as_ref);
        Ok(format!(
            "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n",
            BASE64.encode(leaf.unwrap_or_default())
        ))
    }

    async fn exchange<T: DeserializeOwned>(&self, call: &Call<T>) -> Result<T, PveError> {
        let request = self.request(call)?;
        let answer = self
            .http
            .request(request)
            .await
            .map_err(|error| self.transport(call, &error, error.is_connect()))?;
        let status = answer.status();
        let reason = reason(&answer);
        let body = Limited::new(answer.into_body(), LARGEST_ANSWER)
            .collect()
            .await
            .map_err(|error| self.transport(call, error.as_ref(), false))?
            .to_bytes();
        if status.is_success() {
            return serde_json::from_slice(&body)
                .map(|Envelope { data }| data)
                .map_err(|error| PveError::Strange {
                    call: call.describe(),
                    effect: call.effect(),
                    what: error.to_string(),
                });
        }
        // A proxy's page is no JSON; the reason phrase is enough then.
        let complaint: Complaint = serde_json::from_slice(&body).unwrap_or_default();
        let without_secrets = |text: &str| {
            call.secrets().fold(text.trim().to_owned(), |text, secret| {
                match secret.expose_secret() {
                    "" => text,
                    secret => text.replace(secret, "…"),
                }
            })
        };
        let said = reason
            .or(complaint.message)
            .or_else(|| status.canonical_reason().map(str::to_owned))
            .unwrap_or_default();
        let errors = complaint
            .errors
            .iter()
            .map(|(name, what)| {
                let what = what
                    .as_str()
                    .map_or_else(|| what.to_string(), str::to_owned);
                (name.clone(), without_secrets(&what))
            })
            .collect();
        Err(PveError::refused(
            call.describe(),
            call.effect(),
            &self.token,
            status.as_u16(),
            without_secrets(&said),
            errors,
        ))
    }

    fn request<T>(&self, call: &Call<T>) -> Result<Request<Full<Bytes>>, PveError> {
        let mut uri = format!("{}{API}{}", self.address, call.path());
        let form = call.form();
        let mut body = String::new();
        let in_query = matches!(call.method(), Method::Get | Method::Delete);
        if in_query && !form.is_empty() {
            uri = format!("{uri}?{form}");
        } else if !in_query {
            body = form;
        }
        let mut request = Request::builder()
            .method(call.method().as_str())
            .uri(uri)
            .header(AUTHORIZATION, self.authorization.clone())
            .header(USER_AGENT, concat!("mayfly/", env!("CARGO_PKG_VERSION")));
        if !in_query {
            request = request.header(CONTENT_TYPE, "application/x-www-form-urlencoded");
        }
        request
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| PveError::Strange {
                call: call.describe(),
                // Nothing was sent.
                effect: Effect::Reads,
                what: error.to_string(),
            })
    }

    fn transport<T>(
        &self,
        call: &Call<T>,
        error: &(dyn Error + 'static),
        connecting: bool,
    ) -> PveError {
        let address = self.address.clone();
        if let Some(Distrust { cause, advice }) = Distrust::of(error) {
            let pin = self.pinned.as_ref().and_then(|pinned| {
                let seen = pinned.seen()?;
                Some(format!("it is {seen}, not {}", pinned.announced()))
            });
            return PveError::Certificate {
                address,
                cause: pin.unwrap_or(cause),
                advice: advice.unwrap_or(
                    "give the authority that signed it, or its fingerprint as `pvenode cert info` shows it on the node",
                ),
            };
        }
        let cause = innermost(error);
        if connecting {
            return PveError::Unreachable { address, cause };
        }
        PveError::BrokenOff {
            call: call.describe(),
            effect: call.effect(),
            address,
            cause,
        }
    }
}

/// `https://host:8006`, without a path.
fn checked_address(address: &str) -> Result<String, SettingsError> {
    let wrong = |what: &str| SettingsError::Address {
        address: address.to_owned(),
        what: what.to_owned(),
    };
    let uri: Uri = address.parse().map_err(|_| wrong("it is no URL"))?;
    if uri.scheme_str() != Some("https") {
        return Err(wrong("it is not https"));
    }
    if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
        return Err(wrong("there is a path in it"));
    }
    match uri.authority() {
        Some(authority) if !authority.as_str().contains('@') => Ok(format!("https://{authority}")),
        Some(_) => Err(wrong("there is a user in it")),
        None => Err(wrong("there is no host in it")),
    }
}

/// The reason phrase, if it is not the usual one for its status: hyper keeps only those.
fn reason(answer: &Response<Incoming>) -> Option<String> {
    let phrase = answer.extensions().get::<ReasonPhrase>()?;
    let text = String::from_utf8_lossy(phrase.as_bytes());
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

fn innermost(error: &(dyn Error + 'static)) -> String {
    causes(error).last().unwrap_or(error).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_address_of_an_api_is_taken() {
        for good in [
            "https://pve.example:8006",
            "https://192.0.2.1:8006/",
            "https://[2001:db8::1]:8006",
        ] {
            let address = checked_address(good).unwrap();
            assert!(!address.ends_with('/'), "{address}");
        }
        for bad in [
            "http://pve.example:8006",
            "pve.example:8006",
            "https://pve.example:8006/api2/json",
            "https://user@pve.example",
            "not an address",
            "",
        ] {
            let error = checked_address(bad).unwrap_err().to_string();
            assert!(error.contains("https://host:8006 is wanted"), "{error}");
        }
    }
}
