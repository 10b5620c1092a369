//! `mayfly` for the terminal.
fn main() {}
