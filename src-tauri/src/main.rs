//! Mayfly in the tray.
fn main() {}
