//! The control plane whole, on pretended machines: the real API over a real listener, asked by the real client.

#![allow(
    clippy::unwrap_used,
    reason = "all of this crate is tests, its helpers too"
)]

mod api;
mod bad_input;
#[path = "../store/cluster.rs"]
mod cluster;
mod crash;
mod damage;
mod house;
mod life;
mod postgres;
mod process;
mod prototype;
mod provider;
mod restore;
mod words;
