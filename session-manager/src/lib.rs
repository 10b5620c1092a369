//! Everything the launcher does, without Tauri.
//!
//! A surface calls [`manager::spawn`] and holds the [`handle::Handle`]: actions in; view, tray, window wishes out.

pub mod api;
pub mod core;
pub mod handle;
pub mod log;
pub mod manager;
pub mod notify;
pub mod rdp;
pub mod record;
pub mod secrets;
pub mod settings;
pub mod text;
pub mod view;

pub use handle::{Exit, Handle, Page, Tray, WindowWish};
pub use manager::{Adapters, Config, spawn};
