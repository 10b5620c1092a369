//! The control plane whole, on pretended machines: the real API over a real listener, asked by the real client.

#![allow(
    clippy::unwrap_used,
    reason = "all of this crate is tests, its helpers too"
)]

mod admin;
mod api;
mod bad_input;
mod crash;
mod damage;
mod health;
mod house;
mod life;
mod many;
mod packaging;
mod postgres;
mod process;
mod prototype;
mod provider;
mod reaper;
mod receipt;
mod replicas;
mod restore;
mod stuck;
mod telemetry;
mod words;
