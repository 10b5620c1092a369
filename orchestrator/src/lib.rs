//! Mayfly's control plane: takes sessions, makes their desktops, watches them, and never leaves one behind.
//!
//! `http` → [`store`] ← [`worker`]: observe, [`decide`] (pure), do, commit. The way in for programs is
//! [`control::Control`].

pub mod admin;
pub mod agents;
pub mod ansible;
pub mod clock;
pub mod config;
pub mod control;
pub mod decide;
pub mod desktop;
pub mod doctor;
pub mod domain;
pub mod drain;
mod failpoints;
mod fresh;
pub mod http;
pub mod image;
mod intake;
pub mod last_words;
pub mod list;
pub mod metrics;
pub mod process;
pub mod provider;
pub mod pve;
pub mod rdp_probe;
pub mod reaper;
pub mod receipt;
pub mod replica;
mod run;
pub mod secret;
pub mod serve;
pub mod session;
pub mod store;
pub mod supervise;
pub mod systemd;
pub mod telemetry;
pub mod trust;
pub mod vitals;
pub mod worker;
