//! Mayfly control plane.
pub mod provider;
