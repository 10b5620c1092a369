//! What every store promises, shown on each of them; and what each promises for itself.

#![allow(
    clippy::unwrap_used,
    reason = "all of this crate is tests, its helpers too"
)]

mod conformance;
mod model;
mod place;
mod postgres;
mod replicas;
mod sqlite;
