//! Mayfly control plane.
pub mod image;
pub mod process;
pub mod provider;
pub mod supervise;
