//! The HTTP API: `/api/v1`, the prototype's three calls, and what guards them.
//!
//! # Guarantees
//! * Every answer that is not a success is a problem document (RFC 9457), also those for unknown paths and for panics.
//! * A refused request changes nothing.
//! * Only programs of this machine get in: loopback listener, no foreign `Host` (DNS rebinding), no `Origin` (web pages).

mod body;
mod events;
mod guard;
mod health;
mod prototype;
mod refusal;
mod sessions;
pub mod terraform;

use crate::control::Control;
use axum::Router;
use axum::middleware;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::TcpListener;
use tower_http::catch_panic::CatchPanicLayer;
use tracing::warn;
use utoipa::OpenApi;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

/// Open calls get this long to end when the orchestrator stops.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Mayfly orchestrator",
        description = "A fresh desktop when you ask for one, gone when you close it.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    components(schemas(mayfly_api::Problem, mayfly_api::SessionEvent)),
    modifiers(&SessionSecret),
)]
struct Document;

struct SessionSecret;

impl utoipa::Modify for SessionSecret {
    fn modify(&self, openapi: &mut utoipa::openapi::OpenApi) {
        let components = openapi.components.get_or_insert_default();
        components.add_security_scheme(
            "session_secret",
            SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)),
        );
    }
}

fn routes() -> OpenApiRouter<Control> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(sessions::create))
        .routes(routes!(sessions::get, sessions::destroy))
        .routes(routes!(sessions::credentials))
        .routes(routes!(sessions::heartbeat))
        .routes(routes!(sessions::keep))
        .routes(routes!(sessions::receipt))
        .routes(routes!(events::follow))
        .routes(routes!(prototype::create))
        .routes(routes!(prototype::destroy))
        .routes(routes!(prototype::list))
        .routes(routes!(prototype::metrics))
        .routes(routes!(health::healthz))
        .routes(routes!(health::readyz))
        .routes(routes!(health::metrics))
        .routes(routes!(sessions::document))
}

/// The OpenAPI 3.1 document of everything that is served.
#[must_use]
pub fn document() -> utoipa::openapi::OpenApi {
    routes().to_openapi()
}

/// The service.
pub fn router(control: Control) -> Router {
    let (router, _) = routes().split_for_parts();
    let backend = terraform::Backend {
        machines: control.shared.store.clone(),
        secrets: control.shared.secrets.clone(),
    };
    let shared = control.shared.clone();
    router
        .with_state(control)
        .merge(terraform::router(backend))
        .fallback(refusal::no_such_path)
        .method_not_allowed_fallback(refusal::no_such_method)
        .layer(middleware::from_fn(guard::only_from_here))
        .layer(CatchPanicLayer::custom(refusal::panicked))
        .layer(middleware::from_fn_with_state(shared, health::count))
}

/// Serves until the orchestrator stops, then closes event streams and gives open calls a bounded time.
///
/// # Errors
/// If `listener` breaks, or is not on loopback.
pub async fn serve(control: Control, listener: TcpListener) -> std::io::Result<()> {
    refuse_foreign(listener.local_addr()?)?;
    let stopping = control.shared.stopping.clone();
    let stopped = stopping.clone();
    let server = axum::serve(listener, router(control))
        .with_graceful_shutdown(async move { stopping.cancelled().await });
    let bound = async {
        stopped.cancelled().await;
        tokio::time::sleep(PATIENCE).await;
    };
    tokio::select! {
        done = server.into_future() => done,
        () = bound => {
            warn!("some connections did not end in time and are dropped");
            Ok(())
        }
    }
}

fn refuse_foreign(address: SocketAddr) -> std::io::Result<()> {
    if address.ip().is_loopback() {
        return Ok(());
    }
    Err(std::io::Error::other(format!(
        "{address} is not a loopback address: there is no login yet, so whoever reaches the API can make desktops"
    )))
}
