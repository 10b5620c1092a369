//! A client of the Proxmox VE API: the calls that a desktop's life needs, and no more.
//!
//! [`call`] says as data what is sent; [`Client`] sends it; [`task`] follows what it started; [`preflight`] says what a
//! site lacks.
//!
//! # Guarantees
//! * What is sent is data ([`call::Call`]): a test holds every call against Proxmox's own description of its API.
//! * A node is believed only if its certificate is: signed by a given authority, by one of the system's, or the very one
//!   whose fingerprint is given ([`Trust`](crate::trust::Trust)). There is no way around it.
//! * Every wait has an end: connecting, a call, a task.
//! * An error says whether the call may be sent again as it is ([`Retry`]): a change is never sent twice on its own.
//! * Secrets (the token, contents of files) are in no error, log, or `Debug` output.
//!
//! # Assumptions
//! * Proxmox VE 8 or 9. Facts are from its API description (`apidata.js` of pve-docs 9.1) and, where that is silent, from
//!   its sources; each is named where it is used.

pub mod call;
mod client;
mod error;
pub mod firewall;
mod name;
pub mod preflight;
pub mod reply;
pub mod task;
mod token;

mod upid;

pub use client::{Client, Endpoint, Limits, SettingsError};
pub use error::{Cause, Effect, PveError, Retry};
pub use name::{Guest, NameError, NodeName, PoolName, StorageName, VmId};
pub use token::Token;

pub use upid::{Upid, UpidError};
