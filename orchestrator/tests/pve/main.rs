//! The client of the Proxmox VE API: against its description ([`contract`]), and against a running one ([`fake`]); what the reaper
//! removes there ([`reaper`]).

#![allow(clippy::unwrap_used, reason = "all of it is a test")]

mod contract;
mod fake;
mod fakepve;
mod reaper;
