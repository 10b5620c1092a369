//! What crosses crates: the lab that drives Mayfly as a person would, and the scenarios that use it.
//!
//! Start with [`lab::Lab`]: a folder, an address range and processes of its own, all gone when it is dropped.
//! In it stand an [`lab::Orchestrator`], a [`lab::Desk`] (screen, panel, notifications, keyring) and, on the desk, a
//! [`lab::Launcher`]. [`lab::Guest`] looks into a desktop from outside.
//!
//! ```no_run
//! # async fn scenario() -> anyhow::Result<()> {
//! use mayfly_tests::lab::{Desk, Lab, Launcher, Orchestrator, Provider};
//! let lab = Lab::new("a click in the tray gives a desktop")?;
//! let orchestrator = Orchestrator::start(&lab, &Provider::Simulated, "").await?;
//! let desk = Desk::start(&lab).await?;
//! let mut launcher = Launcher::start(&lab, &desk, orchestrator.url())?;
//! launcher.tray(&desk).await?.click("New desktop").await?;
//! # Ok(()) }
//! ```

pub mod caller;
pub mod chaos;
pub mod deaths;
pub mod kills;
pub mod lab;
pub mod machine;
pub mod plain;
pub mod realm;
pub mod sessions;
pub mod site;
pub use mayfly_micro_guest as micro_guest;
