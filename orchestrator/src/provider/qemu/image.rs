//! An image folder: what `mayfly-orchestrator image build` leaves and machines start from.

use serde::Deserialize;
use std::path::{Path, PathBuf};

/// The version of `image.json` that is understood here.
const FORMAT: u32 = 1;

/// A whole image folder; all paths are absolute and were there when it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Such as `debian-12-xfce`.
    pub name: String,
    /// The kernel.
    pub kernel: PathBuf,
    /// Its first file system.
    pub initrd: PathBuf,
    /// The disk that every machine's own disk is laid over. Never written.
    pub disk: PathBuf,
    /// The kernel's command line.
    pub command_line: String,
    /// What a machine of this image needs, in MiB.
    pub memory_mib: u32,
}

/// `image.json`. Fields added by a later version of the same format are of no concern here.
#[derive(Deserialize)]
struct Manifest {
    format: u32,
    name: String,
    kernel: String,
    initrd: String,
    disk: String,
    cmdline: String,
    memory_mib: u32,
}

/// Why an image folder cannot be used; says what to do.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0}; make an image with `mayfly-orchestrator image build` and set provider.qemu.image to its folder"
)]
pub struct ImageError(String);

impl Image {
    /// Reads and checks the folder.
    ///
    /// # Errors
    /// It is missing, not an image folder of a known format, or not whole.
    pub fn open(folder: &Path) -> Result<Self, ImageError> {
        let fail =
            |what: String| ImageError(format!("the image folder {} {what}", folder.display()));
        if folder.as_os_str().is_empty() {
            return Err(ImageError("no image is configured".to_owned()));
        }
        let folder = folder
            .canonicalize()
            .map_err(|error| fail(format!("cannot be used: {error}")))?;
        let text = std::fs::read(folder.join("image.json"))
            .map_err(|error| fail(format!("has no readable image.json: {error}")))?;
        let manifest: Manifest = serde_json::from_slice(&text)
            .map_err(|error| fail(format!("has an image.json that cannot be read: {error}")))?;
        if manifest.format != FORMAT {
            return Err(fail(format!(
                "has format {}; this version knows format {FORMAT}",
                manifest.format
            )));
        }
        let file = |name: &str| {
            let path = folder.join(name);
            match std::fs::File::open(&path).and_then(|file| file.metadata()) {
                Ok(found) if found.is_file() && found.len() > 0 => Ok(path),
                Ok(_) => Err(fail(format!("is not whole: {name} is empty or no file"))),
                Err(error) => Err(fail(format!("is not whole: {name}: {error}"))),
            }
        };
        Ok(Self {
            kernel: file(&manifest.kernel)?,
            initrd: file(&manifest.initrd)?,
            disk: file(&manifest.disk)?,
            name: manifest.name,
            command_line: manifest.cmdline,
            memory_mib: manifest.memory_mib,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(manifest: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("image.json"), manifest).unwrap();
        for file in ["vmlinuz", "initrd.img", "disk.qcow2"] {
            std::fs::write(folder.path().join(file), "x").unwrap();
        }
        folder
    }

    const MANIFEST: &str = r#"{"format":1,"name":"debian-12-xfce","key":"00","kernel":"vmlinuz",
        "initrd":"initrd.img","disk":"disk.qcow2","cmdline":"root=/dev/vda rw","memory_mib":1536}"#;

    #[test]
    fn a_whole_folder_is_an_image() {
        let folder = folder(MANIFEST);
        let image = Image::open(folder.path()).unwrap();
        assert_eq!(image.memory_mib, 1536);
        assert!(image.disk.is_absolute());
    }

    #[test]
    fn anything_less_is_refused_with_the_way_out() {
        let half = folder(MANIFEST);
        std::fs::write(half.path().join("disk.qcow2"), "").unwrap();
        let newer = folder(&MANIFEST.replace("\"format\":1", "\"format\":2"));
        let broken = folder("{");
        for (path, what) in [
            (Path::new(""), "no image is configured"),
            (Path::new("/nowhere/at/all"), "cannot be used"),
            (half.path(), "disk.qcow2 is empty"),
            (newer.path(), "format 2"),
            (broken.path(), "cannot be read"),
        ] {
            let error = Image::open(path).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
            assert!(error.contains("image build"), "{error}");
        }
    }
}
