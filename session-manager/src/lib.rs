//! Everything the launcher does, without Tauri.
pub mod view;
