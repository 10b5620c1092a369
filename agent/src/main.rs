//! The service inside each desktop.
fn main() {}
