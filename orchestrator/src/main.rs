//! The orchestrator's one binary.
fn main() {}
