//! The typed HTTP client of the API, with an event stream that heals itself.
//!
//! # Guarantees
//! * [`Client::create`] sends the same `Idempotency-Key` on every attempt, so a lost answer never makes a second session.
//! * [`Client::events`] reconnects with `Last-Event-ID`, backs off with a bound, and yields each `seq` at most once.
//!
//! # Errors
//! [`ClientError::Problem`] carries the orchestrator's own words; everything else is transport.

use crate::{
    CreateSession, Created, Credentials, Heartbeat, Keep, Problem, Receipt, Session, SessionEvent,
    SessionId, problem,
};
use futures_util::StreamExt;
use futures_util::stream::{self, Stream};
use reqwest::{Method, RequestBuilder, Response};
use secrecy::{ExposeSecret, SecretString};
use std::pin::Pin;
use std::time::Duration;

/// A stream is taken for dead after this silence; the server sends a comment every 15 s.
const SILENCE: Duration = Duration::from_secs(40);
/// Longest pause between two attempts to reconnect.
const MAX_BACKOFF: Duration = Duration::from_secs(5);

/// What can go wrong in a call.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The orchestrator answered with a problem document.
    #[error(transparent)]
    Problem(#[from] Problem),
    /// The orchestrator could not be reached, or the connection broke.
    #[error("the orchestrator at {url} cannot be reached: {source}")]
    Unreachable {
        /// The address tried.
        url: String,
        /// The cause.
        source: reqwest::Error,
    },
    /// Something answered that is not a Mayfly orchestrator.
    #[error("{url} answered {status}, which is not what an orchestrator says")]
    NotAnOrchestrator {
        /// The address tried.
        url: String,
        /// Its HTTP status.
        status: u16,
    },
    /// The address is not a valid URL.
    #[error("{0:?} is not a valid orchestrator address; it looks like http://127.0.0.1:5000")]
    InvalidAddress(String),
}

impl ClientError {
    /// Whether the same call may succeed later.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Problem(p) => p.retryable,
            Self::Unreachable { .. } => true,
            Self::NotAnOrchestrator { .. } | Self::InvalidAddress(_) => false,
        }
    }

    /// The problem's code, if the orchestrator answered.
    #[must_use]
    pub fn code(&self) -> Option<crate::ProblemCode> {
        match self {
            Self::Problem(p) => Some(p.code),
            _ => None,
        }
    }
}

/// A client of one orchestrator. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    base: reqwest::Url,
}

/// The events of one session.
pub type EventStream = Pin<Box<dyn Stream<Item = Result<SessionEvent, ClientError>> + Send>>;

impl Client {
    /// A client of the orchestrator at `address`, such as `http://127.0.0.1:5000`.
    ///
    /// # Errors
    /// [`ClientError::InvalidAddress`] if it is not an `http` URL.
    pub fn new(address: &str) -> Result<Self, ClientError> {
        let invalid = || ClientError::InvalidAddress(address.to_owned());
        let base: reqwest::Url = address
            .trim_end_matches('/')
            .parse()
            .map_err(|_| invalid())?;
        if base.scheme() != "http" || base.cannot_be_a_base() {
            return Err(invalid());
        }
        let http = reqwest::Client::builder()
            .user_agent(concat!("mayfly/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(Duration::from_secs(5))
            .no_proxy()
            .build()
            .map_err(|source| ClientError::Unreachable {
                url: address.to_owned(),
                source,
            })?;
        Ok(Self { http, base })
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let url = format!("{}{path}", self.base.as_str().trim_end_matches('/'));
        self.http.request(method, url)
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response, ClientError> {
        let unreachable = |source| ClientError::Unreachable {
            url: self.base.to_string(),
            source,
        };
        let response = request.send().await.map_err(unreachable)?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status().as_u16();
        let is_problem = response
            .headers()
            .get(reqwest::header::CONTENT_TYPE)
            .is_some_and(|v| v.as_bytes().starts_with(problem::MEDIA_TYPE.as_bytes()));
        if is_problem && let Ok(problem) = response.json::<Problem>().await {
            return Err(problem.into());
        }
        Err(ClientError::NotAnOrchestrator {
            url: self.base.to_string(),
            status,
        })
    }

    async fn json<T: serde::de::DeserializeOwned>(
        &self,
        request: RequestBuilder,
    ) -> Result<T, ClientError> {
        let response = self.send(request.timeout(Duration::from_secs(15))).await?;
        let status = response.status().as_u16();
        let url = self.base.to_string();
        // An answer that is cut off says nothing about who gave it.
        let body = response.bytes().await;
        let body = body.map_err(|source| ClientError::Unreachable {
            url: url.clone(),
            source,
        })?;
        serde_json::from_slice(&body).map_err(|_| ClientError::NotAnOrchestrator { url, status })
    }

    fn session(
        &self,
        method: Method,
        id: SessionId,
        rest: &str,
        secret: &SecretString,
    ) -> RequestBuilder {
        self.request(method, &format!("/api/v1/sessions/{id}{rest}"))
            .bearer_auth(secret.expose_secret())
    }

    /// Asks for a desktop. Returns as soon as the request is durable.
    ///
    /// # Errors
    /// See [`ClientError`]. Calling again with the same key and request is safe.
    pub async fn create(
        &self,
        request: &CreateSession,
        idempotency_key: &str,
    ) -> Result<Created, ClientError> {
        let call = self.request(Method::POST, "/api/v1/sessions");
        self.json(
            call.header("Idempotency-Key", idempotency_key)
                .json(request),
        )
        .await
    }

    /// The session now.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn get(&self, id: SessionId, secret: &SecretString) -> Result<Session, ClientError> {
        self.json(self.session(Method::GET, id, "", secret)).await
    }

    /// What logs in to the desktop.
    ///
    /// # Errors
    /// See [`ClientError`]; a conflict before it is ready and after it ended.
    pub async fn credentials(
        &self,
        id: SessionId,
        secret: &SecretString,
    ) -> Result<Credentials, ClientError> {
        self.json(self.session(Method::GET, id, "/credentials", secret))
            .await
    }

    /// Says that the launcher is there.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn heartbeat(
        &self,
        id: SessionId,
        secret: &SecretString,
        beat: Heartbeat,
    ) -> Result<Session, ClientError> {
        self.json(
            self.session(Method::POST, id, "/heartbeat", secret)
                .json(&beat),
        )
        .await
    }

    /// Holds the desktop without an RDP connection.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn keep(
        &self,
        id: SessionId,
        secret: &SecretString,
        keep: Keep,
    ) -> Result<Session, ClientError> {
        self.json(self.session(Method::POST, id, "/keep", secret).json(&keep))
            .await
    }

    /// Ends the session. Idempotent: an ended session stays ended.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn destroy(
        &self,
        id: SessionId,
        secret: &SecretString,
    ) -> Result<Session, ClientError> {
        self.json(self.session(Method::DELETE, id, "", secret))
            .await
    }

    /// What was checked to be gone at its end.
    ///
    /// # Errors
    /// See [`ClientError`]; a conflict until it is over.
    pub async fn receipt(
        &self,
        id: SessionId,
        secret: &SecretString,
    ) -> Result<Receipt, ClientError> {
        self.json(self.session(Method::GET, id, "/receipt", secret))
            .await
    }

    /// The session's events from now on, first a snapshot, until its phase is final.
    ///
    /// The stream reconnects by itself; it yields an error for each failed attempt (so that a person can be told)
    /// and goes on after it, unless the error is not retryable, which ends it.
    #[must_use]
    pub fn events(&self, id: SessionId, secret: &SecretString) -> EventStream {
        let state = Following {
            client: self.clone(),
            id,
            secret: secret.clone(),
            last: None,
            open: None,
            failures: 0,
            done: false,
        };
        Box::pin(stream::unfold(state, |mut state| async move {
            let item = state.next().await?;
            Some((item, state))
        }))
    }
}

type Frames = Pin<Box<dyn Stream<Item = Result<SessionEvent, ClientError>> + Send>>;

struct Following {
    client: Client,
    id: SessionId,
    secret: SecretString,
    last: Option<u64>,
    open: Option<Frames>,
    failures: u32,
    done: bool,
}

impl Following {
    async fn next(&mut self) -> Option<Result<SessionEvent, ClientError>> {
        loop {
            if self.done {
                return None;
            }
            let Some(frames) = self.open.as_mut() else {
                match self.connect().await {
                    Ok(frames) => self.open = Some(frames),
                    Err(error) => return Some(Err(self.failed(error))),
                }
                continue;
            };
            match tokio::time::timeout(SILENCE, frames.next()).await {
                Ok(Some(Ok(event))) => {
                    self.failures = 0;
                    if self.last.is_some_and(|last| event.seq <= last) {
                        continue;
                    }
                    self.last = Some(event.seq);
                    self.done = event.session.phase.is_final();
                    return Some(Ok(event));
                }
                Ok(Some(Err(error))) => {
                    self.open = None;
                    return Some(Err(self.failed(error)));
                }
                // Silence, or an orderly end such as a restart: connect again at once, then with patience.
                Ok(None) | Err(_) => {
                    self.open = None;
                    self.failures += 1;
                }
            }
        }
    }

    fn failed(&mut self, error: ClientError) -> ClientError {
        self.failures += 1;
        self.done = !error.is_retryable();
        error
    }

    async fn connect(&mut self) -> Result<Frames, ClientError> {
        if self.failures > 0 {
            let pause = Duration::from_millis(100 << self.failures.min(6)).min(MAX_BACKOFF);
            tokio::time::sleep(pause).await;
        }
        let mut call = self
            .client
            .session(Method::GET, self.id, "/events", &self.secret);
        if let Some(last) = self.last {
            call = call.header("Last-Event-ID", last);
        }
        let response = tokio::time::timeout(SILENCE, self.client.send(call)).await;
        let url = self.client.base.to_string();
        let Ok(response) = response else {
            return Err(Problem::new(
                crate::ProblemCode::TimedOut,
                format!("{url} accepted the connection and said nothing"),
            )
            .into());
        };
        Ok(Box::pin(
            eventsource_stream::EventStream::new(response?.bytes_stream()).filter_map(
                move |frame| {
                    let url = url.clone();
                    async move {
                        match frame {
                            // A frame that this version cannot read is skipped: the next snapshot repairs it.
                            Ok(frame) => serde_json::from_str(&frame.data).ok().map(Ok),
                            Err(eventsource_stream::EventStreamError::Transport(source)) => {
                                Some(Err(ClientError::Unreachable { url, source }))
                            }
                            Err(_) => {
                                Some(Err(ClientError::NotAnOrchestrator { url, status: 200 }))
                            }
                        }
                    }
                },
            ),
        ))
    }
}
