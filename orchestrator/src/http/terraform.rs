//! Terraform's HTTP backend: the state of each machine, for the Terraform run that makes it and for nobody else.
//!
//! The protocol is that of Terraform's backend `http`: GET and POST of the state, a lock by methods of our choice. Every run has a
//! password of its own. What is written without the lock, or under another's, is refused with what the lock's holder said of
//! itself, which Terraform shows.

use super::refusal;
use crate::control::Refused;
use crate::secret::{self, Secrets};
use crate::store::machines::{Locking, Machines};
use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, FromRequestParts, Path, Query, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use data_encoding::BASE64;
use mayfly_api::{DesktopName, ProblemCode};
use serde::Deserialize;
use std::sync::Arc;

/// A state of one machine is some 20 KB.
const LARGEST_STATE: usize = 4 << 20;

/// What the backend works on.
#[derive(Clone)]
pub struct Backend {
    /// Where states are kept.
    pub machines: Arc<dyn Machines>,
    /// Where passwords come from.
    pub secrets: Arc<Secrets>,
}

/// The path of a machine's state; that of its lock is below it.
#[must_use]
pub fn path(name: DesktopName) -> String {
    format!("/terraform/{name}")
}

/// The backend's routes.
pub fn router(backend: Backend) -> Router {
    Router::new()
        .route("/terraform/{desktop}", get(load).post(save))
        .route("/terraform/{desktop}/lock", put(lock).delete(unlock))
        .layer(DefaultBodyLimit::max(LARGEST_STATE))
        .method_not_allowed_fallback(refusal::no_such_method)
        .with_state(backend)
}

/// A machine whose password the caller has shown.
struct Mine(DesktopName);

impl FromRequestParts<Backend> for Mine {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, backend: &Backend) -> Result<Self, Refused> {
        let refused = || {
            Refused::new(
                ProblemCode::NotFound,
                "there is no such machine, or this is not its password",
            )
        };
        let Path(desktop) =
            Path::<std::collections::HashMap<String, String>>::from_request_parts(parts, backend)
                .await
                .map_err(|_| refused())?;
        let name: DesktopName = desktop
            .get("desktop")
            .and_then(|name| name.parse().ok())
            .ok_or_else(refused)?;
        let shown = basic_password(&parts.headers, name).ok_or_else(refused)?;
        if !secret::same(&backend.secrets.terraform_password(name), &shown) {
            return Err(refused());
        }
        Ok(Self(name))
    }
}

/// RFC 7617; the user is the desktop's name.
fn basic_password(headers: &HeaderMap, name: DesktopName) -> Option<String> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, encoded) = value.split_once(' ')?;
    let decoded = BASE64.decode(encoded.trim().as_bytes()).ok()?;
    let text = String::from_utf8(decoded).ok()?;
    let (user, password) = text.split_once(':')?;
    (scheme.eq_ignore_ascii_case("basic") && user == name.to_string()).then(|| password.to_owned())
}

async fn load(State(backend): State<Backend>, Mine(name): Mine) -> Result<Response, Refused> {
    let json = [(header::CONTENT_TYPE, "application/json")];
    Ok(match backend.machines.state(name).await? {
        Some(state) => (json, state).into_response(),
        // "There is none yet", says Terraform's documentation of 204 and 404.
        None => StatusCode::NO_CONTENT.into_response(),
    })
}

#[derive(Deserialize)]
struct Under {
    #[serde(rename = "ID")]
    id: Option<String>,
}

async fn save(
    State(backend): State<Backend>,
    Mine(name): Mine,
    Query(Under { id }): Query<Under>,
    body: Bytes,
) -> Result<Response, Refused> {
    let id = id.unwrap_or_default();
    Ok(answer(backend.machines.save(name, &id, &body).await?))
}

/// What Terraform says of a lock; kept and shown as it is.
#[derive(Deserialize)]
struct Lock {
    #[serde(rename = "ID")]
    id: String,
}

fn read_lock(body: &[u8]) -> Result<(Lock, String), Refused> {
    let read = || -> Option<(Lock, String)> {
        let text = std::str::from_utf8(body).ok()?;
        Some((serde_json::from_str(text).ok()?, text.to_owned()))
    };
    read().ok_or_else(|| {
        Refused::new(
            ProblemCode::InvalidRequest,
            "the body is not what Terraform says of a lock",
        )
    })
}

async fn lock(
    State(backend): State<Backend>,
    Mine(name): Mine,
    body: Bytes,
) -> Result<Response, Refused> {
    let (Lock { id }, info) = read_lock(&body)?;
    Ok(answer(backend.machines.lock(name, &id, &info).await?))
}

async fn unlock(
    State(backend): State<Backend>,
    Mine(name): Mine,
    body: Bytes,
) -> Result<Response, Refused> {
    let (Lock { id }, _) = read_lock(&body)?;
    Ok(answer(backend.machines.unlock(name, &id).await?))
}

fn answer(locking: Locking) -> Response {
    match locking {
        Locking::Done => StatusCode::OK.into_response(),
        Locking::Held(info) => (StatusCode::LOCKED, info).into_response(),
        Locking::Nothing => (
            StatusCode::CONFLICT,
            "this machine is not to be made, or its state is not locked",
        )
            .into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::machines::{Reserved, Reserving};
    use crate::store::sqlite::SqliteStore;
    use axum::body::{Body, to_bytes};
    use axum::http::Request;
    use secrecy::ExposeSecret;
    use tower::ServiceExt;

    struct Scene {
        _folder: tempfile::TempDir,
        backend: Backend,
        name: DesktopName,
    }

    impl Scene {
        async fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let store = SqliteStore::open(&folder.path().join("db")).await.unwrap();
            let secrets = Secrets::open(&folder.path().join("key")).unwrap();
            let name = DesktopName::from_number(9).unwrap();
            let machine = Reserved {
                name,
                node: "pve1".to_owned(),
                memory_mib: 512,
                storage: "ceph".to_owned(),
            };
            assert_eq!(store.reserve(&machine, 1).await.unwrap(), Reserving::Done);
            Self {
                _folder: folder,
                backend: Backend {
                    machines: Arc::new(store),
                    secrets: Arc::new(secrets),
                },
                name,
            }
        }

        async fn ask(&self, method: &str, below: &str, body: &str) -> (u16, String) {
            let password = self.backend.secrets.terraform_password(self.name);
            self.ask_as(password.expose_secret(), method, below, body)
                .await
        }

        async fn ask_as(
            &self,
            password: &str,
            method: &str,
            below: &str,
            body: &str,
        ) -> (u16, String) {
            let login = BASE64.encode(format!("{}:{password}", self.name).as_bytes());
            let request = Request::builder()
                .method(method)
                .uri(format!("{}{below}", path(self.name)))
                .header(header::AUTHORIZATION, format!("Basic {login}"))
                .body(Body::from(body.to_owned()))
                .unwrap();
            let answer = router(self.backend.clone()).oneshot(request).await.unwrap();
            let status = answer.status().as_u16();
            let body = to_bytes(answer.into_body(), 1 << 20).await.unwrap();
            (status, String::from_utf8(body.into()).unwrap())
        }
    }

    #[tokio::test]
    async fn a_run_locks_saves_and_unlocks() {
        let scene = Scene::new().await;
        let mine = r#"{"ID":"one","Who":"a"}"#;
        assert_eq!(scene.ask("GET", "", "").await.0, 204);
        assert_eq!(scene.ask("POST", "?ID=one", "{}").await.0, 409);
        assert_eq!(scene.ask("PUT", "/lock", mine).await.0, 200);
        assert_eq!(
            scene.ask("PUT", "/lock", r#"{"ID":"two"}"#).await,
            (423, mine.to_owned())
        );
        assert_eq!(scene.ask("POST", "?ID=two", "{}").await.0, 423);
        assert_eq!(scene.ask("POST", "?ID=one", "{\"serial\":1}").await.0, 200);
        assert_eq!(scene.ask("DELETE", "/lock", mine).await.0, 200);
        assert_eq!(scene.ask("POST", "", "{}").await.0, 409);
        assert_eq!(
            scene.ask("GET", "", "").await,
            (200, "{\"serial\":1}".to_owned())
        );
    }

    #[tokio::test]
    async fn another_password_opens_nothing() {
        let scene = Scene::new().await;
        for (method, below) in [("GET", ""), ("POST", "?ID=a"), ("PUT", "/lock")] {
            let (status, _) = scene.ask_as("guess", method, below, "{}").await;
            assert_eq!(status, 404, "{method} {below}");
        }
    }
}
