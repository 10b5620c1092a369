//! Makes every icon from the one drawing, `icons/mayfly.svg`. The results are committed, so that a build needs no
//! drawing tool; run this after changing the drawing.
//!
//! `.ico` and `.icns` are containers of PNG images: see the ICO article of Microsoft's "Win32 resources" (PNG entries
//! are read since Windows Vista) and Apple's "Icon Services" types `ic07` … `ic14`.

use anyhow::{Context, Result, bail};
use std::{fs, path::Path, process::Command};

/// Sizes of the committed PNG files, in pixels.
const APP_SIZES: [u32; 4] = [32, 128, 256, 512];
/// Sizes inside `mayfly.ico`, in pixels.
const ICO_SIZES: [u32; 6] = [16, 24, 32, 48, 64, 256];
/// Types and sizes inside `mayfly.icns`.
const ICNS_TYPES: [(&[u8; 4], u32); 7] = [
    (b"ic11", 32),
    (b"ic12", 64),
    (b"ic07", 128),
    (b"ic08", 256),
    (b"ic13", 256),
    (b"ic09", 512),
    (b"ic14", 512),
];
/// Tray pictures are drawn at twice the usual 22 pixels, and scaled down by the panel.
const TRAY_SIZE: u32 = 44;

/// Writes `icons/*.png`, `icons/mayfly.ico` and `icons/mayfly.icns`.
///
/// # Errors
/// When `rsvg-convert` (package `librsvg2-bin`) is missing or refuses the drawing, or a file cannot be written.
pub(crate) fn generate(root: &Path) -> Result<()> {
    let icons = root.join("icons");
    let draw = |group: &str, size: u32| draw(&icons.join("mayfly.svg"), group, size);
    let write = |name: String, bytes: Vec<u8>| {
        fs::write(icons.join(&name), bytes).with_context(|| format!("cannot write icons/{name}"))
    };
    for size in APP_SIZES {
        write(format!("app-{size}.png"), draw("app", size)?)?;
    }
    for state in ["idle", "busy", "active", "attention"] {
        let group = format!("tray-{state}");
        write(format!("{group}.png"), draw(&group, TRAY_SIZE)?)?;
    }
    let images = ICO_SIZES
        .iter()
        .map(|&size| Ok((size, draw("app", size)?)))
        .collect::<Result<Vec<_>>>()?;
    write("mayfly.ico".to_owned(), ico(&images)?)?;
    let images = ICNS_TYPES
        .iter()
        .map(|&(kind, size)| Ok((kind, draw("app", size)?)))
        .collect::<Result<Vec<_>>>()?;
    write("mayfly.icns".to_owned(), icns(&images)?)
}

/// One group of the drawing as a PNG.
fn draw(svg: &Path, group: &str, size: u32) -> Result<Vec<u8>> {
    let size = size.to_string();
    let output = Command::new("rsvg-convert")
        .args(["--export-id", group, "--width", &size, "--height", &size])
        .arg(svg)
        .output()
        .context("cannot run rsvg-convert: install the package librsvg2-bin")?;
    if !output.status.success() {
        bail!(
            "rsvg-convert refuses group {group} of {}: {}",
            svg.display(),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(output.stdout)
}

/// An `.ico` file: header, directory, images.
fn ico(images: &[(u32, Vec<u8>)]) -> Result<Vec<u8>> {
    let mut file = Vec::from([0, 0, 1, 0]);
    file.extend(u16::try_from(images.len())?.to_le_bytes());
    let mut offset = u32::try_from(6 + 16 * images.len())?;
    for (size, png) in images {
        // 256 is written as 0.
        let side = u8::try_from(*size).unwrap_or(0);
        file.extend([side, side, 0, 0, 1, 0, 32, 0]);
        let length = u32::try_from(png.len())?;
        file.extend(length.to_le_bytes());
        file.extend(offset.to_le_bytes());
        offset += length;
    }
    for (_, png) in images {
        file.extend(png);
    }
    Ok(file)
}

/// An `.icns` file: header, then type, length and image, one after the other.
fn icns(images: &[(&[u8; 4], Vec<u8>)]) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    for (kind, png) in images {
        body.extend(*kind);
        body.extend(u32::try_from(8 + png.len())?.to_be_bytes());
        body.extend(png);
    }
    let mut file = b"icns".to_vec();
    file.extend(u32::try_from(8 + body.len())?.to_be_bytes());
    file.extend(body);
    Ok(file)
}
