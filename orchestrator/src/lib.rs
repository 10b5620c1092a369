//! Mayfly control plane.
pub mod image;
pub mod provider;
