//! Tauri's code generation. The commands are named here, so that a page may call none unless a capability says so.

use std::path::Path;

const COMMANDS: &[&str] = &["subscribe", "act", "settings", "save_settings"];

fn main() {
    println!("cargo::rerun-if-changed=../ui/dist");
    if !Path::new("../ui/dist/index.html").is_file() {
        println!(
            "cargo::error=the windows are not built: run `npm ci && npm run build` in ui/ first (`cargo xtask demo` and `cargo xtask test` do it)"
        );
        return;
    }
    let attributes = tauri_build::Attributes::new()
        .app_manifest(tauri_build::AppManifest::new().commands(COMMANDS))
        .windows_attributes(
            tauri_build::WindowsAttributes::new().window_icon_path("../icons/mayfly.ico"),
        );
    if let Err(error) = tauri_build::try_build(attributes) {
        println!("cargo::error={error:#}");
    }
}
