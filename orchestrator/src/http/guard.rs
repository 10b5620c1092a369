//! Lets in programs of this machine, and no web page.

use crate::control::Refused;
use axum::extract::Request;
use axum::http::{HeaderMap, header, uri::Authority};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use mayfly_api::ProblemCode;
use std::net::IpAddr;

pub(super) async fn only_from_here(request: Request, next: Next) -> Response {
    let refused = |what: &str| Refused::new(ProblemCode::Forbidden, what).into_response();
    if request.headers().contains_key(header::ORIGIN) {
        return refused("the request has an Origin header: web pages are not let in");
    }
    if !names_this_machine(request.headers()) {
        return refused(
            "the Host header names another machine; use http://127.0.0.1 or http://localhost",
        );
    }
    next.run(request).await
}

fn names_this_machine(headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(header::HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else {
        return false;
    };
    let Some(authority) = host.to_str().ok().and_then(|h| h.parse::<Authority>().ok()) else {
        return false;
    };
    let name = authority.host();
    name.eq_ignore_ascii_case("localhost")
        || name
            .trim_start_matches('[')
            .trim_end_matches(']')
            .parse()
            .is_ok_and(|ip: IpAddr| ip.is_loopback())
}
