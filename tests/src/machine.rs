//! The machine that something was measured on.

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Processor, memory, kernel, load and kind of build: what a figure cannot be read without.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn facts() -> Result<Value> {
    let read =
        |path: &str| std::fs::read_to_string(path).with_context(|| format!("reading {path}"));
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split(':').nth(1))
            .map(|value| value.trim().to_owned())
    };
    Ok(json!({
        "processor": field(&read("/proc/cpuinfo")?, "model name"),
        "processors": std::thread::available_parallelism()?.get(),
        "memory": field(&read("/proc/meminfo")?, "MemTotal"),
        "kernel": read("/proc/sys/kernel/osrelease")?.trim(),
        "load_before": read("/proc/loadavg")?.split_whitespace().next(),
        "build": if cfg!(debug_assertions) { "debug" } else { "release" },
    }))
}
