//! What is installed with the program: the unit, the example configuration.

use mayfly_orchestrator::config::Config;
use std::path::{Path, PathBuf};
use std::process::Command;

fn packaged(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../packaging")
        .join(file)
}

#[test]
fn the_example_configuration_is_read_as_it_is() {
    let path = packaged("orchestrator.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let config = Config::read(&text, "orchestrator.toml", []).unwrap();
    let defaults = Config::default();
    // It shows defaults, and says where the unit keeps things.
    assert_eq!(config.listen, defaults.listen);
    assert_eq!(config.limits.idle_s, defaults.limits.idle_s);
    assert_eq!(config.limits.lifetime_s, defaults.limits.lifetime_s);
    assert_eq!(config.limits.max_desktops, defaults.limits.max_desktops);
    assert_eq!(config.template[0].memory_mib, 1536);
    let unit = std::fs::read_to_string(packaged("mayfly-orchestrator.service")).unwrap();
    let folder = |line: &str| unit.lines().any(|l| l == line);
    assert_eq!(config.state_dir, Path::new("/var/lib/mayfly"));
    assert!(folder("StateDirectory=mayfly"));
    let sockets = config.provider.qemu.runtime_dir.unwrap();
    assert_eq!(sockets, Path::new("/run/mayfly"));
    assert!(folder("RuntimeDirectory=mayfly") && folder("RuntimeDirectoryPreserve=yes"));
}

#[test]
fn systemd_understands_the_unit_and_finds_it_confined() {
    if Command::new("systemd-analyze")
        .arg("--version")
        .output()
        .is_err()
    {
        println!(
            "systemd-analyze is not here (Debian package systemd): the unit was not looked at"
        );
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let unit = dir.path().join("mayfly-orchestrator.service");
    let text = std::fs::read_to_string(packaged("mayfly-orchestrator.service")).unwrap();
    let program = env!("CARGO_BIN_EXE_mayfly-orchestrator");
    let text = text.replace("/usr/bin/mayfly-orchestrator", program);
    std::fs::write(&unit, text).unwrap();
    // 4.0 of 10: what is open beyond that would have to be said to be open here too.
    for arguments in [
        &["verify", "--man=no"][..],
        &["security", "--offline=true", "--threshold=40", "--no-pager"],
    ] {
        let looked = Command::new("systemd-analyze")
            .args(arguments)
            .arg(&unit)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&looked.stderr).into_owned();
        assert!(looked.status.success(), "{arguments:?}: {said}");
        assert!(!said.contains("mayfly-orchestrator.service"), "{said}");
    }
}
